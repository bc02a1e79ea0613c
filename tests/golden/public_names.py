"""What the released package and its description of its own interface call by name, one line a name:

    functional.quantize_4bit (A, absmax=None, out=None, ...)
    nn.modules.Linear4bit class(torch.nn.Linear)
    nn.modules.Linear4bit.forward (self, x)

A line of the release has kinds, order and defaults of parameters; one of the description their names, in order.

    REFERENCE_PYTHON tests/golden/public_names.py SEED.txt > tests/golden/public_names.txt

SEED.txt is the Markdown description. tests/python/test_public_names.py compares the package under test with it."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

PACKAGE = "bitsandbytes"
# Python's own, and what dataclasses, pickle and typing make.
_NO_MEMBER = re.compile(
    r"__(doc|module|dict|weakref|annotations\w*|annotate\w*|abstractmethods|parameters|orig_bases|static_attributes|qualname"
    r"|firstlineno|hash|match_args|slots|dataclass\w+|repr|eq|replace|signature)__|_abc_impl"
)


def names_of_modules() -> list[str]:
    """All modules of the installed package that can be imported here."""
    root, found = importlib.import_module(PACKAGE), [PACKAGE]
    for info in pkgutil.walk_packages(root.__path__, PACKAGE + ".", onerror=lambda name: None):
        if info.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(info.name)
        except Exception:  # noqa: BLE001 - a backend whose device or library is not here
            continue
        found.append(info.name)
    return found


def text_of_default(value: Any) -> str:
    if inspect.isclass(value) or inspect.isfunction(value):
        return str(value.__name__)
    return repr(value)


def signature(function: Any) -> str:
    """Parameters with kinds and defaults, without annotations."""
    try:
        given = inspect.signature(function)
    except (TypeError, ValueError):
        return "callable"
    parameters = []
    for p in given.parameters.values():
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        if p.default is not p.empty:
            text += f"={text_of_default(p.default)}"
        parameters.append((p.kind, text))
    out: list[str] = []
    for i, (kind, text) in enumerate(parameters):
        if kind == inspect.Parameter.KEYWORD_ONLY and all(
            k not in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL) for k, _ in parameters[:i]
        ):
            out.append("*")
        out.append(text)
        last_positional = kind == inspect.Parameter.POSITIONAL_ONLY and (
            i + 1 == len(parameters) or parameters[i + 1][0] != inspect.Parameter.POSITIONAL_ONLY
        )
        if last_positional:
            out.append("/")
    return f"({', '.join(out)})"


def is_ours(value: Any) -> bool:
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", "")
    return str(name).split(".")[0] == PACKAGE


def text_of(value: Any) -> str:
    value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
    if inspect.ismodule(value):
        return "module"
    if inspect.isclass(value):
        named = [b for b in value.__mro__[1:] if b is not object and not (is_ours(b) and b.__name__[0] == "_")]
        return f"class({', '.join(sorted(b.__name__ for b in named))})"
    return signature(value) if callable(value) else "value"


def members(cls: type) -> Iterator[tuple[str, str]]:
    """What the class or a base of this package defines."""
    if issubclass(cls, torch.autograd.Function):
        return  # torch alone calls them
    seen = set()
    for base in cls.__mro__:
        for name, value in vars(base).items() if is_ours(base) else ():
            if name not in seen and not _NO_MEMBER.fullmatch(name):
                seen.add(name)
                yield name, text_of(value)


def is_named(module: types.ModuleType, name: str, value: Any) -> bool:
    """Whether it is a name of the package, and no tool that a module imports or makes for itself."""
    if name == "_" or (name.startswith("__") and name not in ("__version__", "__pdoc__")):
        return False
    # What backends share among themselves is no interface: operators are (torch.ops.bitsandbytes).
    if module.__name__.startswith(f"{PACKAGE}.backends."):
        return name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    if inspect.ismodule(value):
        return (module.__name__ == PACKAGE and is_ours(value)) or value.__name__ == f"{module.__name__}.{name}"
    if inspect.isclass(value) or isinstance(value, types.FunctionType):
        return is_ours(value)
    return type(value).__module__ not in ("typing", "logging", "__future__") and (not callable(value) or is_ours(value))


def describe(modules: list[str]) -> dict[str, str]:
    """Every name of these modules, and of the classes that they define."""
    lines: dict[str, str] = {}
    for module_name in modules:
        module = importlib.import_module(module_name)
        prefix = module_name.removeprefix(PACKAGE).lstrip(".")
        if prefix:
            lines[prefix] = "module"
        for name, value in vars(module).items():
            if not is_named(module, name, value):
                continue
            key = f"{prefix}.{name}".lstrip(".")
            lines[key] = text_of(value)
            if inspect.isclass(value) and value.__module__ == module_name:
                lines.update((f"{key}.{member}", text) for member, text in members(value))
    return lines


def look_up(key: str) -> str | None:
    """The text of one name here; None if it does not exist."""
    value: Any = importlib.import_module(PACKAGE)
    for name in key.split("."):
        try:
            value = inspect.getattr_static(value, name) if inspect.isclass(value) else getattr(value, name)
        except AttributeError:
            if not inspect.ismodule(value):
                return None
            try:
                value = importlib.import_module(f"{value.__name__}.{name}")
            except ImportError:
                return None
    return text_of(value)


def accepts(key: str, names: list[str]) -> bool:
    """Whether the function or class here has these parameters, in this order."""
    value: Any = importlib.import_module(PACKAGE)
    for name in key.split("."):
        value = getattr(value, name)
    own = iter(inspect.signature(value).parameters)
    return all(name in own for name in names)


def read_names() -> dict[tuple[str, str], str]:
    """By source ("released" or "seed") and name."""
    lines = (Path(__file__).parent / "public_names.txt").read_text().splitlines()
    return {(source, key): text for source, key, text in (line.split(" ", 2) for line in lines)}


# ---- the description


def names_of_seed(text: str) -> dict[str, str]:
    """Signatures that stand in blocks of code, and names in tables and headings, by the place the text gives them."""
    lines: dict[str, str] = {}
    places = {"F": "functional", "bnb": "", PACKAGE: ""}
    for block in re.findall(r"```\w*\n(.*?)```", text, re.S):
        for head, arguments in re.findall(r"^(?:class )?([\w.]+)\(((?:[^()]|\([^()]*\))*)\)", block, re.M):
            root, _, rest = head.partition(".")
            if root not in places or not rest or ".get_instance" in head:
                continue
            key = f"{places[root]}.{rest}".lstrip(".")
            try:
                parsed = ast.parse(f"def f({arguments}): ...").body[0]
            except SyntaxError:
                continue
            assert isinstance(parsed, ast.FunctionDef)
            lines[key] = " ".join(["accepts", *(a.arg for a in parsed.args.args + parsed.args.kwonlyargs)])
    module = ""
    for line in text.splitlines():
        if found := re.match(r"\*\*(?:Module|Import path):\*\* `(?:from |import )?bitsandbytes\.?([\w.]*)", line):
            module = found[1]
        elif re.match(r"## ", line):
            module = {"## 1.": "", "## 11": "functional"}.get(line[:5], module)
        for cell in re.findall(r"^(?:\| |####? )`([\w.]+)`", line):
            name = cell.removeprefix("bnb.").removeprefix("bitsandbytes.")
            if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", name) and not re.search(r"backends|::", line):
                lines.setdefault(f"{module}.{name}".lstrip(".") if "." not in name else name, "name")
        if line.startswith("- `bitsandbytes."):
            for name in re.findall(r"`([\w.*]+)`", line):
                head, _, last = name.removeprefix("bitsandbytes.").rpartition(".")
                if "." in name:
                    module = head
                if last and "*" not in name:
                    lines.setdefault(f"{module}.{last}".lstrip("."), "name")
    # Names that the text gives no place, or a second one, and parameters that it lists like names.
    autograd = {k for k in lines if k.startswith("autograd.")}
    placed = {k.rpartition(".")[2] for k, v in lines.items() if v != "name"}
    vague = {k for k, v in lines.items() if v == "name" and k.rpartition(".")[2] in placed} - autograd
    vague |= {k for k in lines if k.startswith("backends.") or k.endswith(".out")}
    options = "optim_bits min_8bit_size percentile_clipping block_wise max_unorm skip_zeros is_paged"
    vague |= {f"optim.{name}" for name in options.split()}
    return {k: v for k, v in lines.items() if k not in vague}


if __name__ == "__main__":
    print("\n".join(f"released {k} {v}" for k, v in sorted(describe(names_of_modules()).items())))
    print("\n".join(f"seed {k} {v}" for k, v in sorted(names_of_seed(Path(sys.argv[1]).read_text()).items())))
