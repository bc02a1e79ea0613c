"""The operators of 4-bit and block-wise quantization: schemas and shape functions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import register_fake

from . import _checks as check
from ._codes import dequantize, unpack
from ._schemas import schema_of

_ops = torch.ops.bitsandbytes


class Dequantize4bit(NamedTuple):
    A: Tensor
    absmax: Tensor
    blocksize: int
    quant_type: str
    shape: Sequence[int]
    dtype: torch.dtype


class DequantizeBlockwise(NamedTuple):
    A: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    dtype: torch.dtype


class Gemv4bit(NamedTuple):
    A: Tensor
    B: Tensor
    shapeB: Sequence[int]
    absmax: Tensor
    code: Tensor
    blocksize: int

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the product."""
        return (*self.A.shape[:-1], self.shapeB[0])


class Gemm4bit(NamedTuple):
    """Nested absmax: `absmax` then holds the scales of absmax_8bit, one per 256 codes, and
    absmax[i] = absmax_code[absmax_8bit[i]] * scale[i // 256] + absmax_offset."""

    A: Tensor
    B: Tensor
    shapeB: Sequence[int]
    absmax: Tensor
    blocksize: int
    quant_type: str
    bias: Tensor | None = None
    absmax_8bit: Tensor | None = None
    absmax_code: Tensor | None = None
    absmax_offset: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the product."""
        return (*self.A.shape[:-1], self.shapeB[0])


_LINEAR = "Tensor A, Tensor B, Tensor absmax, int layout, Tensor? bias"
_NESTED_SCALES = "Tensor absmax_8bit, Tensor absmax_code, Tensor absmax_offset"

# Part of the public contract: backends of other projects implement exactly these.
SCHEMAS = {
    "quantize_4bit": "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
    "dequantize_4bit": schema_of(Dequantize4bit, "Tensor"),
    "dequantize_4bit.out": schema_of(Dequantize4bit, "()", "Tensor! out"),
    "quantize_blockwise": "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
    "dequantize_blockwise": schema_of(DequantizeBlockwise, "Tensor"),
    "dequantize_blockwise.out": schema_of(DequantizeBlockwise, "()", "Tensor! out"),
    "gemv_4bit": schema_of(Gemv4bit, "Tensor"),
    "gemv_4bit.out": schema_of(Gemv4bit, "()", "Tensor! out"),
    "gemm_4bit": schema_of(Gemm4bit, "Tensor"),
    # Private fast path of Linear4bit: every argument, even None, costs about 0.25 us to unbox, so linear_4bit_layout
    # packs five of gemm_4bit's into one.
    "linear_4bit": f"({_LINEAR}=None) -> Tensor",
    "linear_4bit.nested": f"({_LINEAR}, {_NESTED_SCALES}) -> Tensor",
    # Below autograd: for callers that looked at derivatives_wanted() of _derivatives.py, as the others do themselves.
    "linear_4bit.forward": f"({_LINEAR}=None) -> Tensor",
    "linear_4bit.nested_forward": f"({_LINEAR}, {_NESTED_SCALES}) -> Tensor",
}

# Made on the CPU, whatever device the map is for: `numbers` are the arguments of the maker in bnb/codebook.h.
CPU_SCHEMAS = {"create_map": "(Tensor! out, str name, float[] numbers) -> ()"}

for _name, _schema in (SCHEMAS | CPU_SCHEMAS).items():
    torch.library.define(f"bitsandbytes::{_name}", _schema)


def check_packed(op: str, name: str, packed: Tensor, n: int) -> None:
    """`packed`, of any storage dtype, must hold the 4-bit codes of n elements and nothing else."""
    check.dtype(op, name, packed, *check.STORAGES)
    item = packed.element_size()
    check.exactly(op, name, packed.numel() * item, check.blocks((n + 1) // 2, item) * item, "bytes")


def check_absmax(op: str, absmax: Tensor, n: int, blocksize: int) -> None:
    check.one_of(op, "blocksize", blocksize, check.BLOCKSIZES)
    check.dtype(op, "absmax", absmax, torch.float32)
    check.exactly(op, "absmax", absmax.numel(), check.blocks(n, blocksize))


def check_code(op: str, code: Tensor, entries: int = check.CODES) -> None:
    check.dtype(op, "code", code, torch.float32)
    check.equal(op, "code", "size", code.numel(), entries)


@register_fake("bitsandbytes::create_map")
def _(out: Tensor, name: str, numbers: Sequence[float]) -> None:
    check.dtype("create_map", "out", out, torch.float32)


def storage_rows(n: int, quant_storage: torch.dtype) -> int:
    """Elements of `quant_storage` that hold the codes of n elements; bytes past the last code are zero."""
    check.one_of("quantize_4bit", "quant_storage", quant_storage, check.STORAGES)
    return ((n + 1) // 2 + quant_storage.itemsize - 1) // quant_storage.itemsize


def check_quantize_4bit(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> int:
    """The number of elements of the result is returned."""
    op = "quantize_4bit"
    check.dtype(op, "A", A, *check.FLOATS)
    check.one_of(op, "blocksize", blocksize, check.BLOCKSIZES)
    check.one_of(op, "quant_type", quant_type, check.QUANT_TYPES)
    return storage_rows(A.numel(), quant_storage)


@register_fake("bitsandbytes::quantize_4bit")
def _(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = check_quantize_4bit(A, blocksize, quant_type, quant_storage)
    absmax = A.new_empty((check.blocks(A.numel(), blocksize),), dtype=torch.float32)
    return A.new_empty((rows, 1), dtype=quant_storage), absmax


def check_dequantize_4bit(d: Dequantize4bit) -> int:
    """The number of elements of the result is returned."""
    op = "dequantize_4bit"
    check.one_of(op, "quant_type", d.quant_type, check.QUANT_TYPES)
    check.one_of(op, "dtype", d.dtype, check.FLOATS)
    n = check.numel(op, "shape", d.shape)
    check_packed(op, "A", d.A, n)
    check_absmax(op, d.absmax, n, d.blocksize)
    check.same_device(op, d.A.device, absmax=d.absmax)
    return n


@register_fake("bitsandbytes::dequantize_4bit")
def _(*arguments: Any) -> Tensor:
    d = Dequantize4bit(*arguments)
    check_dequantize_4bit(d)
    return d.A.new_empty(d.shape, dtype=d.dtype)


@register_fake("bitsandbytes::dequantize_4bit.out")
def _(*arguments: Any) -> None:
    d, out = Dequantize4bit(*arguments[:-1]), arguments[-1]
    check_dequantize_4bit(d)
    check.out_like("dequantize_4bit", out, d.shape, d.dtype, d.A.device)


def check_quantize_blockwise(A: Tensor, code: Tensor, blocksize: int) -> None:
    op = "quantize_blockwise"
    check.dtype(op, "A", A, *check.FLOATS)
    check.blockwise_blocksize(op, blocksize, A.device)
    check_code(op, code)
    check.same_device(op, A.device, code=code)


@register_fake("bitsandbytes::quantize_blockwise")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check_quantize_blockwise(A, code, blocksize)
    absmax = A.new_empty((check.blocks(A.numel(), blocksize),), dtype=torch.float32)
    return torch.empty_like(A, dtype=torch.uint8, memory_format=torch.contiguous_format), absmax


def check_dequantize_blockwise(d: DequantizeBlockwise) -> None:
    op = "dequantize_blockwise"
    check.dtype(op, "A", d.A, torch.uint8)
    check.one_of(op, "dtype", d.dtype, check.FLOATS)
    check.blockwise_blocksize(op, d.blocksize, d.A.device)
    check.dtype(op, "absmax", d.absmax, torch.float32)
    check.exactly(op, "absmax", d.absmax.numel(), check.blocks(d.A.numel(), d.blocksize))
    check_code(op, d.code)
    check.same_device(op, d.A.device, absmax=d.absmax, code=d.code)


@register_fake("bitsandbytes::dequantize_blockwise")
def _(*arguments: Any) -> Tensor:
    d = DequantizeBlockwise(*arguments)
    check_dequantize_blockwise(d)
    return torch.empty_like(d.A, dtype=d.dtype, memory_format=torch.contiguous_format)


@register_fake("bitsandbytes::dequantize_blockwise.out")
def _(*arguments: Any) -> None:
    d, out = DequantizeBlockwise(*arguments[:-1]), arguments[-1]
    check_dequantize_blockwise(d)
    check.out_like("dequantize_blockwise", out, d.A.shape, d.dtype, d.A.device)


def check_product(op: str, A: Tensor, B: Tensor, shapeB: Sequence[int]) -> int:
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


def check_gemv_4bit(g: Gemv4bit) -> None:
    n = check_product("gemv_4bit", g.A, g.B, g.shapeB)
    check_absmax("gemv_4bit", g.absmax, n, g.blocksize)
    check_code("gemv_4bit", g.code, 16)
    check.same_device("gemv_4bit", g.A.device, B=g.B, absmax=g.absmax, code=g.code)


def weight_of_gemv_4bit(g: Gemv4bit, dtype: torch.dtype) -> Tensor:
    values = dequantize(g.code.reshape(-1), unpack(g.B), g.absmax, g.blocksize, g.shapeB[0] * g.shapeB[1])
    return values.to(dtype).view(*g.shapeB)


@register_fake("bitsandbytes::gemv_4bit")
def _(*arguments: Any) -> Tensor:
    g = Gemv4bit(*arguments)
    check_gemv_4bit(g)
    return g.A.new_empty(g.shape)


@register_fake("bitsandbytes::gemv_4bit.out")
def _(*arguments: Any) -> None:
    g, out = Gemv4bit(*arguments[:-1]), arguments[-1]
    check_gemv_4bit(g)
    check.out_like("gemv_4bit", out, g.shape, g.A.dtype, g.A.device)


def check_gemm_4bit(g: Gemm4bit, op: str = "gemm_4bit") -> None:
    n = check_product(op, g.A, g.B, g.shapeB)
    check.one_of(op, "quant_type", g.quant_type, check.QUANT_TYPES)
    nested = {"absmax_8bit": g.absmax_8bit, "absmax_code": g.absmax_code, "absmax_offset": g.absmax_offset}
    if g.absmax_8bit is None:
        check_absmax(op, g.absmax, n, g.blocksize)
        for name in nested:
            if nested[name] is not None:
                raise ValueError(f"{op}: {name} is given without absmax_8bit, expected all of {', '.join(nested)}")
    else:
        if g.absmax_code is None or g.absmax_offset is None:
            raise ValueError(f"{op}: absmax_8bit is given, expected absmax_code and absmax_offset with it")
        check.one_of(op, "blocksize", g.blocksize, check.BLOCKSIZES)
        check.dtype(op, "absmax_8bit", g.absmax_8bit, torch.uint8)
        check.exactly(op, "absmax_8bit", g.absmax_8bit.numel(), check.blocks(n, g.blocksize))
        check_absmax(op, g.absmax, check.blocks(n, g.blocksize), 256)
        check.dtype(op, "absmax_code", g.absmax_code, torch.float32)
        check.equal(op, "absmax_code", "size", g.absmax_code.numel(), check.CODES)
        check.dtype(op, "absmax_offset", g.absmax_offset, torch.float32)
        check.equal(op, "absmax_offset", "size", g.absmax_offset.numel(), 1)
    if g.bias is not None:
        check.dtype(op, "bias", g.bias, *check.FLOATS)
        check.equal(op, "bias", "size", g.bias.numel(), g.shapeB[0])
    check.same_device(op, g.A.device, B=g.B, absmax=g.absmax, bias=g.bias, **nested)


def weight_of_gemm_4bit(g: Gemm4bit, dtype: torch.dtype) -> Tensor:
    """Through the dispatcher, so that a device with kernels for some operators uses them here."""
    absmax = g.absmax
    if g.absmax_8bit is not None:
        assert g.absmax_code is not None and g.absmax_offset is not None  # as check_gemm_4bit says
        nested = DequantizeBlockwise(g.absmax_8bit, absmax, g.absmax_code, 256, torch.float32)
        absmax = _ops.dequantize_blockwise.default(*nested) + g.absmax_offset
    weight: Tensor = _ops.dequantize_4bit.default(
        *Dequantize4bit(g.B, absmax, g.blocksize, g.quant_type, g.shapeB, dtype)
    )
    return weight


@register_fake("bitsandbytes::gemm_4bit")
def _(*arguments: Any) -> Tensor:
    g = Gemm4bit(*arguments)
    check_gemm_4bit(g)
    return g.A.new_empty(g.shape)


_FORMATS = {
    (blocksize, quant_type): 8 * i + j
    for i, quant_type in enumerate(("nf4", "fp4"))
    for j, blocksize in enumerate(check.BLOCKSIZES)
}
_SIZES = 2**29


def linear_4bit_layout(shape: Any, blocksize: Any, quant_type: Any) -> int | None:
    """Sizes and format of a weight as one number; None if linear_4bit does not take them."""
    if not isinstance(shape, tuple | list) or not isinstance(blocksize, int) or not isinstance(quant_type, str):
        return None
    code = _FORMATS.get((blocksize, quant_type))
    if code is None or len(shape) != 2 or not all(isinstance(s, int) and 0 <= s < _SIZES for s in shape):
        return None
    return (shape[0] << 33) + (shape[1] << 4) + code


def read_linear_4bit(A: Tensor, B: Tensor, absmax: Tensor, layout: int, *rest: Tensor | None) -> Gemm4bit:
    """The arguments of gemm_4bit from those of linear_4bit."""
    if layout < 0:
        raise ValueError(f"linear_4bit: layout is {layout}, expected 0 or more")
    shape, quant_type = (layout >> 33, (layout >> 4) % _SIZES), "fp4" if layout & 8 else "nf4"
    return Gemm4bit(A, B, shape, absmax, 32 << layout % 8, quant_type, *rest)


@register_fake("bitsandbytes::linear_4bit")
@register_fake("bitsandbytes::linear_4bit.nested")
@register_fake("bitsandbytes::linear_4bit.forward")
@register_fake("bitsandbytes::linear_4bit.nested_forward")
def _(*arguments: Any) -> Tensor:
    g = read_linear_4bit(*arguments)
    check_gemm_4bit(g, "linear_4bit")
    return g.A.new_empty(g.shape)
