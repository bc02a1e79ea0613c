"""torch.compile(fullgraph=True): no graph break, forward and backward equal eager, one graph for all batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import reference as ref
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(dtype: torch.dtype, quant_type: str = "nf4", nested: bool = True, bias: bool = True) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(
        96, 64, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type
    )
    return linear.to(dtype).to("cpu")


def both_ways(call: Any, linear: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    linear.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    return found | {name: p.grad.clone() for name, p in linear.named_parameters() if p.grad is not None}


CASES = [(dtype, quant_type, nested) for dtype in ref.FLOATS for quant_type, nested in (("nf4", True), ("fp4", False))]


@pytest.mark.parametrize(("dtype", "quant_type", "nested"), CASES)
def test_linear_forward_and_backward(dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    """The ops are opaque to the compiler, so that with aot_eager even the bits are those of eager."""
    linear = layer(dtype, quant_type, nested)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for shape in ((1, 96), (7, 96), (2, 3, 96)):
        x = torch.randn(shape).to(dtype)
        expected, found = both_ways(linear, linear, x), both_ways(compiled, linear, x)
        assert expected.keys() == found.keys() >= {"y", "x", "bias"}
        for name, value in found.items():
            ref.assert_bits(value, expected[name])
        with torch.no_grad():
            ref.assert_bits(compiled(x), linear(x))


def test_inductor_forward_and_backward() -> None:
    """Generated code around the ops: three layers and what lies between them."""
    model = torch.nn.Sequential(
        layer(torch.float32), torch.nn.GELU(), torch.nn.Linear(64, 96), layer(torch.float32, "fp4", False)
    )
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 96)
    expected, found = both_ways(model, model, x), both_ways(compiled, model, x)
    assert expected.keys() == found.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_inductor_inference() -> None:
    linear = layer(torch.bfloat16).eval()
    compiled = torch.compile(lambda x: torch.relu(linear(x)) + 1, fullgraph=True)
    with torch.no_grad():
        for m in (1, 6):
            x = torch.randn(m, 96, dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), torch.relu(linear(x)) + 1, rtol=1e-2, atol=1e-2)


def test_one_dynamic_graph_serves_every_batch() -> None:
    linear, graphs = layer(torch.float32), []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(linear, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for m in (2, 3, 8, 65):
            x = torch.randn(m, 96)
            ref.assert_bits(compiled(x), linear(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("nested", [False, True])
def test_functional_in_a_graph(nested: bool) -> None:
    """quantize, dequantize and the product inside one graph."""

    def round_trip(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
        codes, state8 = F.quantize_blockwise(w, blocksize=256)
        product = bnb.matmul_4bit(x, packed.t(), state)
        return packed, F.dequantize_4bit(packed, state), codes, F.dequantize_blockwise(codes, state8), product

    w, x = torch.randn(48, 128), torch.randn(3, 128)
    compiled = torch.compile(round_trip, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(w, x), round_trip(w, x), strict=True):
        ref.assert_bits(found, expected)


def test_export() -> None:
    linear = layer(torch.float32).eval()
    x = torch.randn(4, 96)
    program = torch.export.export(linear, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
    with torch.no_grad():
        for m in (4, 9):
            x = torch.randn(m, 96)
            ref.assert_bits(program.module()(x), linear(x))
