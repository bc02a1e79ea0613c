"""The operators of LLM.int8() (arXiv 2208.07339): schemas and shape functions.

Rows are int8 codes with one scale: x = code * scale / 127.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import register_fake

from . import _checks as check
from ._schemas import schema_of


class MmDequant(NamedTuple):
    A: Tensor
    row_stats: Tensor
    col_stats: Tensor
    dtype: torch.dtype | None = None
    bias: Tensor | None = None


class ScaledMm(NamedTuple):
    A: Tensor
    B: Tensor
    row_stats: Tensor
    col_stats: Tensor
    bias: Tensor | None = None
    dtype: torch.dtype | None = None


class MixedScaledMm(NamedTuple):
    A: Tensor
    CA: Tensor
    CB: Tensor
    SCA: Tensor
    SCB: Tensor
    outlier_cols: Tensor | None = None
    bias: Tensor | None = None


class Linear(NamedTuple):
    A: Tensor
    CB: Tensor
    SCB: Tensor
    bias: Tensor | None = None
    threshold: float = 0.0


# Part of the public contract except int8_linear, which is the whole forward of a layer in one call; its overload
# `forward` is below autograd, as those of linear_4bit are.
SCHEMAS = {
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_double_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out": "(Tensor A, Tensor B, Tensor! out) -> ()",
    "int8_mm_dequant": schema_of(MmDequant, "Tensor"),
    "int8_scaled_mm": schema_of(ScaledMm, "Tensor"),
    "int8_mixed_scaled_mm": schema_of(MixedScaledMm, "(Tensor, Tensor?)"),
    "int8_linear": schema_of(Linear, "Tensor"),
    "int8_linear.forward": schema_of(Linear, "Tensor"),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"bitsandbytes::{_name}", _schema)

MAX_DEPTH = 2**17 - 1  # no sum of so many products of codes leaves int32


def rows_of(A: Tensor) -> int:
    """Rows of A [..., K] read as a matrix."""
    rows = 1
    for size in A.shape[:-1]:
        rows *= size
    return rows


def as_rows(A: Tensor) -> Tensor:
    """A [..., K] as a matrix; also where K is 0 and reshape cannot tell the number of rows."""
    return A.reshape(rows_of(A), A.shape[-1])


def check_quant(op: str, A: Tensor, threshold: float) -> None:
    check.dtype(op, "A", A, *check.FLOATS)
    check_matrix(op, "A", A)
    check_threshold(op, threshold)


def check_threshold(op: str, threshold: float) -> None:
    if not isinstance(threshold, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: threshold is {type(threshold).__name__}, expected a number")
    torch._check_value(threshold >= 0, lambda: f"{op}: threshold is {threshold}, expected 0 or more")


def check_matrix(op: str, name: str, A: Tensor) -> None:
    if A.dim() == 0:
        raise ValueError(f"{op}: {name} has no dimensions, expected rows of at least one")


def check_scales(op: str, name: str, scales: Tensor, n: int) -> None:
    check.dtype(op, name, scales, torch.float32)
    check.equal(op, name, "size", scales.numel(), n)


def check_bias(op: str, bias: Tensor | None, n: int) -> None:
    if bias is not None:
        check.dtype(op, "bias", bias, *check.FLOATS)
        check.equal(op, "bias", "size", bias.numel(), n)


def check_weight(op: str, name: str, B: Tensor, k: int) -> None:
    check.dtype(op, name, B, torch.int8)
    if B.dim() != 2:
        raise ValueError(f"{op}: {name} has {B.dim()} dimensions, expected [N, K]")
    check.equal(op, name, "a last dimension of", B.shape[1], k)
    torch._check_value(k <= MAX_DEPTH, lambda: f"{op}: {name} has K of {k}, expected at most {MAX_DEPTH}")


def check_matmul(op: str, A: Tensor, B: Tensor, first: str = "A", second: str = "B") -> None:
    """A [..., K] times the transpose of B [N, K]."""
    check.dtype(op, first, A, torch.int8)
    check_matrix(op, first, A)
    check_weight(op, second, B, A.shape[-1])
    check.same_device(op, A.device, **{second: B})


def check_dequant(A: Tensor, stats: Tensor) -> None:
    op = "int8_vectorwise_dequant"
    check.dtype(op, "A", A, torch.int8)
    check_matrix(op, "A", A)
    check_scales(op, "stats", stats, rows_of(A))
    check.same_device(op, A.device, stats=stats)


def check_mm_dequant(d: MmDequant) -> torch.dtype:
    op = "int8_mm_dequant"
    check.dtype(op, "A", d.A, torch.int32)
    check_matrix(op, "A", d.A)
    return check_epilogue(op, d, d.A.shape[-1])


def check_scaled_mm(d: ScaledMm) -> torch.dtype:
    check_matmul("int8_scaled_mm", d.A, d.B)
    return check_epilogue("int8_scaled_mm", d, d.B.shape[0])


def check_epilogue(op: str, d: MmDequant | ScaledMm, n: int) -> torch.dtype:
    """The dtype of the result is returned."""
    check_scales(op, "row_stats", d.row_stats, rows_of(d.A))
    check_scales(op, "col_stats", d.col_stats, n)
    check.one_of(op, "dtype", d.dtype, (None, *check.FLOATS))
    check_bias(op, d.bias, n)
    check.same_device(op, d.A.device, row_stats=d.row_stats, col_stats=d.col_stats, bias=d.bias)
    return d.dtype or torch.float16


def check_mixed(d: MixedScaledMm) -> None:
    op = "int8_mixed_scaled_mm"
    check.dtype(op, "A", d.A, *check.FLOATS)
    check_matrix(op, "A", d.A)
    check.equal(op, "A", "shape", tuple(d.A.shape), tuple(d.CA.shape))
    check_matmul(op, d.CA, d.CB, "CA", "CB")
    check_scales(op, "SCA", d.SCA, rows_of(d.A))
    check_scales(op, "SCB", d.SCB, d.CB.shape[0])
    check_bias(op, d.bias, d.CB.shape[0])
    if d.outlier_cols is not None:
        check.dtype(op, "outlier_cols", d.outlier_cols, torch.int64)
        if d.outlier_cols.dim() != 1:
            raise ValueError(f"{op}: outlier_cols has {d.outlier_cols.dim()} dimensions, expected 1")
    others = {"CA": d.CA, "CB": d.CB, "SCA": d.SCA, "SCB": d.SCB}
    check.same_device(op, d.A.device, **others, outlier_cols=d.outlier_cols, bias=d.bias)


def check_linear(d: Linear) -> None:
    op = "int8_linear"
    check_quant(op, d.A, d.threshold)
    check_weight(op, "CB", d.CB, d.A.shape[-1])
    check_scales(op, "SCB", d.SCB, d.CB.shape[0])
    check_bias(op, d.bias, d.CB.shape[0])
    check.same_device(op, d.A.device, CB=d.CB, SCB=d.SCB, bias=d.bias)


def _outlier_columns(A: Tensor, threshold: float) -> Tensor | None:
    if threshold == 0:
        return None
    return A.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _codes(A: Tensor) -> Tensor:
    return torch.empty_like(A, dtype=torch.int8, memory_format=torch.contiguous_format)


@register_fake("bitsandbytes::int8_vectorwise_quant")
def _(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    check_quant("int8_vectorwise_quant", A, threshold)
    return _codes(A), A.new_empty((rows_of(A),), dtype=torch.float32), _outlier_columns(A, threshold)


@register_fake("bitsandbytes::int8_double_quant")
def _(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    check_quant("int8_double_quant", A, threshold)
    rows, columns = (A.new_empty((n,), dtype=torch.float32) for n in (rows_of(A), A.shape[-1]))
    return _codes(A), _codes(A), rows, columns, _outlier_columns(A, threshold)


@register_fake("bitsandbytes::int8_vectorwise_dequant")
def _(A: Tensor, stats: Tensor) -> Tensor:
    check_dequant(A, stats)
    return torch.empty_like(A, dtype=torch.float32, memory_format=torch.contiguous_format)


@register_fake("bitsandbytes::int8_linear_matmul")
def _(A: Tensor, B: Tensor) -> Tensor:
    check_matmul("int8_linear_matmul", A, B)
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


@register_fake("bitsandbytes::int8_linear_matmul.out")
def _(A: Tensor, B: Tensor, out: Tensor) -> None:
    check_matmul("int8_linear_matmul", A, B)
    check.out_like("int8_linear_matmul", out, (*A.shape[:-1], B.shape[0]), torch.int32, A.device)


@register_fake("bitsandbytes::int8_mm_dequant")
def _(*arguments: Any) -> Tensor:
    d = MmDequant(*arguments)
    return torch.empty_like(d.A, dtype=check_mm_dequant(d), memory_format=torch.contiguous_format)


@register_fake("bitsandbytes::int8_scaled_mm")
def _(*arguments: Any) -> Tensor:
    d = ScaledMm(*arguments)
    dtype = check_scaled_mm(d)
    return d.A.new_empty((*d.A.shape[:-1], d.B.shape[0]), dtype=dtype)


@register_fake("bitsandbytes::int8_mixed_scaled_mm")
def _(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    d = MixedScaledMm(*arguments)
    check_mixed(d)
    out, columns = d.A.new_empty((*d.A.shape[:-1], d.CB.shape[0])), d.outlier_cols
    return out, None if columns is None else d.A.new_empty((*d.A.shape[:-1], columns.shape[0]))


@register_fake("bitsandbytes::int8_linear")
@register_fake("bitsandbytes::int8_linear.forward")
def _(*arguments: Any) -> Tensor:
    d = Linear(*arguments)
    check_linear(d)
    return d.A.new_empty((*d.A.shape[:-1], d.CB.shape[0]))
