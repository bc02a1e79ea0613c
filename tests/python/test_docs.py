"""The documentation is true: its code runs, its links lead somewhere, its names exist, nothing public is left out."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import bitsandbytes as bnb

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
LIBRARY = ROOT / "build" / "release" / "libbnb.a"


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


headers = _load(DOCS / "headers.py")
FENCE = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
DIRECTIVES = {"{eval-rst}", "{toctree}"}  # of Sphinx; the tests of names and of pages read them


@dataclass
class Block:
    page: Path
    line: int
    language: str
    code: str
    output: str | None  # of a block that is followed by ```text

    def __str__(self) -> str:
        return f"{name(self.page)}:{self.line}"


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    fences = list(FENCE.finditer(text))
    for i, match in enumerate(fences):
        following = fences[i + 1] if i + 1 < len(fences) else None
        shown = following is not None and following[2] == "text" and not text[match.end() : following.start()].strip()
        yield Block(page, text[: match.start()].count("\n") + 1, match[2], match[3], following[3] if shown else None)


def all_blocks(language: str) -> list[Block]:
    return [block for page in [ROOT / "README.md", *PAGES] for block in blocks(page) if block.language == language]


# ---- code


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    kinds = {"python", "bash", "c", "cpp", "cmake", "text", *DIRECTIVES}
    for page in [*TEXTS, *PAGES]:
        for block in blocks(page):
            assert block.language in kinds, f"{block}: a block of {block.language!r}, expected one of {sorted(kinds)}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the pages call `path`: the folder of a small language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=128)
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("page", [p for p in [ROOT / "README.md", *PAGES] if "```python" in p.read_text()], ids=name)
def test_python(page: Path, checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, as a reader would run them, and print what the page shows."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__", "path": checkpoint}
    try:
        for block in blocks(page):
            if block.language != "python":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * block.line + block.code, str(page), "exec"), names)
            if block.output is not None:
                assert printed.getvalue() == block.output, f"{block} prints {printed.getvalue()!r}"
    finally:
        bnb.optim.GlobalOptimManager.get_instance().initialize()
        torch.use_deterministic_algorithms(False)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", all_blocks("cpp") + all_blocks("c"), ids=str)
def test_cpp(block: Block, tmp_path: Path) -> None:
    """A program compiles, runs and prints what the page shows."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not LIBRARY.is_file():
        pytest.skip(f"no C++ compiler, or no {LIBRARY.relative_to(ROOT)} (./dev build makes it)")
    source, compiled, program = tmp_path / f"program.{block.language}", tmp_path / "program.o", tmp_path / "program"
    source.write_text(block.code)
    standard = ["-std=c++20"]
    if block.language == "c":
        standard = ["-x", "c", "-std=c99", "-pedantic"]
    command = [compiler, *standard, "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'include'}"]
    for step in (
        [*command, "-c", str(source), "-o", str(compiled)],
        [compiler, str(compiled), str(LIBRARY), "-pthread", "-o", str(program)],
    ):
        built = subprocess.run(step, capture_output=True, text=True)
        assert built.returncode == 0, f"{block}: {built.stderr}"
    ran = subprocess.run([str(program)], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert ran.returncode == 0, f"{block}: {ran.stderr}"
    if block.output is not None:
        assert ran.stdout == block.output


@pytest.mark.parametrize("block", all_blocks("cmake"), ids=str)
def test_cmake(block: Block) -> None:
    """What tests/package/check_package.py installs, builds and runs has the same lines."""
    built = (ROOT / "tests" / "package" / "app" / "CMakeLists.txt").read_text().splitlines()
    for line in block.code.splitlines():
        assert line in built, f"{block}: {line!r} is not in tests/package/app/CMakeLists.txt"


# What is not run: it would install, build or test for minutes, or needs a GPU. It is parsed, and what it names exists.
COMMANDS = {
    "./dev": r"(?!help)\w+",
    "pip": "install",
    "python": r"-m \w+|examples/\w+\.py",
    "cmake": r"-S|--build|--install",
    "ctest": "--test-dir",
    "torchrun": r"--",
    "export": r"\w+=",
    "git": "clone|log|rebase",
    "cd": ".",
}


def logical_lines(script: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", " ", script)
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines()) if line]


