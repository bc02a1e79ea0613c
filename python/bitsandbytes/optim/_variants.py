"""Classes that are another one with some arguments fixed."""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any


def fixed(
    base: type, shown: Sequence[str] = (), defaults: Mapping[str, Any] = MappingProxyType({}), **values: Any
) -> Any:
    """The __init__ of a class that is `base` with these values for arguments, which it then lacks.

    Those in `shown` stay among the arguments, where their value means nothing; but for a class of 8 bits `optim_bits`
    must be left at its default there. `defaults`: of arguments, where they are others than in `base`.
    """
    init = base.__init__  # type: ignore[misc]
    parameters = inspect.signature(init).parameters
    hidden = [name for name in values if name not in shown]
    taken = inspect.Signature(
        [p.replace(default=defaults.get(p.name, p.default)) for p in parameters.values() if p.name not in hidden]
    )

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = taken.bind(self, *args, **kwargs).arguments
        if values.get("optim_bits") == 8:
            only_default(self, given, taken, "optim_bits")
        init(**given | values)

    __init__.__signature__ = taken  # type: ignore[attr-defined]
    __init__.__doc__ = init.__doc__
    return __init__


def only_default(self: Any, given: dict[str, Any], signature: inspect.Signature, name: str) -> None:
    if name in given and given[name] != (default := signature.parameters[name].default):
        raise ValueError(f"{type(self).__name__} only supports {name}={default} (default value for compatibility)")


def no_amsgrad(self: Any, amsgrad: bool) -> None:
    if amsgrad:
        raise ValueError(f"{type(self).__name__} does not support amsgrad=True")
