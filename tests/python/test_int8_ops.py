"""The operators of LLM.int8(): against plain code, fp64 products and the contract of torch operators."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from test_default_backend import on_other_device
from test_ops import OPCHECKS, overload

ops = torch.ops.bitsandbytes

# As printed by the released package 0.50.2.
SCHEMAS = [
    f"bitsandbytes::{schema}"
    for schema in (
        "int8_vectorwise_quant(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor?)",
        "int8_vectorwise_dequant(Tensor A, Tensor stats) -> Tensor",
        "int8_double_quant(Tensor A, float threshold=0.) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)",
        "int8_linear_matmul(Tensor A, Tensor B) -> Tensor",
        "int8_linear_matmul.out(Tensor A, Tensor B, Tensor($0! -> ) out) -> ()",
        "int8_mm_dequant(Tensor A, Tensor row_stats, Tensor col_stats, ScalarType? dtype=None, Tensor? bias=None) "
        "-> Tensor",
        "int8_scaled_mm(Tensor A, Tensor B, Tensor row_stats, Tensor col_stats, Tensor? bias=None, "
        "ScalarType? dtype=None) -> Tensor",
        "int8_mixed_scaled_mm(Tensor A, Tensor CA, Tensor CB, Tensor SCA, Tensor SCB, Tensor? outlier_cols=None, "
        "Tensor? bias=None) -> (Tensor, Tensor?)",
    )
]
# Its own: a whole forward in one call.
LINEAR = "bitsandbytes::int8_linear(Tensor A, Tensor CB, Tensor SCB, Tensor? bias=None, float threshold=0.) -> Tensor"


def name_of(schema: str) -> str:
    return schema.partition("(")[0].removeprefix("bitsandbytes::")


@pytest.mark.parametrize("schema", [*SCHEMAS, LINEAR], ids=name_of)
def test_schema(schema: str) -> None:
    assert str(overload(name_of(schema))._schema) == schema


# ---- rows and columns, bit for bit


def quantize_line(x: np.ndarray, threshold: float) -> tuple[list[int], np.float32, list[bool]]:
    """Codes, scale and outliers of one row or column, in Python and float32."""
    outlier = [threshold > 0 and bool(abs(v) >= threshold) for v in x]
    kept = [abs(v) for v, out in zip(x, outlier, strict=True) if not out]
    scale = np.float32(np.nan if any(np.isnan(v) for v in kept) else max(kept, default=0))
    if not 0 < scale <= np.finfo(np.float32).max:
        return [0] * len(x), scale, outlier
    first = np.float32(2.0**100 if scale < 2.0**-100 else 1)
    factor = np.float32(127) * (np.float32(1) / (scale * first))
    codes = [0 if out else int(np.rint(v * first * factor)) for v, out in zip(x, outlier, strict=True)]
    return codes, scale, outlier


def quantize_rows(x: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lines = [quantize_line(row, np.float32(threshold)) for row in x]
    codes = np.array([line[0] for line in lines], np.int8).reshape(x.shape)
    outliers = np.array([line[2] for line in lines], bool).reshape(x.shape).any(0)
    codes[:, outliers] = 0
    return codes, np.array([line[1] for line in lines], np.float32), np.flatnonzero(outliers)


def values(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal values with some of every other kind: outliers, ties, zeros, tiny ones."""
    x = torch.randn(rows, columns)
    if x.numel():
        x.view(-1)[:: 3 * columns + 7] = 9.5
        x[rows // 2] *= 1e-3
        x[rows - 1] = 0
        x.view(-1)[5::11] = 0.5
    return x.to(dtype)


SHAPES = [(1, 1), (1, 64), (3, 7), (5, 63), (2, 65), (9, 130), (4, 1031), (0, 4), (3, 0)]
THRESHOLDS = [0.0, 6.0, 0.5, 1e-5]


@pytest.mark.parametrize("device", ["native", "default"])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_quantize_rows_and_columns(dtype: torch.dtype, device: str) -> None:
    call = on_other_device if device == "default" else lambda name, *args: overload(name)(*args)
    for (rows, columns), threshold in itertools.product(SHAPES, THRESHOLDS):
        x = values(rows, columns, dtype)
        before = x.clone()
        plain = ref.floats(x).reshape(rows, columns)
        codes, scale, outliers = quantize_rows(plain, threshold)
        column_lines = [quantize_line(c, np.float32(threshold)) for c in plain.T]
        column_codes = np.array([line[0] for line in column_lines], np.int8).reshape(columns, rows).T
        column_scale = np.array([line[1] for line in column_lines], np.float32)
        found = call("int8_vectorwise_quant", x, threshold)
        both = call("int8_double_quant", x, threshold)
        for result in (found, (both[0], both[2], both[4])):
            np.testing.assert_array_equal(result[0].numpy(), codes)
            ref.assert_bits(result[1], torch.from_numpy(scale))
            if threshold == 0:
                assert result[2] is None
            else:
                assert result[2].dtype == torch.int64 and result[2].tolist() == outliers.tolist()
        np.testing.assert_array_equal(both[1].numpy(), column_codes)
        ref.assert_bits(both[3], torch.from_numpy(column_scale))
        ref.assert_bits(x, before)


@pytest.mark.parametrize("device", ["native", "default"])
def test_special_values(device: str) -> None:
    """A row with a NaN, or an infinity that is no outlier, has that scale and codes 0; so have rows of zeros."""
    call = on_other_device if device == "default" else lambda name, *args: overload(name)(*args)
    x = torch.tensor([[1.0, torch.nan, 2], [torch.inf, 1, 2], [0, -0.0, 0], [1e-38, -3e-39, 0], [3e38, -1e38, 0]])
    codes, scale, _ = call("int8_vectorwise_quant", x)
    assert codes.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [127, -38, 0], [127, -42, 0]]
    ref.assert_bits(scale, torch.tensor([torch.nan, torch.inf, 0, 1e-38, 3e38]))
    codes, scale, outliers = call("int8_vectorwise_quant", x[:3], 6.0)
    assert codes.tolist() == [[0, 0, 0], [0, 64, 127], [0, 0, 0]] and outliers.tolist() == [0]
    ref.assert_bits(scale, torch.tensor([torch.nan, 2, 0]))


