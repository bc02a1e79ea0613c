"""The reference of the C++ API, made from the headers, which are their own manual."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "<!-- headers of include/bnb -->"  # where api/cpp.md has them


def headers() -> list[Path]:
    """Those of include/bnb, in the order in which bnb.h includes them, then the others."""
    folder = ROOT / "include" / "bnb"
    order = re.findall(r"^#include <bnb/(\w+\.h)>", (folder / "bnb.h").read_text(), re.MULTILINE)
    first = [folder / name for name in order]
    return first + sorted(file for file in folder.glob("*.h") if file not in first and file.name != "bnb.h")


def _comment(lines: list[str]) -> str:
    """A // or /* */ comment as Markdown; indented lines of it, which are formulas and tables, as a block."""
    text = [re.sub(r"^ ?(//|/\*+|\*/|\*) ?(---- )?|\s*\*/$", "", line) for line in lines]
    result, block = [], False
    for line in text:
        indented = line.startswith("  ")
        if indented != block:
            result += ["", "```text"] if indented else ["```", ""]
            block = indented
        result.append(line[2:] if indented else re.sub(r"([*\[])", r"\\\1", html.escape(line, quote=False)))
    return "\n".join([*result, "```"] if block else result).strip()


_NAMES = re.compile(
    r"^(?:template.*> *)?(?:typedef )?(?:struct|class|enum class|enum|using|concept) (\w+)"
    r"|^(?!static_assert)(?:template *<.*?> )?(?:typedef .*?|\w[\w:<>,&*\[\] ]*?[ *&])(\w+)\((?!\*)"
    r"|^(?:inline )?constexpr [\w:<>]+ (\w+)(?! *\()"
    r"|^typedef [^(){}]*?(\w+);"
    r"|^#define (\w+)",
    re.MULTILINE,
)


def names(code: str) -> list[str]:
    """What a piece of a header declares at its outermost level."""
    found = [next(filter(None, match.groups())) for match in _NAMES.finditer(code)]
    return list(dict.fromkeys(found))


def plain(text: str) -> str:
    """A header without the macro that exports names."""
    return re.sub(r"^((?:class |struct )?)BNB_API (?=\w.*[;({])", r"\1", text, flags=re.MULTILINE)


def entries(header: Path) -> tuple[str, list[tuple[str, str]]]:
    """The text at the head of a header, and its pieces: a comment and the code that it belongs to."""
    text = plain(header.read_text())
    lines = [line for line in text.splitlines() if not re.match(r"#(?!define BNB_\w+ \S)", line)]
    pieces: list[tuple[list[str], list[str]]] = [([], [])]
    depth = 0
    for line in lines:
        if re.match(r'(namespace [\w:]+|extern "C") \{|\}  ?(//|/\*) ?(namespace|extern)', line) or (
            line == "}" and not depth
        ):
            line = ""
        comment, code = pieces[-1]
        is_comment = depth == 0 and re.match(r"//| ?/?\*", line) is not None
        if depth == 0 and ((not line and (comment or code)) or (is_comment and code)):
            pieces.append(([], []))
        if is_comment:
            pieces[-1][0].append(line)
        elif line:
            pieces[-1][1].append(line)
        elif depth:
            pieces[-1][1].append("")
        depth += line.count("{") - line.count("}")
    pieces = [piece for piece in pieces if piece[0] or piece[1]]
    head = pieces.pop(0)[0] if pieces and not pieces[0][1] else []
    joined: list[tuple[list[str], list[str]]] = []
    for comment, code in pieces:
        if joined and not joined[-1][1]:  # a comment by itself introduces what follows
            joined[-1] = ([*joined[-1][0], "//", *comment] if comment else joined[-1][0], code)
        else:
            joined.append((comment, code))
    return _comment(head), [(_comment(comment), "\n".join(code)) for comment, code in joined if code]


def symbols() -> set[str]:
    """Every name that a header declares, members included."""
    text = "\n".join(header.read_text() for header in headers())
    return set(re.findall(r"\w+", re.sub(r"//.*|/\*.*?\*/", "", text)))


def pages() -> Iterator[str]:
    for header in headers():
        head, pieces = entries(header)
        yield f"## `<bnb/{header.name}>`\n\n{head}"
        for comment, code in pieces:
            title = ", ".join(f"`{name}`" for name in names(code)) or "Others"
            yield f"### {title}\n\n{comment}\n\n```cpp\n{code}\n```"
