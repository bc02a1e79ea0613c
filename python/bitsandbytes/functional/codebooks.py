"""The maps from codes to values: 256 entries for 8 bits, 16 for 4 bits, scaled to [-1, 1]."""

import torch

from .. import _checks as check
from .._codes import CODE

name2qmap: dict[str, torch.Tensor] = {}  # "dynamic": the signed dynamic map on the CPU, made on first use


def _values(name: str, entries: int, **numbers: float) -> torch.Tensor:
    """A map of bnb/codebook.h on the CPU, by the name of its maker and the numbers it takes."""
    out = torch.empty(entries, dtype=torch.float32, device="cpu")
    torch.ops.bitsandbytes.create_map.default(out, name, [float(n) for n in numbers.values()])
    return out


def _map(name: str, **numbers: float) -> torch.Tensor:
    for argument, value in numbers.items():
        if not isinstance(value, int | float if argument == "offset" else int) or abs(value) > 1000:
            kind = "a number between 0.5 and 1" if argument == "offset" else "a small whole number"
            raise ValueError(f"create_{name}_map: {argument} is {value!r}, expected {kind}")
    return _values(name, check.CODES, **numbers).to(torch.get_default_device())  # where torch.tensor would make it


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """2^total_bits equal steps over [-1, 1], or [0, 1] if not signed. Returns 256 fp32 values.

    With `add_zero`, or below 8 bits, a signed map has one step less, so that zero is one of them. Values that 256
    entries leave over are zeros between the lower and the upper half.

    Raises:
        ValueError: total_bits is none of 1 to 8.
    """
    return _map("linear", signed=bool(signed), total_bits=total_bits, add_zero=bool(add_zero))


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Quantiles of the normal distribution, the idea of NF4 (QLoRA, arXiv 2305.14314). Returns 256 fp32 values,
    ascending.

    `offset` is the probability below the largest value; with `use_extra_value` there are 8 positive values instead of
    7, besides 7 negative ones and zeros.

    Raises:
        ValueError: offset is not between 0.5 and 1.
    """
    return _map("normal", offset=offset, use_extra_value=bool(use_extra_value))


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """Floating point numbers of the given split of bits, subnormals included. Returns 256 fp32 values, ascending.

    Raises:
        ValueError: sign, exponent and precision bits do not add up to total_bits, or do not make a map.
    """
    return _map(
        "fp8",
        signed=bool(signed),
        exponent_bits=exponent_bits,
        precision_bits=precision_bits,
        total_bits=total_bits,
    )


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """Dynamic map (8-bit Optimizers, arXiv 2110.02861, section 1.3). Returns 256 fp32 values, ascending.

    Leading zeros of a code give a power of ten, the bits behind them a linear fraction: each power has twice as many
    fractions as the one below it. Bits that no exponent needs add fractions to the largest power. Zero and one are
    always in the map.

    Raises:
        ValueError: the split of bits does not give 2^total_bits values.
    """
    return _map("dynamic", signed=bool(signed), max_exponent_bits=max_exponent_bits, total_bits=total_bits)


_OTHER_4BIT = ("int4", "af4")  # integers, and abnormal floats (arXiv 2306.06965): maps that are not formats


def get_4bit_type(typename: str, device: torch.device | str | None = None, blocksize: int = 64) -> torch.Tensor:
    """The 16 values of "nf4", "fp4", "int4" or "af4" in code order, fp32. `device` None: the GPU where there is one,
    else the CPU.

    Raises:
        NotImplementedError: an unknown name, or af4 with a blocksize other than 64.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if typename == "af4" and blocksize != 64:
        raise NotImplementedError(f"get_4bit_type: blocksize is {blocksize}, expected 64 for af4")
    if typename in CODE:
        return CODE[typename].to(device, copy=True, non_blocking=True)  # constants need not be waited for
    if typename not in _OTHER_4BIT:
        known = ", ".join([*CODE, *_OTHER_4BIT])
        raise NotImplementedError(f"get_4bit_type: typename is {typename!r}, expected one of {known}")
    return _values(typename, 16).to(device)