@pytest.mark.parametrize("block", all_blocks("bash"), ids=str)
def test_bash(block: Block) -> None:
    parsed = subprocess.run(["bash", "-n"], input=block.code, capture_output=True, text=True)
    assert parsed.returncode == 0, f"{block}: {parsed.stderr}"
    usage = (ROOT / "dev").read_text()
    options = usage + "".join(p.read_text() for p in sorted((ROOT / "bench").glob("*.py")))
    for line in (part.strip() for full in logical_lines(block.code) for part in full.split("&&")):
        words = re.sub(r"^(\w+=\S+ )+", "", line).split()
        program = words[0].removeprefix(".venv/bin/")
        assert program in COMMANDS, f"{block}: {program!r} is not known to this test"
        rest = " ".join(words[1:])
        assert re.match(COMMANDS[program], rest), f"{block}: {line}"
        if program == "./dev":
            assert re.search(rf"^  {words[1]}\)|^  {words[1]} ", usage, re.MULTILINE), f"{block}: no ./dev {words[1]}"
            for option in re.findall(r"--[\w-]+", rest):
                assert option in options, f"{block}: ./dev {words[1]} knows no {option}"
        for file in re.findall(r"(?:examples|tests|bench)/[\w./]+", rest):
            assert (ROOT / file).exists(), f"{block}: no {file}"
        for variable in re.findall(r"(?:cmake\.define\.|-D)(\w+)=", rest):
            known = variable.startswith("CMAKE_") or variable in (ROOT / "CMakeLists.txt").read_text()
            assert known, f"{block}: no CMake option {variable}"
        if module := re.match(r"-m (\w+)", rest) if program == "python" else None:
            assert importlib.util.find_spec(module[1]), f"{block}: no module {module[1]}"


