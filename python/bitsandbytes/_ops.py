"""The operators: schemas and shape functions. Kernels live in backends/ and in the native library.

A backend for another device registers its kernels with ``register_kernel("bitsandbytes::<op>", "<device type>")`` from
here, and is found through the entry-point group ``bitsandbytes.backends``. A device without a kernel of its own gets
backends/default.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.library import register_fake, register_kernel

from . import _checks as check
from . import _ops_int8, _ops_optim

__all__ = ["SCHEMAS", "register_fake", "register_kernel"]

_QUANTIZED_4BIT = "Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype"
_BLOCKWISE = "Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype"
_GEMV = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize"
_GEMM = "Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type"
_LINEAR = "Tensor A, Tensor B, Tensor absmax, int layout, Tensor? bias"
_NESTED_SCALES = "Tensor absmax_8bit, Tensor absmax_code, Tensor absmax_offset"
_NESTED = "Tensor? bias=None, Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None"

# Part of the public contract: backends of other projects implement exactly these.
SCHEMAS = {
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "dequantize_4bit": f"({_QUANTIZED_4BIT}) -> Tensor",
    "dequantize_4bit.out": f"({_QUANTIZED_4BIT}, Tensor! out) -> ()",
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": f"({_BLOCKWISE}) -> Tensor",
    "dequantize_blockwise.out": f"({_BLOCKWISE}, Tensor! out) -> ()",
    "gemv_4bit": f"({_GEMV}) -> Tensor",
    "gemv_4bit.out": f"({_GEMV}, Tensor! out) -> ()",
    # Nested absmax: `absmax` then holds the scales of absmax_8bit, one per 256 codes, and
    # absmax[i] = absmax_code[absmax_8bit[i]] * scale[i // 256] + absmax_offset.
    "gemm_4bit": f"({_GEMM}, {_NESTED}) -> Tensor",
    # Not part of it: gemm_4bit as Linear4bit calls it, with linear_4bit_layout for what it has in five arguments. Each
    # argument, also one that is absent, takes its time.
    "linear_4bit": f"({_LINEAR}=None) -> Tensor",
    "linear_4bit.nested": f"({_LINEAR}, {_NESTED_SCALES}) -> Tensor",
    # Below autograd: for callers that looked at derivatives_wanted() of _derivatives.py, as the others do themselves.
    "linear_4bit.forward": f"({_LINEAR}=None) -> Tensor",
    "linear_4bit.nested_forward": f"({_LINEAR}, {_NESTED_SCALES}) -> Tensor",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"bitsandbytes::{_name}", _schema)

# Made on the CPU, whatever device the map is for: `numbers` are the arguments of the maker in bnb/codebook.h.
CPU_SCHEMAS = {"create_map": "(Tensor! out, str name, float[] numbers) -> ()"}

for _name, _schema in CPU_SCHEMAS.items():
    torch.library.define(f"bitsandbytes::{_name}", _schema)

SCHEMAS |= _ops_int8.SCHEMAS | _ops_optim.SCHEMAS  # defined there


def check_packed(op: str, name: str, packed: torch.Tensor, n: int) -> None:
    """`packed`, of any storage dtype, must hold the 4-bit codes of n elements and nothing else."""
    check.dtype(op, name, packed, *check.STORAGES)
    item = packed.element_size()
    check.exactly(op, name, packed.numel() * item, check.blocks((n + 1) // 2, item) * item, "bytes")


def check_absmax(op: str, absmax: torch.Tensor, n: int, blocksize: int) -> None:
    check.one_of(op, "blocksize", blocksize, check.BLOCKSIZES)
    check.dtype(op, "absmax", absmax, torch.float32)
    check.exactly(op, "absmax", absmax.numel(), check.blocks(n, blocksize))


def check_code(op: str, code: torch.Tensor, entries: int = check.CODES) -> None:
    check.dtype(op, "code", code, torch.float32)
    check.equal(op, "code", "size", code.numel(), entries)


@register_fake("bitsandbytes::create_map")
def _(out: torch.Tensor, name: str, numbers: Sequence[float]) -> None:
    check.dtype("create_map", "out", out, torch.float32)


@register_fake("bitsandbytes::quantize_4bit")
def _(
    A: torch.Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    check.dtype("quantize_4bit", "A", A, *check.FLOATS)
    check.one_of("quantize_4bit", "blocksize", blocksize, check.BLOCKSIZES)
    check.one_of("quantize_4bit", "quant_type", quant_type, check.QUANT_TYPES)
    rows = storage_rows(A.numel(), quant_storage)
    return A.new_empty((rows, 1), dtype=quant_storage), A.new_empty(
        (check.blocks(A.numel(), blocksize),), dtype=torch.float32
    )


def storage_rows(n: int, quant_storage: torch.dtype) -> int:
    """Elements of `quant_storage` that hold the codes of n elements; bytes behind the last code are zero."""
    check.one_of("quantize_4bit", "quant_storage", quant_storage, check.STORAGES)
    return ((n + 1) // 2 + quant_storage.itemsize - 1) // quant_storage.itemsize


def check_dequantize_4bit(
    op: str,
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> None:
    check.one_of(op, "quant_type", quant_type, check.QUANT_TYPES)
    check.one_of(op, "dtype", dtype, check.FLOATS)
    n = check.numel(op, "shape", shape)
    check_packed(op, "A", A, n)
    check_absmax(op, absmax, n, blocksize)
    check.same_device(op, A.device, absmax=absmax)


@register_fake("bitsandbytes::dequantize_4bit")
def _(
    A: torch.Tensor, absmax: torch.Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    check_dequantize_4bit("dequantize_4bit", A, absmax, blocksize, quant_type, shape, dtype)
    return A.new_empty(shape, dtype=dtype)


@register_fake("bitsandbytes::dequantize_4bit.out")
def _(
    A: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    check_dequantize_4bit("dequantize_4bit", A, absmax, blocksize, quant_type, shape, dtype)
    check.out_like("dequantize_4bit", out, shape, dtype, A.device)


@register_fake("bitsandbytes::quantize_blockwise")
def _(A: torch.Tensor, code: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    check.dtype("quantize_blockwise", "A", A, *check.FLOATS)
    check.blockwise_blocksize("quantize_blockwise", blocksize, A.device)
    check_code("quantize_blockwise", code)
    check.same_device("quantize_blockwise", A.device, code=code)
    absmax = A.new_empty((check.blocks(A.numel(), blocksize),), dtype=torch.float32)
    return torch.empty_like(A, dtype=torch.uint8, memory_format=torch.contiguous_format), absmax


def check_dequantize_blockwise(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype
) -> None:
    op = "dequantize_blockwise"
    check.dtype(op, "A", A, torch.uint8)
    check.one_of(op, "dtype", dtype, check.FLOATS)
    check.blockwise_blocksize(op, blocksize, A.device)
    check.dtype(op, "absmax", absmax, torch.float32)
    check.exactly(op, "absmax", absmax.numel(), check.blocks(A.numel(), blocksize))
    check_code(op, code)
    check.same_device(op, A.device, absmax=absmax, code=code)


@register_fake("bitsandbytes::dequantize_blockwise")
def _(A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype) -> torch.Tensor:
    check_dequantize_blockwise(A, absmax, code, blocksize, dtype)
    return torch.empty_like(A, dtype=dtype, memory_format=torch.contiguous_format)


@register_fake("bitsandbytes::dequantize_blockwise.out")
def _(
    A: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, blocksize: int, dtype: torch.dtype, out: torch.Tensor
) -> None:
    check_dequantize_blockwise(A, absmax, code, blocksize, dtype)
    check.out_like("dequantize_blockwise", out, A.shape, dtype, A.device)


def check_product(op: str, A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int]) -> int:
    """A [..., K] times the transpose of a packed weight of shapeB = [N, K]; the number of weights is returned."""
    check.dtype(op, "A", A, *check.FLOATS)
    if len(shapeB) != 2:
        raise ValueError(f"{op}: shapeB is {list(shapeB)}, expected [N, K]")
    n = check.numel(op, "shapeB", shapeB)
    if A.dim() == 0:
        raise ValueError(f"{op}: A has no dimensions, expected a last one of {shapeB[1]}")
    check.equal(op, "A", "a last dimension of", A.shape[-1], shapeB[1])
    check_packed(op, "B", B, n)
    return n


def check_gemv_4bit(
    A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> None:
    n = check_product("gemv_4bit", A, B, shapeB)
    check_absmax("gemv_4bit", absmax, n, blocksize)
    check_code("gemv_4bit", code, 16)
    check.same_device("gemv_4bit", A.device, B=B, absmax=absmax, code=code)


@register_fake("bitsandbytes::gemv_4bit")
def _(
    A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], absmax: torch.Tensor, code: torch.Tensor, blocksize: int
) -> torch.Tensor:
    check_gemv_4bit(A, B, shapeB, absmax, code, blocksize)
    return A.new_empty((*A.shape[:-1], shapeB[0]))


@register_fake("bitsandbytes::gemv_4bit.out")
def _(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    code: torch.Tensor,
    blocksize: int,
    out: torch.Tensor,
) -> None:
    check_gemv_4bit(A, B, shapeB, absmax, code, blocksize)
    check.out_like("gemv_4bit", out, (*A.shape[:-1], shapeB[0]), A.dtype, A.device)


def check_gemm_4bit(
    A: torch.Tensor,
    B: torch.Tensor,
    shapeB: Sequence[int],
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    bias: torch.Tensor | None = None,
    absmax_8bit: torch.Tensor | None = None,
    absmax_code: torch.Tensor | None = None,
    absmax_offset: torch.Tensor | None = None,
    *,
    op: str = "gemm_4bit",
) -> None:
    n = check_product(op, A, B, shapeB)
    check.one_of(op, "quant_type", quant_type, check.QUANT_TYPES)
    nested = {"absmax_8bit": absmax_8bit, "absmax_code": absmax_code, "absmax_offset": absmax_offset}
    if absmax_8bit is None:
        check_absmax(op, absmax, n, blocksize)
        for name in nested:
            if nested[name] is not None:
                raise ValueError(f"{op}: {name} is given without absmax_8bit, expected all of {', '.join(nested)}")
    else:
        if absmax_code is None or absmax_offset is None:
            raise ValueError(f"{op}: absmax_8bit is given, expected absmax_code and absmax_offset with it")
        check.one_of(op, "blocksize", blocksize, check.BLOCKSIZES)
        check.dtype(op, "absmax_8bit", absmax_8bit, torch.uint8)
        check.exactly(op, "absmax_8bit", absmax_8bit.numel(), check.blocks(n, blocksize))
        check_absmax(op, absmax, check.blocks(n, blocksize), 256)
        check.dtype(op, "absmax_code", absmax_code, torch.float32)
        check.equal(op, "absmax_code", "size", absmax_code.numel(), check.CODES)
        check.dtype(op, "absmax_offset", absmax_offset, torch.float32)
        check.equal(op, "absmax_offset", "size", absmax_offset.numel(), 1)
    if bias is not None:
        check.dtype(op, "bias", bias, *check.FLOATS)
        check.equal(op, "bias", "size", bias.numel(), shapeB[0])
    check.same_device(op, A.device, B=B, absmax=absmax, bias=bias, **nested)


@register_fake("bitsandbytes::gemm_4bit")
def _(A: torch.Tensor, B: torch.Tensor, shapeB: Sequence[int], *rest: Any) -> torch.Tensor:
    check_gemm_4bit(A, B, shapeB, *rest)
    return A.new_empty((*A.shape[:-1], shapeB[0]))


_FORMATS = {
    (blocksize, quant_type): 8 * i + j
    for i, quant_type in enumerate(("nf4", "fp4"))
    for j, blocksize in enumerate(check.BLOCKSIZES)
}
_SIZES = 2**29


def linear_4bit_layout(shape: Any, blocksize: Any, quant_type: Any) -> int | None:
    """Sizes and format of a weight as one number; None if they are none that linear_4bit takes."""
    if not isinstance(shape, tuple | list) or not isinstance(blocksize, int) or not isinstance(quant_type, str):
        return None
    code = _FORMATS.get((blocksize, quant_type))
    if code is None or len(shape) != 2 or not all(isinstance(s, int) and 0 <= s < _SIZES for s in shape):
        return None
    return (shape[0] << 33) + (shape[1] << 4) + code


@register_fake("bitsandbytes::linear_4bit")
@register_fake("bitsandbytes::linear_4bit.nested")
@register_fake("bitsandbytes::linear_4bit.forward")
@register_fake("bitsandbytes::linear_4bit.nested_forward")
def _(A: torch.Tensor, B: torch.Tensor, absmax: torch.Tensor, layout: int, *rest: Any) -> torch.Tensor:
    shape, blocksize, quant_type = read_linear_4bit_layout(layout)
    check_gemm_4bit(A, B, shape, absmax, blocksize, quant_type, *rest, op="linear_4bit")
    return A.new_empty((*A.shape[:-1], shape[0]))


def read_linear_4bit_layout(layout: int) -> tuple[tuple[int, int], int, str]:
    """Shape, blocksize and quant_type."""
    if layout < 0:
        raise ValueError(f"linear_4bit: layout is {layout}, expected 0 or more")
    return (layout >> 33, (layout >> 4) % _SIZES), 32 << layout % 8, "fp4" if layout & 8 else "nf4"
