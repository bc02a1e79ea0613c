"""What backends in Python share: how kernels are registered, also those that raise."""

import functools
import re
from collections.abc import Callable
from typing import Any

from .._ops import SCHEMAS, register_kernel
from ..cextension import BNBNativeLibrary, ErrorHandlerMockBNBNativeLibrary, Native


def refuse_without(library: BNBNativeLibrary, native: Native) -> None:
    """If the library could not be loaded, its operators raise the sentence that says why."""
    if isinstance(library, ErrorHandlerMockBNBNativeLibrary):
        for name in native.missing():
            register_kernel(f"bitsandbytes::{name}", native.device_type)(library.fail)


def default_kernel(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a kernel for devices without one of their own. None in place of a tensor arrives here too."""
    name = op.removeprefix("bitsandbytes::")
    tensors = [(place, argument) for place, argument in _arguments(SCHEMAS[name]) if argument]

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(kernel)
        def checked(*arguments: Any) -> Any:
            for place, argument in tensors:
                if arguments[place] is None:
                    raise ValueError(f"{name.partition('.')[0]}: {argument} is None, expected a Tensor")
            return kernel(*arguments)

        register_kernel(op, "default")(checked)
        return kernel

    return register


def _arguments(schema: str) -> list[tuple[int, str]]:
    """The place of each argument and, if it must be a tensor, its name."""
    inside = schema[1 : schema.index(") ->")]
    found = [re.fullmatch(r"\s*Tensor(?:\(\w+!\)|!)? (\w+)", argument) for argument in inside.split(",")]
    return [(place, match[1] if match else "") for place, match in enumerate(found)]
