"""The site: ./dev docs builds it with Sphinx.

The source folder is that of the project, so that every link of a page works in the repository as well as on the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import headers

project = "bitsandbytes in C++"
html_title = project
root_doc = "docs/index"
include_patterns = ["docs/**", "CONTRIBUTING.md", "CHANGELOG.md", "**/README.md", "bench/results/*.md"]
exclude_patterns = ["README.md", "build", "dist", ".*"]  # folders that are not even looked into
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
smartquotes = False  # "nf4" is what one types
html_theme = "furo"
html_copy_source = False
html_show_copyright = False

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text: |x| is a magnitude, * a product, and `x` is code."""
    for i, line in enumerate(lines):
        parts = re.split(r"(`[^`]+`)", line)
        lines[i] = "".join(f"`{p}`" if p.startswith("`") else re.sub(r"([|*\\_])", r"\\\1", p) for p in parts)


def add_headers(app: Any, docname: str, content: list[str]) -> None:
    if docname == "docs/api/cpp":
        content[0] = content[0].replace(headers.MARK, "\n\n".join(headers.pages()))


def add_start(app: Any, error: Exception | None) -> None:
    if error is None:
        start = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html"><title>{project}</title>\n'
        Path(app.outdir, "index.html").write_text(start)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape, priority=100)
    app.connect("source-read", add_headers)
    app.connect("build-finished", add_start)
