"""The operators of LLM.int8() (arXiv 2208.07339): schemas and shape functions, as _ops.py has them for the others.

Rows are int8 codes with one scale: x = code * scale / 127.
"""

import torch
from torch.library import register_fake

from . import _checks as check

_LINEAR = "Tensor A, Tensor CB, Tensor SCB, Tensor? bias=None, float threshold=0."

# Part of the public contract except int8_linear, which is the whole forward of a layer in one call; its overload
# `forward` is below autograd, as those of linear_4bit are.
SCHEMAS = {
    "int8_vectorwise_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)",
    "int8_vectorwise_dequant": "(Tensor A, Tensor stats) -> Tensor",
    "int8_double_quant": "(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
    "int8_linear_matmul": "(Tensor A, Tensor B) -> Tensor",
    "int8_linear_matmul.out": "(Tensor A, Tensor B, Tensor! out) -> ()",
    "int8_mm_dequant": (
        "(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) -> Tensor"
    ),
    "int8_scaled_mm": (
        "(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, ScalarType? dtype=None) -> Tensor"
    ),
    "int8_mixed_scaled_mm": (
        "(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, Tensor? bias=None)"
        " -> (Tensor, Tensor?)"
    ),
    "int8_linear": f"({_LINEAR}) -> Tensor",
    "int8_linear.forward": f"({_LINEAR}) -> Tensor",
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"bitsandbytes::{_name}", _schema)

MAX_DEPTH = 2**17 - 1  # no sum of so many products of codes leaves int32


def rows_of(A: torch.Tensor) -> int:
    """Rows of A [..., K] read as a matrix."""
    rows = 1
    for size in A.shape[:-1]:
        rows *= size
    return rows


def as_rows(A: torch.Tensor) -> torch.Tensor:
    """A [..., K] as a matrix; also where K is 0 and reshape cannot tell the number of rows."""
    return A.reshape(rows_of(A), A.shape[-1])


def check_quant(op: str, A: torch.Tensor, threshold: float) -> None:
    check.dtype(op, "A", A, *check.FLOATS)
    check_matrix(op, "A", A)
    check_threshold(op, threshold)