# ---- links


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as Sphinx and code hosts make them."""
    titles = re.findall(r"^#+ +(.+?) *$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_site_lists_every_page() -> None:
    found: set[Path] = {DOCS / "index.md"}
    for page in PAGES:
        for block in blocks(page):
            if block.language == "{toctree}":
                entries = [line for line in block.code.splitlines() if line and not line.startswith(":")]
                found |= {(page.parent / f"{entry}.md").resolve() for entry in entries}
    assert set(PAGES) <= found
    for page in found:
        assert page.is_file(), f"the site lists {name(page)}, which does not exist"


@pytest.mark.parametrize("page", [*TEXTS, *PAGES], ids=name)
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{name(page)}: {link} leads to no file"
        if anchor:
            assert anchor in anchors(file), f"{name(page)}: {link} leads to no heading of {name(file)}"


@pytest.mark.parametrize("page", [*TEXTS, *PAGES], ids=name)
def test_lines_are_wrapped(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return
    for number, line in enumerate(page.read_text().splitlines(), 1):
        assert len(line) <= 120 or line.startswith("|"), f"{name(page)}:{number} has {len(line)} columns"


# ---- names


def spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))


def exists(path: str) -> bool:
    parts = path.split(".")
    value: Any = None
    for i in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        for part in parts[i:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


def documented() -> list[str]:
    pages = sorted((DOCS / "api").glob("*.md"))
    return [
        found for page in pages for found in re.findall(r"^\.\. auto\w+:: ([\w.]+)$", page.read_text(), re.MULTILINE)
    ]


def test_reference_names_what_exists_once_and_everything_public() -> None:
    listed = documented()
    assert len(listed) == len(set(listed))
    for path in listed:
        assert exists(path), f"the reference names {path}, which does not exist"
    left_out = {f"bitsandbytes.functional.{value}" for value in ("FIRST_CUDA_DEVICE", "lib", "name2qmap")}
    for module in (bnb.nn, bnb.optim, bnb.functional):
        for public in module.__all__:
            path = f"{module.__name__}.{public}"
            if not public.startswith("_") and not isinstance(getattr(module, public), ModuleType):
                assert path in listed or path in left_out, f"{path} is public and not in the reference"


def test_reference_has_text_for_everything() -> None:
    for path in documented():
        module, _, last = path.rpartition(".")
        assert getattr(importlib.import_module(module), last).__doc__, f"{path} has no docstring"


@pytest.mark.parametrize("page", [*TEXTS[:2], *PAGES], ids=name)
def test_names_in_the_text_exist(page: Path) -> None:
    for span in spans(page):
        if match := re.fullmatch(r"(?:bnb|bitsandbytes)((?:\.\w+)+)(?:\(.*\))?", span):
            assert exists("bitsandbytes" + match[1]), f"{name(page)} names {span}"
        elif match := re.fullmatch(r"bnb::([\w:]+)(?:[({].*)?", span):
            for part in match[1].split("::"):
                assert part in headers.symbols(), f"{name(page)} names {span}, which no header declares"
        elif match := re.fullmatch(r"(?:src|tests|python|include|bench|examples|docs|requirements)/[\w./]*", span):
            assert (ROOT / span).exists() or "NAME" in span, f"{name(page)} names {span}"


def test_header_reference_has_every_declaration() -> None:
    """The pieces of a header, put together again, are the header."""
    text = "\n\n".join(headers.pages())
    for header in headers.headers():
        head, pieces = headers.entries(header)
        assert head, f"{header.name} has no text at its head"
        lines = headers.plain(header.read_text()).splitlines()
        code = [line for line in lines if re.search(r"[;{]", re.sub(r"//.*|^/?\s?\*.*", "", line))]
        kept = "\n".join(piece for _, piece in pieces)
        for line in code:
            if not re.match(r'namespace|extern "C"|\}|#', line):
                assert line in kept, f"{header.name}: the reference lacks {line!r}"
        assert f"## `<bnb/{header.name}>`" in text
    for wanted in ("gemm_4bit", "GemmInt8", "OptimizerStep", "create_dynamic_map", "set_parallel_for"):
        assert re.search(rf"^### .*`{wanted}`", text, re.MULTILINE)


def test_readme_fits_its_screen() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    assert "CUDA" in "\n".join(text.splitlines()[:30])


def test_readme_shows_what_was_measured() -> None:
    """Its numbers are those of the page of measurements, and these come from the results of the run."""

    def rows(page: Path) -> list[list[str]]:
        table = re.search(r"^\| Operation \| ms \| Ratio \|\n\|[-:| ]+\n((?:\|.*\n)+)", page.read_text(), re.MULTILINE)
        assert table, f"{name(page)} has no table of measurements"
        return [re.findall(r"\d+(?:\.\d+)?", row.split("|", 2)[2]) for row in table[1].splitlines()]

    measured = rows(DOCS / "measurements.md")
    shown = rows(ROOT / "README.md")
    assert len(shown) == 6
    for numbers in shown:
        assert any(set(numbers) <= set(row) for row in measured), f"README.md shows {numbers}, which was not measured"

    text = (ROOT / "bench" / "results" / "intel-xeon-6-model-167-amx.md").read_text()
    results = [float(number) for number in re.findall(r"\| (\d+(?:\.\d+)?) (?=\|)", text)]
    for numbers in measured[:4]:
        for number in numbers:
            unit = 10.0 ** -len(number.partition(".")[2])  # results are rounded too
            assert any(abs(x - float(number)) < 0.6 * unit for x in results), f"no result of the run is {number}"


def test_settings_page_has_every_variable() -> None:
    """Those that users set; each is named where code reads it."""
    page = (DOCS / "settings.md").read_text()
    read = set()
    for file in [*(ROOT / "src").rglob("*.cpp"), *(ROOT / "python" / "bitsandbytes").rglob("*.py")]:
        text = file.read_text()
        read |= set(re.findall(r'getenv\("(BNB_\w+)"', text)) | set(
            re.findall(r'environ(?:\.get\(|\[)"(BNB_\w+)"', text)
        )
    assert read, "no variable is found"
    for variable in read:
        assert f"`{variable}`" in page, f"docs/settings.md lacks {variable}"


def test_python_blocks_parse_alone() -> None:
    """Also where the test of a page stops at an earlier block."""
    for block in all_blocks("python"):
        ast.parse(block.code)