def test_leading_dimensions_are_rows_and_layouts_do_not_matter() -> None:
    x = values(12, 70, torch.bfloat16)
    expected = ops.int8_vectorwise_quant(x, 6.0)
    for layout in (x.view(3, 4, 70), x.t().contiguous().t(), torch.cat([x, x], 1)[:, :70]):
        found = ops.int8_vectorwise_quant(layout, 6.0)
        assert found[0].shape == layout.shape and found[1].shape == (12,)
        assert torch.equal(found[0].view(12, 70), expected[0]) and torch.equal(found[2], expected[2])
        ref.assert_bits(found[1], expected[1])


def test_dequantize_rows() -> None:
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat(3, 1)
    scale = torch.tensor([1.0, 0.3, 1e-40])
    exact = codes.double() * scale.double()[:, None] / 127
    for found in (ops.int8_vectorwise_dequant(codes, scale), on_other_device("int8_vectorwise_dequant", codes, scale)):
        assert found.dtype == torch.float32
        expected = codes.float() * scale[:, None] * torch.tensor(1 / 127)
        ref.assert_bits(found, expected)
        torch.testing.assert_close(found.double(), exact, rtol=2e-7, atol=1e-44)


# ---- products


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


PRODUCTS = [
    (1, 1, 1),
    (1, 7, 64),
    (3, 5, 63),
    (17, 33, 129),
    (4, 64, 1025),
    (2, 3, 4099),
    (0, 4, 8),
    (3, 0, 8),
    (3, 4, 0),
]


@pytest.mark.parametrize("device", ["native", "default"])
def test_sums_are_exact(device: str) -> None:
    call = on_other_device if device == "default" else lambda name, *args: overload(name)(*args)
    for m, n, k in PRODUCTS:
        a, b = codes(m, k), codes(n, k)
        exact = torch.from_numpy(a.numpy().astype(np.int64) @ b.numpy().astype(np.int64).T).to(torch.int32)
        assert torch.equal(call("int8_linear_matmul", a, b), exact)
        out = torch.full((m, n), 7, dtype=torch.int32)
        call("int8_linear_matmul.out", a, b, out)
        assert torch.equal(out, exact)
        assert torch.equal(call("int8_linear_matmul", a.view(1, m, k), b), exact.view(1, m, n))
    most = torch.full((1, 100_000), -128, dtype=torch.int8)
    assert call("int8_linear_matmul", most, most).item() == 128 * 128 * 100_000


