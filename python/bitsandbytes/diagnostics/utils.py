"""How diagnostics print."""

import textwrap

HEADER_WIDTH = 60


def print_header(txt: str, width: int = HEADER_WIDTH, filler: str = "=") -> None:
    """A line of `filler` with the text in its middle."""
    print((f" {txt} " if txt else "").center(width, filler))


def print_dedented(text: str) -> None:
    """A text without the indentation that its lines share."""
    print(textwrap.dedent(text).strip())
