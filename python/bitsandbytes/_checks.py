"""Argument checks with one wording, "<op>: <argument> is <given>, expected <allowed>", for fakes, the default backend
and functional.

A bad value is a ValueError and a wrong kind of object a TypeError. Sizes that may be symbolic while a graph is traced
go through torch._check_value, so that they become guards or run-time assertions instead of breaking the graph.
"""

from collections.abc import Sequence
from typing import Any

import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
STORAGES = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
CODES = 256  # entries of an 8-bit map


def listing(values: Sequence[Any]) -> str:
    return ", ".join(str(v).removeprefix("torch.") for v in values)


def one_of(op: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    if value not in allowed or isinstance(value, float):  # 64.0 == 64
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {listing(allowed)}")


def tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a torch.Tensor")


def odd_layout(value: torch.Tensor) -> str:
    """The layout of a tensor that does not hold its elements as floats or codes in memory; empty if it does."""
    if value.is_nested:
        return "nested"
    return "quantized" if value.is_quantized else "" if value.layout == torch.strided else str(value.layout)


def state(op: str, value: Any) -> None:
    if not hasattr(value, "absmax"):
        raise TypeError(f"{op}: quant_state is {type(value).__name__}, expected a QuantState")
    tensor(op, "quant_state.absmax", value.absmax)


def dtype(op: str, name: str, value: torch.Tensor, *allowed: torch.dtype) -> None:
    if value.dtype not in allowed:
        raise ValueError(f"{op}: {name} has dtype {listing([value.dtype])}, expected {listing(allowed)}")


def same_device(op: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ValueError(f"{op}: {name} is on {value.device}, expected {device}")


def at_least(op: str, name: str, given: int, needed: int, unit: str = "elements") -> None:
    torch._check_value(given >= needed, lambda: f"{op}: {name} has {given} {unit}, expected at least {needed}")


def exactly(op: str, name: str, given: int, expected: int, unit: str = "elements") -> None:
    torch._check_value(given == expected, lambda: f"{op}: {name} has {given} {unit}, expected {expected}")


def equal(op: str, name: str, what: str, given: Any, expected: Any) -> None:
    torch._check_value(given == expected, lambda: f"{op}: {name} has {what} {given}, expected {expected}")


def out_like(op: str, out: torch.Tensor, shape: Sequence[int], out_dtype: torch.dtype, device: torch.device) -> None:
    dtype(op, "out", out, out_dtype)
    same_device(op, device, out=out)
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"{op}: out has shape {tuple(out.shape)}, expected {tuple(shape)}")


def blockwise_blocksize(op: str, blocksize: Any, device: torch.device) -> None:
    """Of 8-bit codes: any on the CPU and in plain torch; CUDA kernels have a list."""
    if device.type == "cuda":
        one_of(op, f"blocksize on {device}", blocksize, BLOCKSIZES)
    elif isinstance(blocksize, bool) or not isinstance(blocksize, int | torch.SymInt) or not 1 <= blocksize < 2**63:
        raise ValueError(f"{op}: blocksize is {blocksize!r}, expected a whole number of 1 or more")


def blocks(n: int, blocksize: int) -> int:
    """Number of blocks of a flat row of n elements; the last may be shorter."""
    return (n + blocksize - 1) // blocksize


def numel(op: str, name: str, shape: Sequence[int]) -> int:
    """Product of the sizes, none of which may be negative."""
    n = 1
    for size in shape:
        torch._check_value(size >= 0, lambda: f"{op}: {name} is {list(shape)}, expected sizes of 0 or more")
        n *= size
    return n