def exact_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """In fp64 from the stored operands, and the size of what was summed."""
    q, rows, outliers = ops.int8_vectorwise_quant(x, threshold)
    w = weight.double() * scale.double()[:, None] / 127
    a = q.double() * torch.nan_to_num(rows.double())[..., None] / 127
    if outliers is not None:
        a[:, outliers] = x[:, outliers].double()
    y, size = a @ w.t(), a.abs() @ w.abs().t()
    return (y, size) if bias is None else (y + bias.double(), size + bias.double().abs())


@pytest.mark.parametrize("device", ["native", "default"])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_linear(dtype: torch.dtype, device: str) -> None:
    """1e-6 from the fp64 product of the stored operands before the one rounding; the parts give the whole."""
    call = on_other_device if device == "default" else lambda name, *args: overload(name)(*args)
    unit = {torch.float32: 0, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    for (m, n, k), threshold, has_bias in itertools.product(PRODUCTS, (0.0, 6.0, 1.5), (False, True)):
        x, (weight, scale, _) = values(m, k, dtype), ops.int8_vectorwise_quant(torch.randn(n, k))
        bias = torch.randn(n).to(dtype) if has_bias else None
        exact, size = exact_linear(x, weight, scale, bias, threshold)
        y = call("int8_linear", x, weight, scale, bias, threshold)
        assert y.dtype == dtype and y.shape == (m, n)
        bound = (1e-6 * size + unit * exact.abs()) * 1.01 + (2**-24 if dtype == torch.float16 else 1e-40)
        assert ((y.double() - exact).abs() <= bound).all(), (m, n, k, threshold)
        q, rows, outliers = call("int8_vectorwise_quant", x, threshold)
        mixed, sub = call("int8_mixed_scaled_mm", x, q, weight, rows, scale, outliers, bias)
        torch.testing.assert_close(mixed, y, rtol=2 * unit + 1e-6, atol=1e-5)
        assert (sub is None) if outliers is None else torch.equal(sub, x[:, outliers])
        if outliers is None:
            sums = call("int8_linear_matmul", q, weight)
            ref.assert_bits(call("int8_scaled_mm", q, weight, rows, scale, bias, dtype), y)
            ref.assert_bits(call("int8_mm_dequant", sums, rows, scale, dtype, bias), y)


@pytest.mark.parametrize("device", ["native", "default"])
def test_epilogue_bytes(device: str) -> None:
    """(sum * (column * fl(1 / 127^2))) * row + bias, each step in float32."""
    call = on_other_device if device == "default" else lambda name, *args: overload(name)(*args)
    sums = torch.randint(-(2**31), 2**31, (50, 67), dtype=torch.int32)
    rows, columns, bias = torch.rand(50), torch.rand(67) * 3, torch.randn(67)
    scaled = sums.numpy().astype(np.float32) * (columns.numpy() * (np.float32(1) / np.float32(127**2)))
    expected = torch.from_numpy(scaled * rows.numpy()[:, None] + bias.numpy())
    ref.assert_bits(call("int8_mm_dequant", sums, rows, columns, torch.float32, bias), expected)
    ref.assert_bits(call("int8_mm_dequant", sums, rows, columns, torch.bfloat16, bias), expected.bfloat16())


@pytest.mark.parametrize("bias_dtype", ref.FLOATS, ids=str)
def test_bias_of_another_type_is_not_rounded(bias_dtype: torch.dtype) -> None:
    x, (weight, scale, _) = torch.randn(3, 40), ops.int8_vectorwise_quant(torch.randn(5, 40))
    bias = torch.randn(5).to(bias_dtype)
    expected = ops.int8_linear(x, weight, scale) + bias.float()
    ref.assert_bits(ops.int8_linear(x, weight, scale, bias), expected)


def test_default_dtype_is_that_of_the_released_package() -> None:
    q, w = codes(3, 8), codes(5, 8)
    assert ops.int8_scaled_mm(q, w, torch.rand(3), torch.rand(5)).dtype == torch.float16
    assert ops.int8_mm_dequant(ops.int8_linear_matmul(q, w), torch.rand(3), torch.rand(5)).dtype == torch.float16


def test_large_values_stay_finite() -> None:
    """1e30 times weights of normal size fits bfloat16 and float32, and so does every step."""
    x = (torch.randn(4, 256) * 1e30).bfloat16()
    weight, scale, _ = ops.int8_vectorwise_quant(torch.randn(8, 256))
    for threshold in (0.0, 6.0):
        y = ops.int8_linear(x, weight, scale, None, threshold)
        assert y.isfinite().all()
        torch.testing.assert_close(
            y.double(), exact_linear(x, weight, scale, None, threshold)[0], rtol=2**-7, atol=1e27
        )


# ---- the contract


def opcheck_cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    for dtype, shape in itertools.product(ref.FLOATS, [(3, 16), (2, 3, 33), (0, 16), (16,)]):
        x = torch.randn(shape).to(dtype)
        if x.numel():
            x.view(-1)[3] = 9
        for threshold in (0.0, 6.0):
            yield "int8_vectorwise_quant", (x, threshold)
            yield "int8_double_quant", (x, threshold)
        q, rows, outliers = ops.int8_vectorwise_quant(x, 6.0)
        yield "int8_vectorwise_dequant", (q, rows)
        w, scale, bias = codes(5, shape[-1]), torch.rand(5), torch.randn(5).to(dtype)
        out = (*shape[:-1], 5)
        yield "int8_linear_matmul", (q, w)
        yield "int8_linear_matmul.out", (q, w, torch.empty(out, dtype=torch.int32))
        yield "int8_mm_dequant", (ops.int8_linear_matmul(q, w), rows, scale, dtype, bias)
        yield "int8_scaled_mm", (q, w, rows, scale, bias, dtype)
        yield "int8_mixed_scaled_mm", (x, q, w, rows, scale, None, bias)
        yield "int8_mixed_scaled_mm", (x, q, w, rows, scale, outliers, bias)
        for threshold in (0.0, 6.0):
            yield "int8_linear", (x, w, scale, bias, threshold)


def test_opcheck() -> None:
    checked = set()
    for name, args in opcheck_cases():
        torch.library.opcheck(overload(name), args, test_utils=OPCHECKS)
        checked.add(name)
    assert checked == {name_of(s) for s in [*SCHEMAS, LINEAR]}


def test_opcheck_with_dynamic_shapes() -> None:
    seen = set()
    for name, args in opcheck_cases():
        if name not in seen:
            seen.add(name)
            torch.library.opcheck(overload(name), args)
    assert len(seen) == len(SCHEMAS) + 1


def test_default_equals_native() -> None:
    """Bit for bit, but for the order in which outlier columns are summed."""
    for name, args in opcheck_cases():
        if name.endswith(".out"):
            continue
        expected, found = overload(name)(*args), on_other_device(name, *args)
        if isinstance(expected, torch.Tensor):
            expected, found = (expected,), (found,)
        for e, f in zip(expected, found, strict=True):
            if e is None or f is None:
                assert e is f
            elif name in ("int8_linear", "int8_mixed_scaled_mm"):
                torch.testing.assert_close(f, e, rtol=1e-5 if e.dtype == torch.float32 else 1e-2, atol=1e-5)
            else:
                ref.assert_bits(f, e)


WRONG = [
    ("int8_vectorwise_quant", (torch.zeros(2, 4, dtype=torch.int32),), "A"),
    ("int8_vectorwise_quant", (torch.tensor(1.0),), "A"),
    ("int8_vectorwise_quant", (torch.zeros(2, 4), -1.0), "threshold"),
    ("int8_vectorwise_quant", (torch.zeros(2, 4), float("nan")), "threshold"),
    ("int8_vectorwise_dequant", (torch.zeros(2, 4), torch.ones(2)), "A"),
    ("int8_vectorwise_dequant", (codes(2, 4), torch.ones(3)), "stats"),
    ("int8_vectorwise_dequant", (codes(2, 4), torch.ones(2).double()), "stats"),
    ("int8_linear_matmul", (codes(2, 4), codes(3, 5)), "B"),
    ("int8_linear_matmul", (codes(2, 4), codes(4)), "B"),
    ("int8_linear_matmul", (torch.zeros(2, 4), codes(3, 4)), "A"),
    ("int8_linear_matmul.out", (codes(2, 4), codes(3, 4), torch.zeros(2, 4, dtype=torch.int32)), "out"),
    ("int8_linear_matmul.out", (codes(2, 4), codes(3, 4), torch.zeros(2, 3)), "out"),
    ("int8_mm_dequant", (torch.zeros(2, 4, dtype=torch.int32), torch.ones(1), torch.ones(4)), "row_stats"),
    ("int8_mm_dequant", (torch.zeros(2, 4, dtype=torch.int32), torch.ones(2), torch.ones(5)), "col_stats"),
    ("int8_mm_dequant", (torch.zeros(2, 4, dtype=torch.int32), torch.ones(2), torch.ones(4), torch.int8), "dtype"),
    ("int8_scaled_mm", (codes(2, 4), codes(3, 4), torch.ones(2), torch.ones(3), torch.ones(4)), "bias"),
    ("int8_mixed_scaled_mm", (torch.ones(2, 3), codes(2, 4), codes(3, 4), torch.ones(2), torch.ones(3)), "A"),
    (
        "int8_mixed_scaled_mm",
        (torch.ones(2, 4), codes(2, 4), codes(3, 4), torch.ones(2), torch.ones(3), torch.tensor([1.0])),
        "outlier_cols",
    ),
    ("int8_linear", (torch.ones(2, 4), codes(3, 4), torch.ones(4)), "SCB"),
    ("int8_linear", (torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)), "CB"),
    ("int8_linear", (torch.ones(2, 4), codes(3, 4), torch.ones(3), torch.ones(3).int()), "bias"),
    ("int8_linear", (torch.ones(2, 4), codes(3, 4), torch.ones(3), None, -1.0), "threshold"),
]


