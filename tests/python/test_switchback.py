"""Tracing of outliers, and the layers beside Linear8bitLt: SwitchBack, embeddings."""

from __future__ import annotations

import functools

import pytest
import reference as ref
import torch
from test_nn8bit import decoded

from bitsandbytes import nn, utils

# ---- outliers of a model


def test_tracer_finds_columns() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.Linear(16, 4))
    tracer = utils.OutlierTracer.get_instance()
    tracer.initialize(model)
    x = torch.randn(200, 32)
    x[:, 5] *= 30
    model(x)
    assert tracer.get_outliers(model[0].weight).tolist() == [5]
    expected = (torch.nn.functional.linear(x, model[0].weight, model[0].bias).abs() > 6).sum(0) > 10
    assert set(expected.nonzero().view(-1).tolist()) <= set(tracer.get_outliers(model[1].weight).tolist())
    assert tracer.get_outliers(torch.randn(2, 2)) is None
    model(-x)
    assert not model[0]._forward_pre_hooks, "watched until each layer has run"
    assert tracer is utils.OutlierTracer.get_instance() and tracer.is_initialized()


def test_outlier_dims() -> None:
    w = torch.randn(64, 40)
    w[:, 3] *= 20
    assert utils.find_outlier_dims(w).tolist() == [3]
    assert utils.find_outlier_dims(w, topk=2)[0] == 3
    assert utils.find_outlier_dims(w.t(), reduction_dim=1).tolist() == [3]
    assert utils.find_outlier_dims(w, topk=7, rdm=True).shape == (7,)
    with pytest.raises(ValueError, match="find_outlier_dims: topk is None, expected"):
        utils.find_outlier_dims(w, rdm=True)


def test_outlier_aware_layer() -> None:
    class Rounded(nn.OutlierAwareLinear):
        def quantize_weight(self, w: torch.Tensor, outlier_idx: torch.Tensor | None) -> torch.Tensor:
            rounded = w.detach().round()
            rounded[:, outlier_idx] = w.detach()[:, outlier_idx]
            return rounded

        def forward_with_outliers(self, x: torch.Tensor, outlier_idx: torch.Tensor | None) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight, self.bias)

    layer = Rounded(32, 8)
    before = layer.weight.detach().clone()
    tracer = utils.OutlierTracer.get_instance()
    tracer.initialize(torch.nn.Sequential(layer))
    x = torch.randn(100, 32)
    x[:, 7] *= 50
    y = layer(x)
    assert layer.is_quantized and layer.outlier_dim.tolist() == [7]
    assert torch.equal(layer.weight[:, 7], before[:, 7]) and torch.equal(layer.weight[:, 8], before[:, 8].round())
    assert torch.equal(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
    base = nn.OutlierAwareLinear(4, 4)
    for call in (lambda: base.quantize_weight(base.weight, None), lambda: base.forward_with_outliers(x, None)):
        with pytest.raises(NotImplementedError, match="override"):
            call()


# ---- SwitchBack


@pytest.mark.parametrize("kind", ["global", "vectorwise", "mem_efficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_switchback(kind: str, dtype: torch.dtype) -> None:
    make = {
        "global": nn.SwitchBackLinearGlobal,
        "vectorwise": nn.SwitchBackLinearVectorwise,
        "mem_efficient": functools.partial(nn.SwitchBackLinear, mem_efficient=True),
    }[kind]
    layer, plain = make(64, 33, dtype=dtype), nn.StandardLinear(64, 33, dtype=dtype)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 5, 64, dtype=dtype, requires_grad=True)
    y, exact = layer(x), torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)
    expected = torch.autograd.grad(exact, (x, layer.weight, layer.bias), grad.double())
    small = 1e-6 if dtype == torch.float32 else 1e-2
    bounds = (0.02, 0.02 if kind == "mem_efficient" else small, small)
    assert ref.relative_error(y, exact) < 0.02
    for f, e, bound in zip(found, expected, bounds, strict=True):
        assert f.dtype == dtype and ref.relative_error(f, e) < bound
    standard = torch.autograd.grad(plain(x), (x, plain.weight, plain.bias), grad)
    for f, e in zip(standard, expected, strict=True):
        assert ref.relative_error(f, e) < small
    layer.prepare_for_eval()
    assert layer.W_int8.dtype == torch.int8 and not hasattr(layer, "weight")
    ref.assert_bits(layer(x).detach(), y.detach())


def test_switchback_learns() -> None:
    torch.manual_seed(1)
    layer = nn.SwitchBackLinear(16, 4)
    assert ref.trained(layer, 200) < 0.01


def test_switchback_over_the_weights_of_llm_int8() -> None:
    for floats in (True, False):
        layer = nn.SwitchBackLinearBnb(32, 8, has_fp16_weights=floats, threshold=6.0).to("cpu")
        x = torch.randn(4, 32, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        weight = layer.weight if floats else decoded(layer)
        assert ref.relative_error(y, torch.nn.functional.linear(x, weight, layer.bias)) < 0.02
        assert x.grad is not None and (layer.weight.grad is not None) == floats


# ---- embeddings


def test_stable_embedding() -> None:
    e = nn.StableEmbedding(10, 6, padding_idx=2)
    assert isinstance(e, torch.nn.Embedding) and not e.weight[2].any()
    assert e.weight.abs().max() <= (6 / 16) ** 0.5, "Xavier's bound"
    ids = torch.tensor([[1, 2], [9, 0]])
    expected = torch.nn.functional.layer_norm(e.weight[ids], (6,))
    torch.testing.assert_close(e(ids), expected)
    half = nn.StableEmbedding(10, 6, dtype=torch.bfloat16)
    assert half(ids).dtype == half.weight.dtype == torch.bfloat16 and half.norm.weight.dtype == torch.float32


def test_embedding() -> None:
    e = nn.Embedding(10, 6, padding_idx=2)
    ids = torch.tensor([1, 2, 3])
    assert torch.equal(e(ids), e.weight[ids]) and not e.weight[2].any() and e.weight[1].any()
    given = torch.randn(10, 6)
    assert torch.equal(nn.Embedding(10, 6, _weight=given).weight, given)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_embedding_8bit(dtype: torch.dtype) -> None:
    e = nn.Embedding8bit(20, 33, dtype=dtype)
    table = e.weight.data.clone()
    with pytest.raises(RuntimeError, match="Embedding8bit: weight is not quantized, expected"):
        e(torch.tensor([0]))
    e.to("cpu")
    ids = torch.tensor([[3, 19], [0, 3]])
    assert e.weight.dtype == torch.int8 and e(ids).dtype == dtype
    assert ref.relative_error(e(ids), table[ids]) < 0.01
    with pytest.raises(NotImplementedError):
        e.state_dict()
