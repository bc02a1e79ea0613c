"""The arguments of an operator, written once: as the fields of a NamedTuple, of which its schema is made.

A field that is a NamedTuple itself stands for its fields. What the operator writes is Annotated with its alias: "a!".
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

T = TypeVar("T", bound=tuple[Any, ...])

_TYPES = {
    str: "str", bool: "bool", int: "int", float: "float", int | None: "int?", Tensor: "Tensor",
    Tensor | None: "Tensor?", Sequence[Tensor]: "Tensor[]", Sequence[int]: "int[]", Sequence[float]: "float[]",
    torch.dtype: "ScalarType", torch.dtype | None: "ScalarType?",
}  # fmt: skip


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "_fields")


def _arguments(fields: type) -> Iterator[str]:
    defaults = fields._field_defaults  # type: ignore[attr-defined]
    for name, kind in get_type_hints(fields, include_extras=True).items():
        if _is_group(kind):
            yield from _arguments(kind)
            continue
        alias = ""
        if get_origin(kind) is Annotated:
            kind, alias = get_args(kind)
        text = _TYPES[kind]
        if alias:
            text = text.replace("Tensor", f"Tensor({alias})")
        if name in defaults:
            default = defaults[name]
            text_of_default = "[]" if default == () else f"{default:g}." if type(default) is float else str(default)
            yield f"{text} {name}={text_of_default}"
        else:
            yield f"{text} {name}"


def schema_of(fields: type, returns: str = "()", *more: str) -> str:
    """`more`: arguments past the fields, as a schema writes them."""
    return f"({', '.join((*_arguments(fields), *more))}) -> {returns}"


@functools.cache
def _kinds(fields: Any) -> tuple[tuple[str, Any], ...]:
    """The fields by name, each with its own type if that is a group, else None."""
    return tuple((name, kind if _is_group(kind) else None) for name, kind in get_type_hints(fields).items())


def gather(fields: type[T], arguments: Sequence[Any]) -> T:
    """The NamedTuple of an operator's arguments by position; those left out at the end have their defaults."""
    rest = iter(arguments)
    missing = object()

    def build(kind: Any) -> Any:
        values = {}
        for name, group in _kinds(kind):
            value = next(rest, missing) if group is None else build(group)
            if value is not missing:
                values[name] = value
        return kind(**values)

    found: T = build(fields)
    if next(rest, missing) is not missing:
        raise TypeError(f"{fields.__name__}: more arguments than fields")
    return found
