"""Classes and functions that are another one with some arguments fixed."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")


def _without(
    function: Callable[..., Any], hidden: Sequence[str], defaults: Mapping[str, Any] = MappingProxyType({})
) -> inspect.Signature:
    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if p.name not in hidden]
    return signature.replace(parameters=[p.replace(default=defaults.get(p.name, p.default)) for p in kept])


def fixed(
    base: type, shown: Sequence[str] = (), defaults: Mapping[str, Any] = MappingProxyType({}), **values: Any
) -> Any:
    """The __init__ of a class that is `base` with these values for arguments, which it then lacks.

    Those in `shown` stay among the arguments, where their value means nothing, except that a class of 8 bits takes
    `optim_bits` only at its default. `defaults`: of arguments, where they differ from those of `base`.
    """
    init = base.__init__  # type: ignore[misc]
    taken = _without(init, [name for name in values if name not in shown], defaults)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = taken.bind(self, *args, **kwargs).arguments
        if values.get("optim_bits") == 8:
            only_default(self, given, taken, "optim_bits")
        init(**given | values)

    __init__.__signature__ = taken  # type: ignore[attr-defined]
    __init__.__doc__ = init.__doc__
    return __init__


def fixed_function(base: Callable[..., T], name: str, doc: str, **values: Any) -> Callable[..., T]:
    """The function that is `base` with these values for arguments, which it then lacks."""
    taken, names = _without(base, list(values)), list(inspect.signature(base).parameters)
    first = min(map(names.index, values))
    later = [n for n in names[first:] if n not in values]
    most = first + len(later)

    def function(*args: Any, **kwargs: Any) -> T:
        if len(args) > most:
            raise TypeError(f"{name}() takes at most {most} positional arguments but {len(args)} were given")
        return base(*args[:first], **dict(zip(later, args[first:], strict=False)), **kwargs, **values)

    function.__name__ = function.__qualname__ = name
    function.__module__, function.__doc__ = base.__module__, doc
    function.__signature__ = taken  # type: ignore[attr-defined]
    function.__annotations__ = {n: kind for n, kind in base.__annotations__.items() if n not in values}
    return function


def only_default(self: Any, given: dict[str, Any], signature: inspect.Signature, name: str) -> None:
    if name in given and given[name] != (default := signature.parameters[name].default):
        raise ValueError(f"{type(self).__name__} only supports {name}={default} (default value for compatibility)")


def no_amsgrad(self: Any, amsgrad: bool) -> None:
    if amsgrad:
        raise ValueError(f"{type(self).__name__} does not support amsgrad=True")
