"""Sparse matrices as lists of coordinates, and their products with dense ones, for the outliers of activations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _checks as check
from .blockwise import fill
from .int8 import int8_vectorwise_dequant


def _check(name: str, nnz: int, values: Tensor, pointers: dict[str, tuple[Tensor, int]]) -> None:
    """Pointers are int32, each of its size, on the device of the nnz values."""
    check.tensor(name, "values", values)
    check.dtype(name, "values", values, *check.FLOATS)
    check.equal(name, "values", "size", values.numel(), nnz)
    for argument, (tensor, size) in pointers.items():
        check.tensor(name, argument, tensor)
        check.dtype(name, argument, tensor, torch.int32)
        check.equal(name, argument, "size", tensor.numel(), size)
        check.same_device(name, values.device, **{argument: tensor})


@dataclass(eq=False)
class COOSparseTensor:
    """A rows x cols matrix of nnz values, the i-th of which is at (rowidx[i], colidx[i]); indices are int32."""

    rows: int
    cols: int
    nnz: int
    rowidx: Tensor
    colidx: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        pointers = {"rowidx": (self.rowidx, self.nnz), "colidx": (self.colidx, self.nnz)}
        _check("COOSparseTensor", self.nnz, self.values, pointers)


@dataclass(eq=False)
class CSRSparseTensor:
    """A rows x cols matrix whose row i has the values rowptr[i] to rowptr[i + 1], at columns colidx, all int32."""

    rows: int
    cols: int
    nnz: int
    rowptr: Tensor
    colidx: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        pointers = {"rowptr": (self.rowptr, self.rows + 1), "colidx": (self.colidx, self.nnz)}
        _check("CSRSparseTensor", self.nnz, self.values, pointers)


@dataclass(eq=False)
class CSCSparseTensor:
    """A rows x cols matrix whose column j has the values colptr[j] to colptr[j + 1], at rows rowidx, all int32."""

    rows: int
    cols: int
    nnz: int
    colptr: Tensor
    rowidx: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        pointers = {"colptr": (self.colptr, self.cols + 1), "rowidx": (self.rowidx, self.nnz)}
        _check("CSCSparseTensor", self.nnz, self.values, pointers)


def coo_zeros(
    rows: int, cols: int, nnz: int, device: torch.device | str, dtype: torch.dtype = torch.half
) -> COOSparseTensor:
    """Room for nnz values, all zero at (0, 0)."""
    rowidx, colidx = (torch.zeros(nnz, dtype=torch.int32, device=device) for _ in range(2))
    return COOSparseTensor(rows, cols, nnz, rowidx, colidx, torch.zeros(nnz, dtype=dtype, device=device))


def _pointers(index: Tensor, n: int) -> Tensor:
    """How many of the sorted indices are below 0, 1, ... n."""
    counts = torch.bincount(index, minlength=n).cumsum(0)
    return torch.cat([counts.new_zeros(1), counts]).to(torch.int32)


def coo2csr(cooA: COOSparseTensor) -> CSRSparseTensor:
    """The same matrix by rows; within a row the values keep their order."""
    order = cooA.rowidx.argsort(stable=True)
    rowptr = _pointers(cooA.rowidx, cooA.rows)
    return CSRSparseTensor(cooA.rows, cooA.cols, cooA.nnz, rowptr, cooA.colidx[order], cooA.values[order])


def coo2csc(cooA: COOSparseTensor) -> CSCSparseTensor:
    """The same matrix by columns; within a column the values keep their order."""
    order = cooA.colidx.argsort(stable=True)
    colptr = _pointers(cooA.colidx, cooA.cols)
    return CSCSparseTensor(cooA.rows, cooA.cols, cooA.nnz, colptr, cooA.rowidx[order], cooA.values[order])


def _spmm(op: str, cooA: COOSparseTensor, B: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Products and sums in fp32; repeated coordinates add up."""
    for name, index, size in (("rowidx", cooA.rowidx, cooA.rows), ("colidx", cooA.colidx, cooA.cols)):
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            given = f"{int(index.min())} to {int(index.max())}"
            raise ValueError(f"{op}: cooA.{name} holds {given}, expected indices from 0 to {size - 1}")
    terms = cooA.values.float()[:, None] * B[cooA.colidx].float()
    y = terms.new_zeros(cooA.rows, B.shape[1]).index_add_(0, cooA.rowidx, terms)
    return fill(op, "out", out, y.to(dtype))


def _check_dense(op: str, cooA: COOSparseTensor, B: Tensor, *dtypes: torch.dtype) -> None:
    if not isinstance(cooA, COOSparseTensor):
        raise TypeError(f"{op}: cooA is {type(cooA).__name__}, expected a COOSparseTensor")
    check.tensor(op, "B", B)
    check.dtype(op, "B", B, *dtypes)
    check.equal(op, "B", "dimensions", B.dim(), 2)
    check.equal(op, "B", "rows", B.shape[0], cooA.cols)
    check.same_device(op, cooA.values.device, B=B)


def spmm_coo(cooA: COOSparseTensor, B: Tensor, out: Tensor | None = None) -> Tensor:
    """cooA @ B for a dense B [cols, N], in the dtype of the values; sums in fp32.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    _check_dense("spmm_coo", cooA, B, *check.FLOATS)
    return _spmm("spmm_coo", cooA, B, out, cooA.values.dtype)


def spmm_coo_very_sparse(
    cooA: COOSparseTensor, B: Tensor, dequant_stats: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """cooA @ B for a dense B [cols, N] of floats, or of int8 codes with one scale per column in dequant_stats.

    Args:
        dequant_stats: N fp32 scales; a code of column j stands for code * dequant_stats[j] / 127.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "spmm_coo_very_sparse"
    _check_dense(op, cooA, B, *check.FLOATS, torch.int8)
    if B.dtype == torch.int8:
        if dequant_stats is None:
            raise ValueError(f"{op}: dequant_stats is None, expected the scales of B, which has dtype int8")
        check.tensor(op, "dequant_stats", dequant_stats)
        check.equal(op, "dequant_stats", "size", dequant_stats.numel(), B.shape[1])
        B = int8_vectorwise_dequant(B.t(), dequant_stats).t()
    return _spmm(op, cooA, B, out, cooA.values.dtype)
