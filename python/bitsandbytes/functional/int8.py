"""Rows of int8 codes with one scale each, x = code * scale / 127, and their products (LLM.int8(), arXiv 2208.07339)."""

import torch
from torch import Tensor
from typing_extensions import deprecated

from .. import _checks as check
from .blockwise import fill
from .quant_state import statistic

_ops = torch.ops.bitsandbytes
_DEPRECATED = "This function is deprecated and will be removed in a future release."


def single(A: Tensor) -> Tensor:
    """fp64 as fp32, which is what int8 keeps of it."""
    return A.float() if A.dtype == torch.float64 else A


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantizes rows: scale = max |x| of the row, code = x * 127 / scale rounded to the nearest, ties to even.

    Args:
        A: [..., K], read as rows of K; fp32, fp16, bf16, or fp64, which is taken as fp32. It is not changed.
        threshold: above 0, elements with |x| >= threshold are outliers: they do not count in a scale, and columns that
            hold one have code 0 in all rows.

    Returns:
        The codes, int8 in the shape of A; the scales, fp32, one per row; the columns with outliers, int64 and
        ascending, or None without a threshold.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    check.tensor("int8_vectorwise_quant", "A", A)
    return _ops.int8_vectorwise_quant.default(single(A), threshold)


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """x = code * scale / 127 in fp32.

    Args:
        A: codes, int8 [..., K].
        stats: scales, taken as fp32, one per row of A.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    check.tensor("int8_vectorwise_dequant", "A", A)
    check.tensor("int8_vectorwise_dequant", "stats", stats)
    return _ops.int8_vectorwise_dequant.default(A, statistic(stats))


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """int8_vectorwise_quant by rows and by columns. By columns only the outliers themselves get code 0.

    Args:
        A: [..., K]; fp32, fp16 or bf16. It is not changed.
        col_stats, row_stats, out_col, out_row: optional tensors to receive the scales and codes.
        threshold: above 0, elements with |x| >= threshold are outliers.

    Returns:
        Codes by row, codes by column, scales of rows, scales of columns, columns with outliers or None.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "int8_double_quant"
    check.tensor(op, "A", A)
    row, col, rows, columns, outliers = _ops.int8_double_quant.default(A, threshold)
    return (
        fill(op, "out_row", out_row, row),
        fill(op, "out_col", out_col, col),
        fill(op, "row_stats", row_stats, rows),
        fill(op, "col_stats", col_stats, columns),
        outliers,
    )


