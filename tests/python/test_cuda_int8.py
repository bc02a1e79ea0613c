"""LLM.int8() on a CUDA GPU: the bytes of the CPU, and torch's rules.

./dev gpu runs these; without a GPU they are skipped, as test_cuda is.
"""

from __future__ import annotations

import concurrent.futures
import itertools

import pytest
import reference as ref
import torch
from test_cuda import BATCHES, GPU, assert_same, check_bytes, no_sync, there
from test_int8_ops import codes, opcheck_cases, values
from test_ops import OPCHECKS, overload

import bitsandbytes as bnb
import bitsandbytes.functional as F

ops = torch.ops.bitsandbytes


@pytest.mark.parametrize("threshold", [0.0, 6.0, 0.4])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_rows_and_columns(dtype: torch.dtype, threshold: float) -> None:
    for shape in [(1, 1), (1, 4096), (3, 100), (0, 8), (8, 0), (70, 4097), (33, 8192), (5, 40_000), (1000, 64)]:
        x = values(*shape, dtype)
        q, scale, _ = check_bytes("int8_vectorwise_quant", x, threshold)
        check_bytes("int8_double_quant", x, threshold)
        check_bytes("int8_vectorwise_dequant", q, scale)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_rows_of_special_values(dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.randn(8, 70)
    x[1, 3], x[2, 4], x[3, 5], x[4, 6] = nan, inf, -inf, 7
    x[5] *= 1e-37
    x[6] = 0
    for threshold in (0.0, 6.0, inf):
        check_bytes("int8_vectorwise_quant", x.to(dtype), threshold)
        check_bytes("int8_double_quant", x.to(dtype), threshold)


def stored_layer(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and bias on the CPU."""
    weight, scale, _ = ops.int8_vectorwise_quant(torch.randn(n, k))
    return weight, scale, torch.randn(n).to(dtype)


@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 1024), (272, 144), (33, 129), (5, 7), (64, 0)], ids=str)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_products_have_the_bytes_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, scale, bias = stored_layer(*shape, dtype)
    for m in BATCHES:
        x = torch.randn(m, shape[1])
        x[:, ::301] *= 7
        x = x.to(dtype)
        for threshold in (0.0, 6.0, 3.0):
            check_bytes("int8_linear", x, weight, scale, bias, threshold)
        q, rows, outliers = ops.int8_vectorwise_quant(x, 6.0)
        check_bytes("int8_linear_matmul", q, weight)
        check_bytes("int8_scaled_mm", q, weight, rows, scale, bias, dtype)
        check_bytes("int8_mixed_scaled_mm", x, q, weight, rows, scale, outliers if outliers.numel() else None, bias)
        sums = ops.int8_linear_matmul(q, weight)
        check_bytes("int8_mm_dequant", sums, rows, scale, dtype, bias)


def test_sums_at_any_address() -> None:
    for offset in (1, 4, 8):
        a, b = codes(20 * 64 + offset), codes(36 * 64 + offset)
        expected = ops.int8_linear_matmul(a[offset:].view(20, 64), b[offset:].view(36, 64))
        on_gpu = a.to(GPU)[offset:].view(20, 64), b.to(GPU)[offset:].view(36, 64)
        assert_same(ops.int8_linear_matmul(*on_gpu), expected)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_layer_forward_and_backward(threshold: float) -> None:
    for m in (1, 16, 128):
        linear = bnb.nn.Linear8bitLt(256, 192, has_fp16_weights=False, threshold=threshold).to(GPU)
        x = torch.randn(m, 256, device=GPU, dtype=torch.bfloat16)
        x[:, 5] = 8
        x.requires_grad_()
        y = linear(x)
        grad = torch.randn(m, 192, device=GPU).to(y.dtype)
        y.backward(grad)
        w = F.int8_vectorwise_dequant(linear.weight.data, linear.weight.SCB).double()
        assert ref.relative_error(y, x.double() @ w.t() + linear.bias.double()) < 2e-2
        assert ref.relative_error(x.grad, grad.double() @ w) < 2e-2


def test_every_op_equals_the_cpu() -> None:
    for name, args in opcheck_cases():
        torch.library.opcheck(overload(name), there(args), test_utils=OPCHECKS)
        if name.endswith(".out"):
            on_gpu = there(args)
            overload(name)(*args)
            overload(name)(*on_gpu)
            assert_same(on_gpu[-1], args[-1])
        else:
            check_bytes(name, *args)


@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_in_a_graph(threshold: float, m: int) -> None:
    """Outlier columns of each replay are those of its input."""
    linear = bnb.nn.Linear8bitLt(4096, 1024, has_fp16_weights=False, threshold=threshold).to(GPU)
    x = torch.randn(m, 4096, device=GPU, dtype=torch.bfloat16)
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            linear(x)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = linear(x)
        for outlier in (None, 3, 4000):
            x.copy_(torch.randn_like(x))
            if outlier is not None:
                x[m // 2, outlier] = 20
            graph.replay()
            assert torch.equal(captured, linear(x))


def test_nothing_waits_for_the_device() -> None:
    with no_sync():
        weight, scale, _ = ops.int8_vectorwise_quant(torch.randn(256, 1024, device=GPU, dtype=torch.bfloat16))
        for m, threshold in itertools.product(BATCHES, (0.0, 6.0)):
            x = torch.randn(m, 1024, device=GPU, dtype=torch.bfloat16)
            ops.int8_linear(x, weight, scale, None, threshold)
            q, rows, _ = ops.int8_vectorwise_quant(x)
            ops.int8_mm_dequant(ops.int8_linear_matmul(q, weight), rows, scale)
        ops.int8_double_quant(x)
        ops.int8_vectorwise_dequant(weight, scale)


def test_threads_that_launch_a_kernel_with_more_and_less_shared_memory() -> None:
    """The kernel of many rows has two sizes, with and without outliers: what it may take belongs to no one launch."""
    weight, scale, _ = ops.int8_vectorwise_quant(torch.randn(512, 1024, device=GPU, dtype=torch.bfloat16))
    x = torch.randn(512, 1024, device=GPU, dtype=torch.bfloat16)
    x[:, 3] = 20
    expected = {t: ops.int8_linear(x, weight, scale, None, t) for t in (0.0, 6.0)}

    def work(threshold: float) -> bool:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            found = [ops.int8_linear(x, weight, scale, None, threshold) for _ in range(200)]
        stream.synchronize()
        return all(torch.equal(y, expected[threshold]) for y in found)

    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (0.0, 6.0, 0.0, 6.0)))


def test_tensors_on_two_devices_are_named() -> None:
    x, weight, scale = torch.randn(2, 64, device=GPU), codes(4, 64).to(GPU), torch.ones(4, device=GPU)
    for what, call in {
        "int8_linear: CB": lambda: ops.int8_linear(x, weight.cpu(), scale),
        "int8_linear: SCB": lambda: ops.int8_linear(x, weight, scale.cpu()),
        "int8_linear_matmul: B": lambda: ops.int8_linear_matmul(weight, weight.cpu()),
        "int8_vectorwise_dequant: stats": lambda: ops.int8_vectorwise_dequant(weight, scale.cpu()),
    }.items():
        with pytest.raises(ValueError, match=rf"^{what} is on cpu, expected cuda:0"):
            call()
