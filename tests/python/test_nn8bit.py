"""Layers over int8 weights: quantization, moves, copies, states, training."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch
from safetensors.torch import load_file, save_file

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes import nn, utils
from bitsandbytes.nn.linear8bit import rows_from_tiles


def quantized(n: int = 24, k: int = 65, bias: bool = True, threshold: float = 0.0) -> nn.Linear8bitLt:
    return nn.Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=threshold).to("cpu")


def decoded(layer: nn.Linear8bitLt) -> torch.Tensor:
    return F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)


# ---- Int8Params


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_first_move_quantizes(dtype: torch.dtype) -> None:
    w = torch.randn(8, 40).to(dtype)
    before = w.clone()
    p = nn.Int8Params(w, requires_grad=False)
    assert p.dtype == dtype and p.CB is None and p.SCB is None
    p = p.to("cpu")
    codes, scale, _ = F.int8_vectorwise_quant(w)
    assert isinstance(p, nn.Int8Params) and p.dtype == torch.int8 and not p.requires_grad
    assert torch.equal(p.data, codes) and torch.equal(p.SCB, scale)
    assert p.CB.data_ptr() == p.data_ptr(), "stored once"
    ref.assert_bits(w, before)
    assert torch.equal(p.to("cpu").data, codes) and torch.equal(p.cpu().SCB, scale), "not quantized twice"
    for cast in (p.half(), p.float(), p.to(torch.bfloat16)):
        assert cast.dtype == torch.int8


def test_floats_stay_floats() -> None:
    p = nn.Int8Params(torch.randn(8, 40), has_fp16_weights=True).to("cpu")
    assert p.dtype == torch.float32 and p.requires_grad and p.CB is None
    assert p.to(torch.float16).dtype == torch.float16


def test_made_from_codes() -> None:
    """As transformers makes one when it loads a checkpoint: from int8 data and what another parameter knows."""
    old = nn.Int8Params(torch.randn(8, 40), requires_grad=False).to("cpu")
    for new in (
        nn.Int8Params(old.data, requires_grad=False, **{**old.__dict__, "SCB": old.SCB}).to("cpu"),
        nn.Int8Params(old.data, SCB=old.SCB),
        nn.Int8Params(CB=old.data, SCB=old.SCB),
    ):
        assert torch.equal(new.data, old.data) and new.SCB is old.SCB and not new.requires_grad


def test_copies_of_a_parameter() -> None:
    p = nn.Int8Params(torch.randn(8, 40), requires_grad=False).to("cpu")
    buffer = io.BytesIO()
    torch.save(p, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(p), pickle.loads(pickle.dumps(p)), torch.load(buffer, weights_only=False)):
        assert isinstance(other, nn.Int8Params) and torch.equal(other.data, p.data) and torch.equal(other.SCB, p.SCB)
        assert other.data_ptr() != p.data_ptr() and other.SCB.data_ptr() != p.SCB.data_ptr()
        assert other.CB.data_ptr() == other.data_ptr() and other.has_fp16_weights is False
    assert copy.copy(p).SCB is p.SCB


def test_meta_and_back() -> None:
    layer = quantized()
    kept = layer.weight.SCB.clone()
    there = nn.Linear8bitLt(65, 24, has_fp16_weights=False, device="meta")
    assert there.weight.is_meta and there.weight.dtype == torch.float32
    moved = layer.weight.to("meta")
    assert moved.is_meta and torch.equal(moved.SCB, kept)


# ---- Linear8bitLt


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_forward(dtype: torch.dtype, threshold: float, bias: bool) -> None:
    layer = quantized(bias=bias, threshold=threshold)
    for shape in ((65,), (1, 65), (2, 7, 65), (0, 65)):
        x = torch.randn(shape).to(dtype)
        y = layer(x)
        assert y.shape == (*shape[:-1], 24) and y.dtype == dtype
        expected = torch.ops.bitsandbytes.int8_linear(x, layer.weight.data, layer.weight.SCB, layer.bias, threshold)
        ref.assert_bits(y.detach(), expected.detach())
        if x.numel():
            exact = x.double() @ decoded(layer).double().t() + (layer.bias if bias else 0)
            assert ref.relative_error(y, exact) < 0.02


def test_layer_shows_its_weight() -> None:
    layer = quantized(threshold=6.0)
    assert isinstance(layer, torch.nn.Linear) and layer.index is None
    assert (layer.state.threshold, layer.state.has_fp16_weights, layer.state.use_pool) == (6.0, False, True)
    assert layer.state.CB.data_ptr() == layer.weight.CB.data_ptr() == layer.weight.data_ptr()
    assert layer.state.SCB is layer.weight.SCB and layer.weight.SCB.shape == (24,)
    layer(torch.randn(2, 65))
    assert layer.state.is_training and layer.weight.CB is not None
    layer.eval()(torch.randn(2, 65))
    assert not layer.state.is_training


def test_inside_a_model() -> None:
    """Quantized by a move of the whole model, and then neither by another move nor by a change of dtype."""
    model = torch.nn.Sequential(nn.Linear8bitLt(16, 8, has_fp16_weights=False), torch.nn.Linear(8, 4))
    x = torch.randn(3, 16)
    model.to("cpu")
    codes, y = model[0].weight.data.clone(), model(x)
    assert model[0].weight.dtype == torch.int8
    for change in (model.cpu, model.float, lambda: model.to("cpu"), lambda: model.to(torch.float32)):
        change()
        assert torch.equal(model[0].weight.data, codes) and model[0].state.SCB is model[0].weight.SCB
        ref.assert_bits(model(x).detach(), y.detach())
    model.bfloat16()
    assert model[0].weight.dtype == torch.int8 and model[0].weight.SCB.dtype == torch.float32
    assert ref.relative_error(model(x.bfloat16()), y) < 0.05


def test_unmoved_layer_computes_the_same() -> None:
    layer = nn.Linear8bitLt(65, 24, has_fp16_weights=False)
    x = torch.randn(3, 65)
    y = layer(x)
    assert layer.weight.dtype == torch.float32
    ref.assert_bits(layer.cpu()(x).detach(), y.detach())


def test_another_weight_is_seen() -> None:
    """Replaced as PEFT does when it merges, and scaled in place as RWKV is."""
    layer = quantized()
    x = torch.randn(3, 65)
    layer(x)
    w = torch.randn(24, 65)
    layer.weight = nn.Int8Params(w, requires_grad=False, has_fp16_weights=False).to("cpu")
    layer.state.reset_grads()
    y = layer(x)
    assert ref.relative_error(y, torch.nn.functional.linear(x, w, layer.bias)) < 0.02
    assert layer.state.SCB is layer.weight.SCB
    layer.state.CB = None
    ref.assert_bits(layer(x).detach(), y.detach())
    assert layer.state.CB.data_ptr() == layer.weight.data_ptr()
    layer.weight.SCB.div_(2)
    assert ref.relative_error(layer(x) - layer.bias, (y - layer.bias) / 2) < 1e-6


def test_scales_known_to_the_state_alone() -> None:
    """As of a wrapper that keeps the weight as a plain parameter."""
    layer = quantized()
    x = torch.randn(3, 65)
    y = layer(x)
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    ref.assert_bits(layer(x).detach(), y.detach())
    assert "SCB" in layer.state_dict()
    layer.state.reset_grads()
    with pytest.raises(RuntimeError, match=r"Linear8bitLt: weight\.SCB is None, expected"):
        layer(x)


def test_float64_input_is_computed_in_float32() -> None:
    layer, x = quantized(), torch.randn(3, 65)
    y = layer(x.double())
    assert y.dtype == torch.float64
    assert torch.equal(y.float(), layer(x))


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_gradients(dtype: torch.dtype) -> None:
    layer = quantized(threshold=2.0)
    x = torch.randn(2, 7, 65).to(dtype).requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert x.grad.dtype == dtype and ref.relative_error(x.grad, grad.double() @ decoded(layer).double()) < tolerance
    assert ref.relative_error(layer.bias.grad, grad.double().sum((0, 1))) < tolerance
    assert layer.weight.grad is None
    with torch.no_grad():
        ref.assert_bits(layer(x), y.detach())


def test_training_with_floats() -> None:
    """has_fp16_weights: the weight learns, and each product sees it as it is then."""
    layer = nn.Linear8bitLt(32, 16, threshold=6.0)
    assert layer.weight.requires_grad
    x, target = torch.randn(64, 32), torch.randn(64, 16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.65 * losses[0]
    with torch.no_grad():
        layer.eval()(x)
        layer.weight.data.mul_(3)
        exact = torch.nn.functional.linear(x, layer.weight, layer.bias)
        assert ref.relative_error(layer(x), exact) < 0.02, "no stale codes"
    assert set(layer.state_dict()) == {"weight", "bias"}


def test_checkpointing_and_hooks_do_not_keep_activations() -> None:
    """A frozen weight needs no activations for its backward pass."""
    layer = quantized()
    layer.requires_grad_(False)
    x = torch.randn(4, 65, requires_grad=True)
    hidden = x * 2
    alive = weakref.ref(hidden)
    y = layer(hidden)
    del hidden
    assert alive() is None
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("threshold", [-1.0, float("nan")])
def test_wrong_threshold(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"Linear8bitLt: threshold is .*, expected 0 or more"):
        nn.Linear8bitLt(4, 4, threshold=threshold)


def test_wrong_input_is_named() -> None:
    with pytest.raises((ValueError, RuntimeError), match=r"int8_linear: .*expected"):
        quantized()(torch.randn(3, 64))


# ---- states of layers


def test_state_dict() -> None:
    layer = quantized()
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "SCB", "weight_format"]
    assert state["weight"].dtype == torch.int8 and state["SCB"].dtype == torch.float32
    assert state["weight_format"].dtype == torch.uint8 and state["weight_format"].item() == 0


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_strict_load_of_its_own_state(used: bool, file: bool, tmp_path: Path) -> None:
    layer, other, x = quantized(threshold=6.0), quantized(threshold=6.0), torch.randn(3, 65)
    weight = other.weight
    if used:
        layer(x), other(x)
    state = layer.state_dict()
    if file:
        save_file(state, tmp_path / "layer.safetensors")
        state = load_file(tmp_path / "layer.safetensors")
    result = other.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert other.weight is weight and other.weight.SCB.data_ptr() != layer.weight.SCB.data_ptr()
    ref.assert_bits(other(x).detach(), layer(x).detach())
    assert set(state) == {"weight", "bias", "SCB", "weight_format"}, "the caller's dict is left alone"


def test_load_under_assign() -> None:
    """Codes replace the weight of a layer that was never quantized, or is on the meta device."""
    layer, x = quantized(), torch.randn(3, 65)
    for device in ("cpu", "meta"):
        other = nn.Linear8bitLt(65, 24, has_fp16_weights=False, device=device)
        other.load_state_dict(layer.state_dict(), assign=True)
        assert isinstance(other.weight, nn.Int8Params) and other.weight.data_ptr() == layer.weight.data_ptr()
        ref.assert_bits(other(x).detach(), layer(x).detach())


def test_load_in_a_model_with_other_layers() -> None:
    def model() -> torch.nn.Sequential:
        return torch.nn.Sequential(nn.Linear8bitLt(8, 8, has_fp16_weights=False), torch.nn.Linear(8, 4)).to("cpu")

    a, b, x = model(), model(), torch.randn(3, 8)
    b.load_state_dict(a.state_dict())
    ref.assert_bits(b(x).detach(), a(x).detach())


def wrong_states() -> dict[str, tuple[dict[str, Any], str]]:
    state = quantized().state_dict()
    return {
        "shape": ({**state, "weight": state["weight"][:-1]}, "size mismatch"),
        "floats": (torch.nn.Linear(65, 24).state_dict(), "its dtype is torch.float32, expected torch.int8"),
        "no scales": ({k: v for k, v in state.items() if k != "SCB"}, "SCB is missing, expected 24 scales"),
        "few scales": ({**state, "SCB": state["SCB"][:-1]}, r"SCB has shape \(23,\), expected 24 scales"),
        "layout": ({**state, "weight_format": torch.tensor(9)}, "weight_format is 9, expected one of row"),
        "two layouts": ({**state, "weight_format": torch.tensor([0, 0])}, "weight_format is tensor"),
        "a list of layouts": ({**state, "weight_format": ["row"]}, r"weight_format is \['row'\], expected one of row"),
        "complex scales": ({**state, "SCB": state["SCB"] + 1j}, r"SCB: its dtype is torch\.complex64"),
        "scales of bool": ({**state, "SCB": state["SCB"] > 0}, r"SCB: its dtype is torch\.bool"),
        "sparse scales": ({**state, "SCB": state["SCB"].to_sparse()}, r"SCB: its layout is torch\.sparse_coo"),
        "sparse codes": ({**state, "weight": state["weight"].to_sparse()}, r"weight: its layout is torch\.sparse_coo"),
        "nested scales": ({**state, "SCB": torch.nested.nested_tensor([state["SCB"]])}, "SCB: its layout is nested"),
        "nested codes": (
            {**state, "weight": torch.nested.nested_tensor([state["weight"]])},
            "weight: its layout is nested",
        ),
        "scales on meta": ({**state, "SCB": state["SCB"].to("meta")}, "SCB: it is on the meta device"),
        "codes on meta": ({**state, "weight": state["weight"].to("meta")}, "weight: it is on the meta device"),
        "one more": ({**state, "more": torch.zeros(1)}, "Unexpected key.*more"),
        "no bias": ({k: v for k, v in state.items() if k != "bias"}, "Missing key.*bias"),
    }


@pytest.mark.parametrize("name", wrong_states())
def test_wrong_states_are_refused(name: str) -> None:
    state, message = wrong_states()[name]
    layer, x = quantized(), torch.randn(3, 65)
    before = layer(x)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)
    if name not in ("one more", "no bias"):
        ref.assert_bits(layer(x).detach(), before.detach())


@pytest.mark.parametrize("floats", [True, False])
def test_codes_need_a_quantized_layer(floats: bool) -> None:
    layer = nn.Linear8bitLt(65, 24, has_fp16_weights=floats)
    with pytest.raises(RuntimeError, match=r"its dtype is torch\.int8, expected a layer that was quantized"):
        layer.load_state_dict(quantized().state_dict())


def place(layout: str, row: int, col: int, rows: int) -> int:
    """Where cuBLASLt keeps element (row, col) of a matrix of `rows` rows, in whole tiles, by its documentation."""
    down, across = row % 8, col % 32
    if layout == "col32":
        return (col // 32) * 32 * rows + row * 32 + across
    if layout == "col_turing":  # COL4_4R2_8C: 4 columns of 4 even rows, then of the next 4 columns, then of odd rows
        tile = (col // 32) * (rows // 8) + row // 8
        inner = (down % 2) * 4 + across // 8
        return tile * 256 + inner * 32 + ((across % 8) // 4) * 16 + (down // 2) * 4 + across % 4
    tile = (col // 32) * (rows // 32) + row // 32
    return tile * 1024 + (((row % 8) // 2 * 4 + (row % 32) // 8) * 2 + row % 2) * 32 + across


@pytest.mark.parametrize("named", ["number", "tensor", "name"])
@pytest.mark.parametrize("layout", ["col32", "col_turing", "col_ampere"])
def test_earlier_layouts(layout: str, named: str) -> None:
    layer = quantized(24, 65)
    rows, columns = {"col32": 24, "col_turing": 24, "col_ampere": 32}[layout], 96
    stored = torch.zeros(rows * columns, dtype=torch.int8)
    for i in range(24):
        for j in range(65):
            stored[place(layout, i, j, rows)] = layer.weight.data[i, j]
    number = utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING[layout]
    told: Any = {"number": number, "tensor": torch.tensor(number, dtype=torch.uint8), "name": layout}[named]
    state = {**layer.state_dict(), "weight": stored.view(rows, columns), "weight_format": told}
    other = quantized(24, 65)
    other.load_state_dict(state)
    assert torch.equal(other.weight.data, layer.weight.data)
    with pytest.raises(ValueError, match="size mismatch: its shape is"):
        rows_from_tiles(stored.view(rows, columns)[:, :-1], layout)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_layer(way: str) -> None:
    layer, x = quantized(threshold=6.0), torch.randn(3, 65)
    layer(x)
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
        assert len(pickle.dumps(layer)) < len(pickle.dumps(layer.weight)) + 6000, "the codes are stored once"
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert other.state.threshold == 6.0 and other.weight.data_ptr() != layer.weight.data_ptr()
    assert other.state.SCB is other.weight.SCB and other.state.CB.data_ptr() == other.weight.data_ptr()
    ref.assert_bits(other(x).detach(), layer(x).detach())
    assert layer.state.CB is not None


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_compile(threshold: float) -> None:
    layer = quantized(threshold=threshold)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (2, 5, 9):
        x = torch.randn(m, 65) * 3
        with torch.no_grad():
            ref.assert_bits(compiled(x), layer(x))
        a, b = (x.clone().requires_grad_() for _ in range(2))
        compiled(a).sum().backward()
        layer(b).sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


# ---- names


def test_names_are_exported() -> None:
    for name in nn.__all__:
        assert hasattr(nn, name)
    for name in ("Linear8bitLt", "Int8Params", "OutlierAwareLinear", "SwitchBackLinearBnb", "StableEmbedding"):
        assert getattr(nn.modules, name).__module__ == "bitsandbytes.nn.modules"
    assert bnb.matmul is bnb.autograd.matmul


def test_float64_is_computed_in_float32() -> None:
    layer = bnb.nn.Linear8bitLt(40, 24, has_fp16_weights=False).double().to("cpu")
    x = torch.randn(3, 40, dtype=torch.float64)
    y = layer(x)
    assert y.dtype == torch.float64 and torch.equal(y, layer(x.float()).double())
    assert torch.equal(bnb.matmul(x, layer.weight, state=layer.state, bias=layer.bias), y)
    assert bnb.nn.Int8Params(torch.randn(4, 8, dtype=torch.float64), requires_grad=False).to("cpu").SCB.shape == (4,)


def test_assigned_scales_become_float32() -> None:
    layer = bnb.nn.Linear8bitLt(8, 4, has_fp16_weights=False).to("cpu")
    state = layer.state_dict()
    state["SCB"] = state["SCB"].half()
    layer.load_state_dict(state, assign=True)
    assert layer.weight.SCB.dtype == torch.float32 and layer(torch.randn(2, 8)).shape == (2, 4)


def test_a_layer_quantized_under_inference_mode_passes_gradients() -> None:
    with torch.inference_mode():
        layer = bnb.nn.Linear8bitLt(8, 4, bias=False, has_fp16_weights=False).to("cpu")
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("threshold", ["6", None])
def test_a_threshold_that_is_no_number(threshold: object) -> None:
    with pytest.raises(TypeError, match=r"Linear8bitLt: threshold is .*, expected a number"):
        bnb.nn.Linear8bitLt(8, 4, threshold=threshold)


def test_matmul_names_the_weight() -> None:
    with pytest.raises(ValueError, match=r"matmul: B has shape \(4, 41\)"):
        bnb.matmul(torch.randn(2, 40), torch.randn(4, 41))