def check_threshold(op: str, threshold: float) -> None:
    if not isinstance(threshold, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: threshold is {type(threshold).__name__}, expected a number")
    torch._check_value(threshold >= 0, lambda: f"{op}: threshold is {threshold}, expected 0 or more")


def check_matrix(op: str, name: str, A: torch.Tensor) -> None:
    if A.dim() == 0:
        raise ValueError(f"{op}: {name} has no dimensions, expected rows of at least one")


def check_scales(op: str, name: str, scales: torch.Tensor, n: int) -> None:
    check.dtype(op, name, scales, torch.float32)
    check.equal(op, name, "size", scales.numel(), n)


def check_bias(op: str, bias: torch.Tensor | None, n: int) -> None:
    if bias is not None:
        check.dtype(op, "bias", bias, *check.FLOATS)
        check.equal(op, "bias", "size", bias.numel(), n)


def check_weight(op: str, name: str, B: torch.Tensor, k: int) -> None:
    check.dtype(op, name, B, torch.int8)
    if B.dim() != 2:
        raise ValueError(f"{op}: {name} has {B.dim()} dimensions, expected [N, K]")
    check.equal(op, name, "a last dimension of", B.shape[1], k)
    torch._check_value(k <= MAX_DEPTH, lambda: f"{op}: {name} has K of {k}, expected at most {MAX_DEPTH}")


def check_matmul(op: str, A: torch.Tensor, B: torch.Tensor, first: str = "A", second: str = "B") -> None:
    """A [..., K] times the transpose of B [N, K]."""
    check.dtype(op, first, A, torch.int8)
    check_matrix(op, first, A)
    check_weight(op, second, B, A.shape[-1])
    check.same_device(op, A.device, **{second: B})


def check_dequant(A: torch.Tensor, stats: torch.Tensor) -> None:
    op = "int8_vectorwise_dequant"
    check.dtype(op, "A", A, torch.int8)
    check_matrix(op, "A", A)
    check_scales(op, "stats", stats, rows_of(A))
    check.same_device(op, A.device, stats=stats)


def check_mm_dequant(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None,
    bias: torch.Tensor | None,
) -> torch.dtype:
    op = "int8_mm_dequant"
    check.dtype(op, "A", A, torch.int32)
    check_matrix(op, "A", A)
    return check_epilogue(op, A, A.shape[-1], row_stats, col_stats, dtype, bias)


def check_epilogue(
    op: str,
    A: torch.Tensor,
    n: int,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None,
    bias: torch.Tensor | None,
) -> torch.dtype:
    """The dtype of the result is returned."""
    check_scales(op, "row_stats", row_stats, rows_of(A))
    check_scales(op, "col_stats", col_stats, n)
    check.one_of(op, "dtype", dtype, (None, *check.FLOATS))
    check_bias(op, bias, n)
    check.same_device(op, A.device, row_stats=row_stats, col_stats=col_stats, bias=bias)
    return dtype or torch.float16


def check_mixed(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    op = "int8_mixed_scaled_mm"
    check.dtype(op, "A", A, *check.FLOATS)
    check_matrix(op, "A", A)
    check.equal(op, "A", "shape", tuple(A.shape), tuple(CA.shape))
    check_matmul(op, CA, CB, "CA", "CB")
    check_scales(op, "SCA", SCA, rows_of(A))
    check_scales(op, "SCB", SCB, CB.shape[0])
    check_bias(op, bias, CB.shape[0])
    if outlier_cols is not None:
        check.dtype(op, "outlier_cols", outlier_cols, torch.int64)
        if outlier_cols.dim() != 1:
            raise ValueError(f"{op}: outlier_cols has {outlier_cols.dim()} dimensions, expected 1")
    check.same_device(op, A.device, CA=CA, CB=CB, SCA=SCA, SCB=SCB, outlier_cols=outlier_cols, bias=bias)


def check_linear(
    A: torch.Tensor, CB: torch.Tensor, SCB: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> None:
    op = "int8_linear"
    check_quant(op, A, threshold)
    check_weight(op, "CB", CB, A.shape[-1])
    check_scales(op, "SCB", SCB, CB.shape[0])
    check_bias(op, bias, CB.shape[0])
    check.same_device(op, A.device, CB=CB, SCB=SCB, bias=bias)


def _outlier_columns(A: torch.Tensor, threshold: float) -> torch.Tensor | None:
    if threshold == 0:
        return None
    return A.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _codes(A: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(A, dtype=torch.int8, memory_format=torch.contiguous_format)


@register_fake("bitsandbytes::int8_vectorwise_quant")
def _(A: torch.Tensor, threshold: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    check_quant("int8_vectorwise_quant", A, threshold)
    return _codes(A), A.new_empty((rows_of(A),), dtype=torch.float32), _outlier_columns(A, threshold)


@register_fake("bitsandbytes::int8_double_quant")
def _(
    A: torch.Tensor, threshold: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    check_quant("int8_double_quant", A, threshold)
    rows, columns = (A.new_empty((n,), dtype=torch.float32) for n in (rows_of(A), A.shape[-1]))
    return _codes(A), _codes(A), rows, columns, _outlier_columns(A, threshold)


@register_fake("bitsandbytes::int8_vectorwise_dequant")
def _(A: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    check_dequant(A, stats)
    return torch.empty_like(A, dtype=torch.float32, memory_format=torch.contiguous_format)


@register_fake("bitsandbytes::int8_linear_matmul")
def _(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    check_matmul("int8_linear_matmul", A, B)
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=torch.int32)


@register_fake("bitsandbytes::int8_linear_matmul.out")
def _(A: torch.Tensor, B: torch.Tensor, out: torch.Tensor) -> None:
    check_matmul("int8_linear_matmul", A, B)
    check.out_like("int8_linear_matmul", out, (*A.shape[:-1], B.shape[0]), torch.int32, A.device)


@register_fake("bitsandbytes::int8_mm_dequant")
def _(
    A: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    dtype: torch.dtype | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    dtype = check_mm_dequant(A, row_stats, col_stats, dtype, bias)
    return torch.empty_like(A, dtype=dtype, memory_format=torch.contiguous_format)


@register_fake("bitsandbytes::int8_scaled_mm")
def _(
    A: torch.Tensor,
    B: torch.Tensor,
    row_stats: torch.Tensor,
    col_stats: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    check_matmul("int8_scaled_mm", A, B)
    dtype = check_epilogue("int8_scaled_mm", A, B.shape[0], row_stats, col_stats, dtype, bias)
    return A.new_empty((*A.shape[:-1], B.shape[0]), dtype=dtype)


@register_fake("bitsandbytes::int8_mixed_scaled_mm")
def _(
    A: torch.Tensor,
    CA: torch.Tensor,
    CB: torch.Tensor,
    SCA: torch.Tensor,
    SCB: torch.Tensor,
    outlier_cols: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_mixed(A, CA, CB, SCA, SCB, outlier_cols, bias)
    out = A.new_empty((*A.shape[:-1], CB.shape[0]))
    return out, None if outlier_cols is None else A.new_empty((*A.shape[:-1], outlier_cols.shape[0]))


@register_fake("bitsandbytes::int8_linear")
@register_fake("bitsandbytes::int8_linear.forward")
def _(
    A: torch.Tensor,
    CB: torch.Tensor,
    SCB: torch.Tensor,
    bias: torch.Tensor | None = None,
    threshold: float = 0.0,
) -> torch.Tensor:
    check_linear(A, CB, SCB, bias, threshold)
    return A.new_empty((*A.shape[:-1], CB.shape[0]))