@pytest.mark.parametrize("device", ["native", "default"])
@pytest.mark.parametrize(("name", "args", "wrong"), WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_wrong_arguments_are_named(name: str, args: tuple[Any, ...], wrong: str, device: str) -> None:
    op = name.partition(".")[0]
    with pytest.raises((ValueError, RuntimeError), match=rf"{op}: .*\b{wrong}\b.*expected"):
        on_other_device(name, *args) if device == "default" else overload(name)(*args)


@pytest.mark.parametrize("k", [1024, 4096])
def test_many_outlier_columns_add_no_error(k: int) -> None:
    weight, scale, _ = ops.int8_vectorwise_quant(torch.rand(8, k))
    x = torch.rand(3, k) + 7
    exact = x.double() @ (weight.double() * scale.double()[:, None] / 127).t()
    assert ((ops.int8_linear(x, weight, scale, None, 6.0) - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize(("x_size", "w_size"), [(1e-30, 1e-6), (1e30, 1e-3), (3e37, 1e5)])
def test_extreme_scales_neither_overflow_nor_lose_digits(x_size: float, w_size: float) -> None:
    x, (weight, scale, _) = torch.randn(3, 64) * x_size, ops.int8_vectorwise_quant(torch.randn(5, 64) * w_size)
    weight[0] = 0
    q, rows, _ = ops.int8_vectorwise_quant(x)
    exact = (q.double() * rows.double()[:, None] / 127) @ (weight.double() * scale.double()[:, None] / 127).t()
    y = ops.int8_linear(x, weight, scale)
    assert (y[:, 0] == 0).all()
    fits = exact.abs() < 3.4e38
    torch.testing.assert_close(y.double()[fits], exact[fits], rtol=1e-6, atol=0)


def test_a_threshold_that_float32_cannot_hold_is_one_all_the_same() -> None:
    _, scale, outliers = ops.int8_vectorwise_quant(torch.tensor([[0.0, 1.0]]), 1e-50)
    assert outliers.tolist() == [1] and scale.tolist() == [0]
    torch.library.opcheck(ops.int8_vectorwise_quant.default, (torch.randn(3, 5), 1e-50))
