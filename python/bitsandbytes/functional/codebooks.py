"""The maps from codes to values: 256 entries for 8 bits, 16 for 4 bits, scaled to [-1, 1]."""

import itertools
from collections.abc import Iterable

import torch

from ..backends.utils import CODE

name2qmap: dict[str, torch.Tensor] = {}  # "dynamic": the signed dynamic map on the CPU, made on first use

_ENTRIES = 256


def _check(op: str, ok: bool, name: str, given: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{op}: {name} is {given}, expected {expected}")


def _padded(values: Iterable[float]) -> torch.Tensor:
    """Ascending values, filled up with zeros to 256."""
    values = list(values)
    return torch.tensor(sorted(values + [0.0] * (_ENTRIES - len(values))), dtype=torch.float32)


def create_linear_map(signed: bool = True, total_bits: int = 8, add_zero: bool = True) -> torch.Tensor:
    """2^total_bits equal steps over [-1, 1], or [0, 1] if not signed. Returns 256 fp32 values.

    With `add_zero`, or below 8 bits, a signed map has one step less, so that zero is one of them. Values that 256
    entries leave over are zeros between the lower and the upper half.
    """
    _check("create_linear_map", 1 <= total_bits <= 8, "total_bits", total_bits, "1 to 8")
    steps = 2**total_bits - (1 if signed and (add_zero or total_bits < 8) else 0)
    values = torch.linspace(-1.0 if signed else 0.0, 1.0, steps)
    half = steps // 2
    zeros = torch.zeros(_ENTRIES - steps)
    return torch.cat((values[:half], zeros, values[half:])) if len(zeros) else values


def create_normal_map(offset: float = 0.9677083, use_extra_value: bool = True) -> torch.Tensor:
    """Quantiles of the normal distribution, the idea of NF4 (QLoRA, arXiv 2305.14314). Returns 256 fp32 values,
    ascending.

    `offset` is the probability below the largest value; with `use_extra_value` there are 8 positive values instead of
    7, besides 7 negative ones and zeros.
    """
    _check("create_normal_map", 0.5 < offset < 1, "offset", offset, "between 0.5 and 1")
    positive, negative = (
        torch.special.ndtri(torch.linspace(offset, 0.5, steps)[:-1].double()).tolist()
        for steps in (9 if use_extra_value else 8, 8)
    )
    values = _padded([*positive, *(-v for v in negative)])
    return values / values.max()


def create_fp8_map(
    signed: bool = True, exponent_bits: int = 5, precision_bits: int = 2, total_bits: int = 8
) -> torch.Tensor:
    """Floating point numbers of the given split of bits, subnormals included. Returns 256 fp32 values, ascending.

    Raises:
        ValueError: sign, exponent and precision bits do not add up to total_bits.
    """
    op = "create_fp8_map"
    _check(op, 1 <= total_bits <= 8, "total_bits", total_bits, "1 to 8")
    _check(op, 1 <= exponent_bits <= 7, "exponent_bits", exponent_bits, "1 to 7")
    _check(op, precision_bits >= 0, "precision_bits", precision_bits, "0 or more")
    used = int(signed) + exponent_bits + precision_bits
    _check(op, used == total_bits, "sum of sign, exponent_bits and precision_bits", used, f"total_bits = {total_bits}")
    bias = 2 ** (exponent_bits - 1)
    values = []
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**precision_bits)):
        fraction = mantissa / 2**precision_bits
        value = (1 + fraction) * 2.0 ** (exponent - bias + 1) if exponent else fraction * 2.0**-bias
        values += [value, -value] if signed else [value]
    table = _padded(values)
    return table / table.max()


def create_dynamic_map(signed: bool = True, max_exponent_bits: int = 7, total_bits: int = 8) -> torch.Tensor:
    """Dynamic map (8-bit Optimizers, arXiv 2110.02861, section 1.3). Returns 256 fp32 values, ascending.

    Leading zeros of a code give a power of ten, the bits behind them a linear fraction: each power has twice as many
    fractions as the one below it. Bits that no exponent needs add fractions to the largest power. Zero and one are
    always in the map.

    Raises:
        ValueError: the split of bits does not give 2^total_bits values.
    """
    op = "create_dynamic_map"
    _check(op, 2 <= total_bits <= 8, "total_bits", total_bits, "2 to 8")
    _check(op, 1 <= max_exponent_bits <= 8, "max_exponent_bits", max_exponent_bits, "1 to 8")
    spare_bits = total_bits - 1 - max_exponent_bits
    fractions = [2.0 ** (i + spare_bits + (not signed)) for i in range(max_exponent_bits)]
    rows = list(zip(fractions, range(1 - max_exponent_bits, 1), strict=True))
    if spare_bits > 0:
        rows.append((2**spare_bits - 1, 0))
    values = [0.0, 1.0]
    for count, exponent in rows:
        bounds = torch.linspace(0.1, 1, int(count) + 1)
        means = (10**exponent * (bounds[:-1] + bounds[1:]) / 2.0).tolist()
        values += means + [-m for m in means] if signed else means
    _check(op, len(values) == 2**total_bits, "number of values", len(values), f"{2**total_bits} for this split of bits")
    return _padded(values)


# Maps that are not formats of their own: integers, and AF4 (abnormal floats, arXiv 2306.06965).
# fmt: off
_OTHER_4BIT = {
    "int4": (7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7),
    "af4": (
        1.0, 0.7242486476898193, 0.5549623370170593, 0.4256388247013092, 0.3167566657066345, 0.2196127474308014,
        0.12934483587741852, 0.0427316389977932, 0.0, -0.049348119646310806, -0.14982478320598602,
        -0.25607553124427795, -0.37369510531425476, -0.5124374032020569, -0.6944100856781006, -1.0,
    ),
}
# fmt: on


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
    values = torch.tensor(_OTHER_4BIT[typename], dtype=torch.float32, device=device)
    return values / values.abs().max()
