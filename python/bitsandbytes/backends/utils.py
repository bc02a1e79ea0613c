"""What backends in Python share: the 4-bit maps as data, and kernels that raise."""

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from .._ops import SCHEMAS, register_kernel
from ..cextension import BNBNativeLibrary, ErrorHandlerMockBNBNativeLibrary, Native

# fmt: off
_NF4 = (  # QLoRA, arXiv 2305.14314, appendix E: quantiles of the normal distribution
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
_FP4 = (  # sign, two exponent bits, one mantissa bit, scaled to a largest value of 1
    0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25,
    0.0, -0.0052083334885537624, -2 / 3, -1.0, -1 / 3, -0.5, -1 / 6, -0.25,
)

# Decision thresholds on t = x / absmax, ascending, part of the format and not all midpoints. A value takes the code at
# the number of thresholds strictly below t; NaN is above all of them.
THRESHOLDS = {
    "nf4": (
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ),
    "fp4": (
        -0.8333333730697632, -0.5833333730697632, -0.4166666865348816, -0.2916666865348816, -0.2083333432674408,
        -0.0859375, -0.0026041667442768812, 0.0, 0.0026041667442768812, 0.0859375, 0.2083333432674408,
        0.2916666865348816, 0.4166666865348816, 0.5833333730697632, 0.8333333730697632,
    ),
}
CODES_BY_THRESHOLD = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
# fmt: on

CODE = {name: torch.tensor(values, dtype=torch.float32) for name, values in (("nf4", _NF4), ("fp4", _FP4))}


@functools.cache
def _get_4bit_code(quant_type: str, device: torch.device) -> torch.Tensor:
    return CODE[quant_type].to(device)


def nearest_codes(t: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """The index of the nearest of 256 ascending values; a tie goes to the even one, NaN to the last. uint8."""
    middle = (code[1:] + code[:-1]) * 0.5
    codes = torch.bucketize(t.contiguous(), middle)  # NaN comes last
    at = middle[codes.clamp(max=len(middle) - 1)]
    codes += (t == at) & (codes % 2 == 1)
    return codes.to(torch.uint8)


def refuse_without(library: BNBNativeLibrary, native: Native) -> None:
    """If the library could not be loaded, its operators raise the sentence that says why."""
    if isinstance(library, ErrorHandlerMockBNBNativeLibrary):
        for name in native.missing():
            register_kernel(f"bitsandbytes::{name}", native.device_type)(library.fail)


def default_kernel(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a kernel for devices without one of their own. None in place of a tensor comes here too."""
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
