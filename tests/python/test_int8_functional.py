"""bitsandbytes.functional: int8 rows, integer products, sparse matrices, deprecated names; bitsandbytes.matmul."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference as ref
import torch
from process import run_python
from test_int8_ops import codes, values

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.autograd import GlobalOutlierPooler, MatMul8bitFp

# Parameters and their defaults as in the released package 0.50.2, and, from igemm's neighbours on, in 0.49.
SIGNATURES = {
    "int8_vectorwise_quant": "A, threshold=0.0",
    "int8_vectorwise_dequant": "A, stats",
    "int8_double_quant": "A, col_stats=None, row_stats=None, out_col=None, out_row=None, threshold=0.0",
    "int8_linear_matmul": "A, B, out=None, dtype=torch.int32",
    "int8_mm_dequant": "A, row_stats, col_stats, out=None, bias=None",
    "igemm": "A, B, out=None, transposed_A=False, transposed_B=False",
    "batched_igemm": "A, B, out=None, transposed_A=False, transposed_B=False",
    "COOSparseTensor": "rows, cols, nnz, rowidx, colidx, values",
    "CSRSparseTensor": "rows, cols, nnz, rowptr, colidx, values",
    "CSCSparseTensor": "rows, cols, nnz, colptr, rowidx, values",
    "coo_zeros": "rows, cols, nnz, device, dtype=torch.float16",
    "coo2csr": "cooA",
    "coo2csc": "cooA",
    "spmm_coo": "cooA, B, out=None",
    "spmm_coo_very_sparse": "cooA, B, dequant_stats=None, out=None",
}


def signature(function: Callable[..., Any]) -> str:
    return ", ".join(
        name if p.default is p.empty else f"{name}={p.default!r}"
        for name, p in inspect.signature(function).parameters.items()
    )


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    assert signature(getattr(F, name)) == SIGNATURES[name]
    assert name in F.__all__


def test_matmul_signature() -> None:
    assert signature(bnb.matmul) == "A, B, out=None, state=None, threshold=0.0, bias=None"


# ---- int8 rows


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_there_and_back(dtype: torch.dtype) -> None:
    """Half a step of each row, and half of a unit in the last place."""
    x = torch.randn(17, 301).to(dtype)
    q, scale, outliers = F.int8_vectorwise_quant(x)
    assert q.dtype == torch.int8 and outliers is None
    back = F.int8_vectorwise_dequant(q, scale)
    assert back.dtype == torch.float32
    assert ((back - x.float()).abs() <= scale[:, None] * (0.5 / 127 + 1e-6)).all()
    ref.assert_bits(scale, x.float().abs().amax(1))


def test_double_quant_fills_given_tensors() -> None:
    x = values(6, 50, torch.float16)
    row, col, rows, cols, outliers = F.int8_double_quant(x, threshold=6.0)
    given = [torch.empty_like(t) for t in (cols, rows, col, row)]
    found = F.int8_double_quant(x, *given, threshold=6.0)
    for f, g, e in zip(found, reversed(given), (row, col, rows, cols), strict=False):
        assert f is g and torch.equal(f, e)
    assert torch.equal(found[4], outliers) and outliers.numel()


@pytest.mark.parametrize("dtype", [None, *ref.FLOATS], ids=str)
def test_product_of_two_quantized_matrices(dtype: torch.dtype | None) -> None:
    a, b, bias = torch.randn(7, 129), torch.randn(33, 129), torch.randn(33)
    (qa, sa, _), (qb, sb, _) = F.int8_vectorwise_quant(a), F.int8_vectorwise_quant(b)
    out = None if dtype is None else torch.empty(7, 33, dtype=dtype)
    y = F.int8_mm_dequant(F.int8_linear_matmul(qa, qb), sa, sb, out, bias)
    assert y.dtype == (dtype or torch.float16) and (out is None or y is out)
    exact = (qa.double() * sa.double()[:, None]) @ (qb.double() * sb.double()[:, None]).t() / 127**2 + bias
    assert ref.relative_error(y, exact) < {torch.float32: 1e-6, torch.bfloat16: 4e-3}.get(y.dtype, 5e-4)
    assert ref.relative_error(y, a @ b.t() + bias) < 0.02


def test_linear_matmul_out_may_be_strided() -> None:
    a, b = codes(5, 40), codes(6, 40)
    out = torch.zeros(6, 5, dtype=torch.int32).t()
    assert F.int8_linear_matmul(a, b, out) is out
    assert torch.equal(out, F.int8_linear_matmul(a, b))


# ---- integer products


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() @ b.double()).to(torch.int32)


@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 5, 7), (32, 64, 96), (17, 33, 1025)])
def test_igemm(m: int, n: int, k: int, flags: tuple[bool, bool]) -> None:
    a, b = codes(m, k), codes(k, n)
    stored = [t.t().contiguous() if flag else t for t, flag in zip((a, b), flags, strict=True)]
    out = torch.empty(m, n, dtype=torch.int32)
    assert torch.equal(F.igemm(*stored, None, *flags), exact(a, b))
    assert F.igemm(*stored, out, *flags) is out and torch.equal(out, exact(a, b))
    views = [t.t() if flag else t for t, flag in zip(stored, flags, strict=True)]
    assert torch.equal(F.igemm(*views), exact(a, b))


def test_igemm_of_three_dimensions() -> None:
    a, b, c = codes(4, 9, 33), codes(33, 21), codes(4, 9, 5)
    assert torch.equal(F.igemm(a, b), exact(a, b))
    assert torch.equal(F.igemm(a, b.t().contiguous(), transposed_B=True), exact(a, b))
    assert torch.equal(F.igemm(a, c), exact(a.reshape(36, 33).t(), c.reshape(36, 5)))


@pytest.mark.parametrize("flags", [(False, False), (False, True), (True, False), (True, True)], ids=str)
def test_batched_igemm(flags: tuple[bool, bool]) -> None:
    a, b = codes(3, 7, 33), codes(3, 33, 10)
    stored = [t.transpose(1, 2).contiguous() if flag else t for t, flag in zip((a, b), flags, strict=True)]
    out = torch.empty(3, 7, 10, dtype=torch.int32)
    assert torch.equal(F.batched_igemm(*stored, None, *flags), exact(a, b))
    assert F.batched_igemm(*stored, out, *flags) is out and torch.equal(out, exact(a, b))
    with pytest.raises(RuntimeError, match="single memory location"):
        F.batched_igemm(*stored, torch.empty(1, 7, 10, dtype=torch.int32).expand(3, 7, 10), *flags)


# ---- sparse matrices


def sparse(rows: int, cols: int, nnz: int, dtype: torch.dtype) -> tuple[F.COOSparseTensor, torch.Tensor]:
    """With some places given twice, and the dense matrix in fp64."""
    row, col = (torch.randint(0, n, (nnz,), dtype=torch.int32) for n in (rows, cols))
    value = torch.randn(nnz).to(dtype)
    dense = torch.zeros(rows, cols, dtype=torch.float64).index_put_((row, col), value.double(), accumulate=True)
    return F.COOSparseTensor(rows, cols, nnz, row, col, value), dense


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_spmm(dtype: torch.dtype) -> None:
    coo, dense = sparse(13, 40, 60, dtype)
    b = torch.randn(40, 9).to(dtype)
    q, scale, _ = F.int8_vectorwise_quant(b.t())
    decoded = F.int8_vectorwise_dequant(q, scale).t()
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for found, expected in (
        (F.spmm_coo(coo, b), dense @ b.double()),
        (F.spmm_coo_very_sparse(coo, b), dense @ b.double()),
        (F.spmm_coo_very_sparse(coo, q.t(), scale), dense @ decoded.double()),
    ):
        assert found.dtype == dtype and ref.relative_error(found, expected) < tolerance
    out = torch.empty(13, 9, dtype=dtype)
    assert F.spmm_coo(coo, b, out) is out and ref.relative_error(out, dense @ b.double()) < tolerance


@pytest.mark.parametrize("name", ["rowidx", "colidx"])
@pytest.mark.parametrize("index", [-1, 40])
def test_spmm_refuses_indices_outside(name: str, index: int) -> None:
    coo, _ = sparse(40, 40, 60, torch.float32)
    getattr(coo, name)[7] = index
    with pytest.raises(ValueError, match=f"spmm_coo: cooA.{name} holds .* expected indices from 0 to 39"):
        F.spmm_coo(coo, torch.randn(40, 9))


def test_by_rows_and_by_columns() -> None:
    coo, dense = sparse(13, 40, 60, torch.float32)
    csr, csc = F.coo2csr(coo), F.coo2csc(coo)
    rows, cols = torch.zeros_like(dense), torch.zeros_like(dense)
    for i in range(13):
        for j in range(int(csr.rowptr[i]), int(csr.rowptr[i + 1])):
            rows[i, csr.colidx[j]] += csr.values[j].double()
    for i in range(40):
        for j in range(int(csc.colptr[i]), int(csc.colptr[i + 1])):
            cols[csc.rowidx[j], i] += csc.values[j].double()
    assert torch.equal(rows, dense) and torch.equal(cols, dense)
    assert csr.rowptr.dtype == csc.colptr.dtype == torch.int32


def test_coo_zeros() -> None:
    coo = F.coo_zeros(3, 4, 5, "cpu")
    assert (coo.rows, coo.cols, coo.nnz, coo.values.dtype) == (3, 4, 5, torch.float16)
    assert not F.spmm_coo(coo, torch.randn(4, 2)).any()


# ---- wrong arguments

COO = F.coo_zeros(3, 4, 2, "cpu")
WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: F.int8_vectorwise_quant(None), "int8_vectorwise_quant: A is NoneType"),
    (lambda: F.int8_vectorwise_quant(torch.ones(2, 2), -1.0), "int8_vectorwise_quant: threshold is -1"),
    (lambda: F.int8_vectorwise_dequant(codes(2, 2), torch.ones(3)), "int8_vectorwise_dequant: stats"),
    (lambda: F.int8_double_quant(torch.ones(2, 2), out_row=torch.ones(2, 2)), "int8_double_quant: out_row has dtype"),
    (lambda: F.int8_linear_matmul(codes(2, 2), codes(2, 2), dtype=torch.float32), "int8_linear_matmul: dtype is"),
    (lambda: F.int8_linear_matmul(codes(2, 2), codes(2, 3)), "int8_linear_matmul: B"),
    (lambda: F.int8_mm_dequant(codes(2, 2).int(), torch.ones(2), torch.ones(3)), "int8_mm_dequant: col_stats"),
    (lambda: F.int8_mm_dequant(codes(2, 2).int(), torch.ones(2), [1, 2]), "int8_mm_dequant: col_stats is list"),
    (lambda: F.igemm(codes(2, 3), codes(4, 5)), "igemm: B has shape"),
    (lambda: F.igemm(codes(2), codes(4, 5)), "igemm: A has 1 dimensions"),
    (lambda: F.igemm(codes(2, 3), codes(1, 3, 5)), "igemm: B has shape"),
    (lambda: F.igemm(codes(2, 3), torch.ones(3, 5)), "igemm: B has dtype float32"),
    (lambda: F.igemm(codes(2, 3), codes(3, 5), torch.ones(2, 5)), "igemm: out has dtype"),
    (lambda: F.batched_igemm(codes(2, 3), codes(3, 5)), "batched_igemm: A has 2"),
    (lambda: F.batched_igemm(codes(2, 2, 3), codes(1, 3, 5)), "batched_igemm: B has shape"),
    (
        lambda: F.COOSparseTensor(3, 4, 2, COO.rowidx.long(), COO.colidx, COO.values),
        "COOSparseTensor: rowidx has dtype",
    ),
    (lambda: F.COOSparseTensor(3, 4, 3, COO.rowidx, COO.colidx, COO.values), "COOSparseTensor: values has size 2"),
    (lambda: F.spmm_coo(COO, torch.ones(3, 4)), "spmm_coo: B has rows 3"),
    (lambda: F.spmm_coo(None, torch.ones(3, 4)), "spmm_coo: cooA is NoneType"),
    (lambda: F.spmm_coo_very_sparse(COO, codes(4, 2)), "spmm_coo_very_sparse: dequant_stats is None"),
    (lambda: bnb.matmul(torch.ones(2, 4), codes(3, 4)), "matmul: state.SCB is None"),
    (lambda: bnb.matmul(torch.ones(2, 4), torch.ones(3, 5)), "matmul: B has shape"),
    (lambda: bnb.matmul(torch.ones(2, 4), torch.ones(3, 4), state=5), "matmul: state is int"),
    (lambda: bnb.matmul(None, torch.ones(3, 4)), "matmul: A is NoneType"),
    (lambda: bnb.matmul(torch.ones(2, 4), torch.ones(3, 4), bias=[1.0]), "matmul: bias is list"),
    (lambda: bnb.matmul(torch.ones(2, 4), torch.ones(3, 4), threshold=-1.0), "matmul: threshold is -1"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m for _, m in WRONG])
def test_wrong_arguments_are_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"^{message}.*expected"):
        call()


# ---- matmul


@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_matmul_and_its_gradients(dtype: torch.dtype, threshold: float) -> None:
    """For A through the dequantized weight, for B and bias as of a product of floats; all against fp64."""
    a, b, bias = (torch.randn(shape).to(dtype).requires_grad_() for shape in ((2, 5, 65), (17, 65), (17,)))
    q, scale, _ = F.int8_vectorwise_quant(b.detach())
    weight = q.double() * scale.double()[:, None] / 127
    y = bnb.matmul(a, b, threshold=threshold, bias=bias)
    assert y.dtype == dtype
    assert ref.relative_error(y, torch.nn.functional.linear(a.double(), b.double(), bias.double())) < 0.02
    with torch.no_grad():
        ref.assert_bits(bnb.matmul(a, b, threshold=threshold, bias=bias), y.detach())
        out = torch.empty_like(y)
        assert bnb.matmul(a, b, out, threshold=threshold, bias=bias) is out
        ref.assert_bits(out, y.detach())
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, (a, b, bias), grad)
    g, rows = grad.double(), grad.double().reshape(-1, 17)
    expected = g @ weight, rows.t() @ a.detach().double().reshape(-1, 65), rows.sum(0)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for found, e, like in zip(grads, expected, (a, b, bias), strict=True):
        assert found.dtype == dtype and found.shape == like.shape
        assert ref.relative_error(found, e) < tolerance


def test_matmul_keeps_a_weight_that_is_not_to_learn() -> None:
    a, b = torch.randn(3, 32), torch.randn(8, 32)
    state = bnb.MatmulLtState()
    state.has_fp16_weights = False
    first = bnb.matmul(a, b, state=state)
    kept = state.CB
    ref.assert_bits(bnb.matmul(a, b, state=state), first)
    ref.assert_bits(bnb.matmul(a, state.CB, state=state), first)
    for other in (state.CB.t(), torch.zeros(2, 2), None):  # CB of the state is the weight, whatever else is given
        ref.assert_bits(bnb.matmul(a, other, state=state), first)
    assert state.CB is kept
    state.reset_grads()
    assert state.CB is None and state.SCB is None
    state.has_fp16_weights = True
    bnb.matmul(a, b, state=state)
    assert torch.equal(bnb.matmul(a, 2 * b, state=state), 2 * first)


def test_matmul_with_floats_of_the_weight_alone() -> None:
    """MatMul8bitFp does not round the activations."""
    a, b, bias = (torch.randn(shape, requires_grad=True) for shape in ((4, 64), (16, 64), (16,)))
    q, scale, _ = F.int8_vectorwise_quant(b.detach())
    weight = q.double() * scale.double()[:, None] / 127
    y = MatMul8bitFp.apply(a, b, None, bias)
    assert ref.relative_error(y, a.double() @ weight.t() + bias) < 1e-6
    grads = torch.autograd.grad(y.sum(), (a, b, bias))
    for found, e in zip(
        grads, (weight.sum(0).expand(4, 64), a.sum(0).expand(16, 64), torch.full((16,), 4)), strict=True
    ):
        assert ref.relative_error(found, e) < 1e-6


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (32,)])
def test_matmul_of_other_shapes(shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    y = bnb.matmul(a, b)
    assert y.shape == (*shape[:-1], 8)
    grads = torch.autograd.grad(y.sum(), (a, b))
    assert grads[0].shape == a.shape and grads[1].shape == b.shape


def test_state_knows_old_names() -> None:
    state = bnb.MatmulLtState()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert [getattr(state, n) for n in ("CxB", "CxBt", "formatB", "_tile_indices")] == [None] * 4
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = state.nope
    assert repr(state).startswith("MatmulLtState(force_no_igemmlt=False, CB=None, SB=None, SCB=None, SBt=None")


def test_outlier_pool() -> None:
    pool = GlobalOutlierPooler.get_instance()
    assert pool is GlobalOutlierPooler.get_instance()
    pool.initialize()
    pool.add_outliers(torch.tensor([5, 1]), 8)
    pool.add_outliers(torch.tensor([7]), 32)  # an input of another width
    pool.add_outliers(torch.tensor([2]), 8)
    assert pool.get_current_outlier_idx().tolist() == [1, 2, 5]
    with pytest.raises(RuntimeError, match="get_instance"):
        GlobalOutlierPooler()


# ---- deprecated names


def test_deprecated_quantization() -> None:
    x, code = torch.randn(7, 33), F.create_dynamic_map()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        q, state = F.quantize(x)
        assert torch.equal(state[0], x.abs().max())
        nearest = (x.double()[..., None] / state[0].double() - code.double()).abs().argmin(-1)
        assert (q.long() - nearest).abs().max() <= 1  # a tie of two neighbours
        back = F.dequantize(q, state)
        assert torch.equal(back, code[q.long()] * state[0])
        assert torch.equal(F.dequantize(q, absmax=state[0], code=code), back)
        unit = x / state[0]
        assert torch.equal(F.dequantize_no_absmax(F.quantize_no_absmax(unit, code), code) * state[0], back)
        with pytest.raises(ValueError, match="dequantize: state and absmax are both None, expected"):
            F.dequantize(q)


def test_deprecated_names_warn_once() -> None:
    code = """
import warnings
warnings.simplefilter("always")
import torch, bitsandbytes as bnb, bitsandbytes.functional as F
x, code = torch.ones(4), F.create_dynamic_map()
for _ in range(3):
    q, state = F.quantize(x)
    F.dequantize(q, state)
    F.dequantize_no_absmax(F.quantize_no_absmax(x, code), code)
    bnb.MatmulLtState().CxB
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    names = ("quantize", "dequantize", "quantize_no_absmax", "dequantize_no_absmax", "MatmulLtState.CxB")
    found = [line for line in run.stderr.splitlines() if "FutureWarning" in line]
    assert len(found) == len(names)
    for name in names:
        assert sum(f"FutureWarning: {name} is deprecated" in line for line in found) == 1
