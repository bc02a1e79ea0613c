"""The operators of LLM.int8() in plain torch, for any device that has no kernel of its own (docs/NUMERICS.md)."""

from typing import Any

import torch
from torch import Tensor

from ... import _checks as check
from ..._ops_int8 import (
    Linear,
    MixedScaledMm,
    MmDequant,
    ScaledMm,
    as_rows,
    check_dequant,
    check_linear,
    check_matmul,
    check_mixed,
    check_mm_dequant,
    check_quant,
    check_scaled_mm,
)
from ..utils import default_kernel

_ops = torch.ops.bitsandbytes
_FLOAT_MAX = torch.finfo(torch.float32).max
_EXACT = 1024  # products of two codes whose sum a float holds exactly: 1024 * 128 * 128 = 2^24


def _outliers(x: Tensor, threshold: float) -> Tensor | None:
    return x.abs() >= threshold if threshold > 0 else None


def _quantize(x: Tensor, outliers: Tensor | None, dim: int) -> tuple[Tensor, Tensor]:
    """code = x * (127 * (1 / scale)) and scale = max |x| along `dim`, without the outliers, in fp32."""
    magnitude = x.abs() if outliers is None else x.abs().masked_fill(outliers, 0)
    shape = (x.shape[0], 1) if dim == 1 else (1, x.shape[1])
    scale = magnitude.amax(dim, keepdim=True) if x.shape[dim] else x.new_zeros(shape)
    # The first factor keeps 1 / scale finite.
    first = torch.where(scale < 2.0**-100, 2.0**100, 1.0)
    usable = (scale > 0) & (scale <= _FLOAT_MAX)
    codes = x * first * (127 * (scale * first).reciprocal())
    codes = codes.masked_fill(~usable if outliers is None else ~usable | outliers, 0)
    return codes.round().to(torch.int8), scale.view(-1)


def _outlier_columns(outliers: Tensor | None) -> Tensor | None:
    return None if outliers is None else outliers.any(0).nonzero().view(-1)


def _quantize_rows(x: Tensor, outliers: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    codes, scale = _quantize(x, outliers, 1)
    columns = _outlier_columns(outliers)
    if columns is not None:
        codes[:, columns] = 0
    return codes, scale, columns


def _sums(A: Tensor, B: Tensor) -> Tensor:
    """A @ B^T of codes in int32, exact: through fp32 in pieces that it holds exactly, on every device."""
    sums = torch.zeros(A.shape[0], B.shape[0], dtype=torch.int32, device=A.device)
    for k in range(0, A.shape[1], _EXACT):
        sums += (A[:, k : k + _EXACT].float() @ B[:, k : k + _EXACT].float().t()).to(torch.int32)
    return sums


def _dequantize_sums(sums: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    return sums.float() * (column_scale.view(1, -1) * (1 / 127**2)) * row_scale.view(-1, 1)


def _outlier_product(x: Tensor, CB: Tensor, SCB: Tensor, columns: Tensor | None) -> Tensor | float:
    """What the outlier columns of x, which are zero in its codes, add to the product."""
    if columns is None or columns.numel() == 0:
        return 0.0
    return x[:, columns].float() @ (CB[:, columns].float() * (SCB.view(-1, 1) * (1 / 127))).t()


def _epilogue(y: Tensor, bias: Tensor | None, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Adds the bias and rounds once."""
    y = y if bias is None else y + bias.reshape(-1).float()
    return y.to(dtype).view(*like.shape[:-1], y.shape[1])


@default_kernel("bitsandbytes::int8_vectorwise_quant")
def _(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    check_quant("int8_vectorwise_quant", A, threshold)
    x = as_rows(A).float()
    codes, scale, columns = _quantize_rows(x, _outliers(x, threshold))
    return codes.view(A.shape), scale, columns


@default_kernel("bitsandbytes::int8_double_quant")
def _(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    check_quant("int8_double_quant", A, threshold)
    x = as_rows(A).float()
    outliers = _outliers(x, threshold)
    codes, row_scale, columns = _quantize_rows(x, outliers)
    codes_by_column, column_scale = _quantize(x, outliers, 0)
    return codes.view(A.shape), codes_by_column.view(A.shape), row_scale, column_scale, columns


@default_kernel("bitsandbytes::int8_vectorwise_dequant")
def _(A: Tensor, stats: Tensor) -> Tensor:
    check_dequant(A, stats)
    return (as_rows(A).float() * stats.view(-1, 1) * (1 / 127)).view(A.shape)


@default_kernel("bitsandbytes::int8_linear_matmul")
def _(A: Tensor, B: Tensor) -> Tensor:
    check_matmul("int8_linear_matmul", A, B)
    return _sums(as_rows(A), B).view(*A.shape[:-1], B.shape[0])


@default_kernel("bitsandbytes::int8_linear_matmul.out")
def _(A: Tensor, B: Tensor, out: Tensor) -> None:
    check_matmul("int8_linear_matmul", A, B)
    check.out_like("int8_linear_matmul", out, (*A.shape[:-1], B.shape[0]), torch.int32, A.device)
    out.copy_(_ops.int8_linear_matmul.default(A, B))


@default_kernel("bitsandbytes::int8_mm_dequant")
def _(*arguments: Any) -> Tensor:
    d = MmDequant(*arguments)
    dtype = check_mm_dequant(d)
    return _epilogue(_dequantize_sums(as_rows(d.A), d.row_stats, d.col_stats), d.bias, dtype, d.A)


@default_kernel("bitsandbytes::int8_scaled_mm")
def _(*arguments: Any) -> Tensor:
    d = ScaledMm(*arguments)
    dtype = check_scaled_mm(d)
    y = _dequantize_sums(_sums(as_rows(d.A), d.B), d.row_stats, d.col_stats)
    return _epilogue(y, d.bias, dtype, d.A)


@default_kernel("bitsandbytes::int8_mixed_scaled_mm")
def _(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    d = MixedScaledMm(*arguments)
    check_mixed(d)
    y = _dequantize_sums(_sums(as_rows(d.CA), d.CB), d.SCA, d.SCB)
    y = y + _outlier_product(as_rows(d.A), d.CB, d.SCB, d.outlier_cols)
    subset = None if d.outlier_cols is None else d.A[..., d.outlier_cols].contiguous()
    return _epilogue(y, d.bias, d.A.dtype, d.A), subset


def int8_linear(*arguments: Any) -> Tensor:
    d = Linear(*arguments)
    check_linear(d)
    x = as_rows(d.A).float()
    codes, scale, columns = _quantize_rows(x, _outliers(x, d.threshold))
    y = _dequantize_sums(_sums(codes, d.CB), scale, d.SCB) + _outlier_product(x, d.CB, d.SCB, columns)
    return _epilogue(y, d.bias, d.A.dtype, d.A)


for _name in ("int8_linear", "int8_linear.forward"):
    default_kernel(f"bitsandbytes::{_name}")(int8_linear)