def int8_linear_matmul(A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32) -> Tensor:
    """A [..., K] @ B [N, K]^T of int8 codes; exact, in int32.

    Args:
        out: optional int32 tensor [..., N] to receive the result.
        dtype: int32, the only one there is.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "int8_linear_matmul"
    check.tensor(op, "A", A)
    check.tensor(op, "B", B)
    check.one_of(op, "dtype", dtype, (torch.int32,))
    if out is None:
        return _ops.int8_linear_matmul.default(A, B)
    check.tensor(op, "out", out)
    if not out.is_contiguous():
        return fill(op, "out", out, _ops.int8_linear_matmul.default(A, B))
    _ops.int8_linear_matmul.out(A, B, out)
    return out


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = sum * row scale * column scale / 127^2 + bias of an int32 product [..., N], in fp16 or the dtype of out.

    Args:
        A: from int8_linear_matmul.
        row_stats, col_stats: the scales of the rows of its two operands, taken as fp32.
        out: optional fp32, fp16 or bf16 tensor to receive the result.
        bias: N values.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "int8_mm_dequant"
    for name, value in (("A", A), ("row_stats", row_stats), ("col_stats", col_stats)):
        check.tensor(op, name, value)
    row_stats, col_stats = statistic(row_stats), statistic(col_stats)
    if out is None:
        return _ops.int8_mm_dequant.default(A, row_stats, col_stats, None, bias)
    check.tensor(op, "out", out)
    return fill(op, "out", out, _ops.int8_mm_dequant.default(A, row_stats, col_stats, out.dtype, bias))


def _check_product(
    op: str,
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    dtype: torch.dtype = torch.int8,
) -> torch.Size:
    """Checks the operands of igemm and batched_igemm, and returns the shape of the result."""
    for name, value in (("A", A), ("B", B)):
        check.tensor(op, name, value)
        check.dtype(op, name, value, dtype)
        if value.dim() not in (2, 3):
            raise ValueError(f"{op}: {name} has {value.dim()} dimensions, expected 2 or 3")
    check.same_device(op, A.device, B=B)
    a = tuple(A.transpose(-1, -2).shape if transposed_A else A.shape)
    b = tuple(B.transpose(-1, -2).shape if transposed_B else B.shape)
    if op == "igemm" and A.dim() == B.dim() == 3:  # summed over the batch too: sum of A[i]^T @ B[i]
        fits = a[:2] == b[:2]
        shape: tuple[int, ...] = (a[2], b[2])
    else:
        fits = a[-1] == b[-2] and (B.dim() == 2 or a[0] == b[0])
        shape = (*a[:-1], b[-1])
        if op == "batched_igemm" and A.dim() == 2:
            raise ValueError(f"{op}: A has 2 dimensions, expected 3")
    if not fits or A.dim() < B.dim():
        raise ValueError(f"{op}: B has shape {tuple(B.shape)}, expected one that fits A of {tuple(A.shape)}")
    if out is not None:
        check.tensor(op, "out", out)
        check.out_like(op, out, shape, torch.int32, A.device)
    return torch.Size(shape)


def _product(A: Tensor, B: Tensor, transposed_A: bool, transposed_B: bool) -> Tensor:
    rows = A.transpose(-1, -2) if transposed_A else A
    return _ops.int8_linear_matmul.default(rows, B if transposed_B else B.t())


@deprecated(_DEPRECATED, category=FutureWarning)
def check_matmul(
    A: Tensor,
    B: Tensor,
    out: Tensor | None,
    transposed_A: bool,
    transposed_B: bool,
    expected_type: torch.dtype = torch.int8,
) -> torch.Size:
    """Deprecated. The shape of igemm's result.

    Raises:
        TypeError: A or B has another type.
        ValueError: sizes that do not fit, or an out of another shape.
    """
    if A.dtype != expected_type or B.dtype != expected_type:
        raise TypeError(f"Expected {expected_type} input tensors A and B, but got {A.dtype} and {B.dtype}")
    summed = A.dim() == B.dim() == 3 and out is not None and out.dim() == 2
    op = "igemm" if summed else "check_matmul"
    return _check_product(op, A, B, out, transposed_A, transposed_B, expected_type)


@deprecated(_DEPRECATED, category=FutureWarning)
def igemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> Tensor:
    """Deprecated. A @ B of int8 matrices; exact, in int32.

    Args:
        A: [M, K], or [batch, M, K].
        B: [K, N]. If A and B are both [batch, S, ...]: the sum over batch and S, [M, N], as for a gradient of weights.
        out: optional int32 tensor to receive the result.
        transposed_A, transposed_B: the last two dimensions are stored the other way round.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    shape = _check_product("igemm", A, B, out, transposed_A, transposed_B)
    if A.dim() == B.dim() == 3:
        a, b = (t.transpose(1, 2) if flag else t for t, flag in ((A, transposed_A), (B, transposed_B)))
        result = _product(a.reshape(-1, shape[0]), b.reshape(-1, shape[1]), True, False)
    else:
        result = _product(A, B, transposed_A, transposed_B)
    return result if out is None else out.copy_(result)


@deprecated(_DEPRECATED, category=FutureWarning)
def batched_igemm(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
) -> Tensor:
    """Deprecated. A [batch, M, K] @ B [batch, K, N] of int8 matrices, one by one; exact, in int32. Otherwise as igemm.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    shape = _check_product("batched_igemm", A, B, out, transposed_A, transposed_B)
    result = A.new_empty(shape, dtype=torch.int32)
    for i in range(shape[0]):
        result[i] = _product(A[i], B[i] if B.dim() == 3 else B, transposed_A, transposed_B)
    return fill("batched_igemm", "out", out, result)
