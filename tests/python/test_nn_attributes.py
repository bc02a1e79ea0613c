"""What others write into parameters, states and layers: codes and scales, in every way that Python has; tied weights;
biases and compute types. accelerate, Lightning, PEFT and TGI do these things."""

from __future__ import annotations

import copy
import json
import pickle
import runpy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes import nn
from bitsandbytes.functional.deprecated import warn_once
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt

GOLDEN = Path(__file__).parents[1] / "golden"


def layer8(n: int = 24, k: int = 64, bias: bool = True, threshold: float = 0.0) -> Linear8bitLt:
    return Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=threshold).to("cpu")


def codes_of(shape: tuple[int, ...] = (24, 64)) -> torch.Tensor:
    return torch.randint(-127, 128, shape, dtype=torch.int8)


def product(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.bitsandbytes.int8_linear(x, codes, scales, bias, 0.0).detach()


WRITES: dict[str, Any] = {
    "attribute": lambda p, name, value: setattr(p, name, value),
    "__setattr__": lambda p, name, value: p.__setattr__(name, value),
    "__dict__": lambda p, name, value: p.__dict__.__setitem__(name, value),
    "vars": lambda p, name, value: vars(p).update({name: value}),
}
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)


# ---- codes and scales of an int8 weight


def test_codes_are_an_attribute() -> None:
    """CB and SCB stand in __dict__, as in earlier versions, and CB is the data, not a copy."""
    fresh = Int8Params(torch.randn(8, 40), requires_grad=False)
    assert fresh.CB is None and {"CB", "SCB", "has_fp16_weights"} <= fresh.__dict__.keys()
    p = fresh.to("cpu")
    assert p.CB is p.CB is p.__dict__["CB"] and p.CB.data_ptr() == p.data_ptr() and torch.equal(p.CB, p.data)
    p.data.mul_(-1)
    assert torch.equal(p.CB, p.data)


@every_write
def test_assigned_codes_become_the_data(write: Any) -> None:
    layer, x, codes = layer8(), torch.randn(3, 64), codes_of()
    layer(x)
    weight, scales = layer.weight, layer.weight.SCB
    write(weight, "CB", codes)
    expected = product(x, codes, scales, layer.bias)
    ref.assert_bits(layer(x).detach(), expected)
    assert weight.CB is codes and weight.data_ptr() == codes.data_ptr() == layer.state.CB.data_ptr()
    assert layer.weight is weight and not weight.requires_grad
    write(weight, "SCB", scales * 2)
    ref.assert_bits(layer(x).detach(), product(x, codes, scales * 2, layer.bias))
    assert layer.state.SCB is weight.SCB


@every_write
def test_codes_make_an_unquantized_weight_quantized(write: Any) -> None:
    codes, scales, x = codes_of(), torch.rand(24), torch.randn(2, 64)
    layer = Linear8bitLt(64, 24, has_fp16_weights=False)
    write(layer.weight, "CB", codes)
    write(layer.weight, "SCB", scales)
    ref.assert_bits(layer(x).detach(), product(x, codes, scales, layer.bias))
    assert layer.weight.dtype == torch.int8 and layer.weight.to("cpu").data_ptr() == codes.data_ptr()


REMOVALS: dict[str, Any] = {
    "None": lambda p, name: setattr(p, name, None),
    "None in __dict__": lambda p, name: p.__dict__.__setitem__(name, None),
    "del": lambda p, name: delattr(p, name),
    "pop": lambda p, name: p.__dict__.pop(name),
}
every_removal = pytest.mark.parametrize("remove", REMOVALS.values(), ids=REMOVALS)


@every_removal
@pytest.mark.parametrize("names", [("CB",), ("SCB",), ("CB", "SCB"), ("SCB", "CB")], ids=str)
def test_what_is_removed_was_handed_over(names: tuple[str, ...], remove: Any) -> None:
    """The state has the codes and scales then, and the data stays what it was; every copy goes on, too."""
    layer, x = layer8(), torch.randn(3, 64)
    expected, data = layer(x).detach(), layer.weight.data.clone()
    for name in names:
        remove(layer.weight, name)
        assert getattr(layer.weight, name, None) is None
    assert torch.equal(layer.weight.data, data)
    state = layer.state_dict()
    assert torch.equal(state["weight"], data) and state["SCB"].dtype == torch.float32
    other = layer8()
    other.load_state_dict(state)
    for used in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.to("cpu"), layer.float(), other):
        ref.assert_bits(used(x).detach(), expected)
        assert used.state.CB.data_ptr() == used.weight.data_ptr() and used.state.SCB is not None
    layer.load_state_dict(state)
    ref.assert_bits(layer(x).detach(), expected)


def test_deleted_attributes_are_gone() -> None:
    p = layer8().weight
    for name in ("CB", "SCB"):
        delattr(p, name)
        assert not hasattr(p, name)
        with pytest.raises(AttributeError, match=name):
            delattr(p, name)
    moved = p.to("cpu")
    assert moved.dtype == torch.int8 and torch.equal(moved.data, p.data)


def test_data_that_is_replaced_shows_in_the_codes() -> None:
    layer, x, codes = layer8(), torch.randn(3, 64), codes_of()
    layer(x)
    layer.weight.data = codes
    assert layer.weight.CB.data_ptr() == codes.data_ptr()
    ref.assert_bits(layer(x).detach(), product(x, codes, layer.weight.SCB, layer.bias))
    assert layer.state.CB.data_ptr() == codes.data_ptr()
    p = Int8Params(torch.randn(4, 8), requires_grad=False).to("cpu")
    p.data = torch.randn(4, 8)
    assert p.CB is None


def test_floats_that_learn_keep_their_data() -> None:
    """Codes do not take the place of a weight that learns."""
    layer, x = Linear8bitLt(64, 24), torch.randn(3, 64)
    weight, codes, expected = layer.weight.data.clone(), codes_of(), layer(x).detach()
    layer.weight.CB = codes
    layer.weight.SCB = torch.ones(24)
    assert layer.weight.CB is codes and torch.equal(layer.weight.data, weight) and layer.weight.requires_grad
    ref.assert_bits(layer(x).detach(), expected)
    assert copy.copy(layer.weight).CB is codes and torch.equal(copy.deepcopy(layer.weight).CB, codes)


@every_write
@pytest.mark.parametrize("value", [torch.zeros(24, 64), "codes", 3], ids=str)
def test_what_is_no_code_is_named_when_it_is_used(value: Any, write: Any) -> None:
    layer = layer8()
    write(layer.weight, "CB", value)
    assert layer.weight.CB is value
    with pytest.raises(TypeError, match=r"Linear8bitLt: weight\.CB (is|has dtype) .*, expected int8 codes or None"):
        layer(torch.randn(3, 64))
    layer.weight.CB = None
    assert layer(torch.randn(3, 64)).shape == (3, 24)


def test_copies_know_the_codes_once() -> None:
    p = layer8(200, 640).weight
    p.CB = codes_of((200, 640))
    for other in (copy.copy(p), copy.deepcopy(p), pickle.loads(pickle.dumps(p)), p.to("cpu"), Int8Params(p.data)):
        assert torch.equal(other.data, p.data) and other.CB.data_ptr() == other.data_ptr()
        assert other.CB is other.__dict__["CB"]
    assert len(pickle.dumps(p)) < 140_000
    again = Int8Params(torch.randn(200, 640), requires_grad=False, **p.__dict__)
    assert again.CB is None and torch.equal(again.to("cpu").CB, again.data) and again.CB.data_ptr() != p.data_ptr()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_have_codes_that_nobody_read_yet(copied: Any) -> None:
    p, codes = layer8().weight, codes_of()
    p.__dict__["CB"] = codes
    other = copied(p)
    assert torch.equal(other.data, codes) and torch.equal(other.CB, codes)


@pytest.mark.parametrize("learns", [True, False])
def test_floats_in_place_of_codes_are_an_error(learns: bool) -> None:
    layer, x = layer8(), torch.randn(3, 64)
    layer(x)
    layer.weight.data = torch.randn(24, 64)
    with torch.set_grad_enabled(learns), pytest.raises((TypeError, ValueError), match=r"float32, expected int8"):
        layer(x)
    layer.to("cpu")
    assert layer.weight.dtype == torch.int8 and layer(x).shape == (3, 24)


def test_codes_of_a_weight_on_the_meta_device() -> None:
    """As when weights are offloaded: codes that were assigned count, though the data cannot become them."""
    layer, x, codes, scales = layer8(), torch.randn(3, 64), codes_of(), torch.rand(24)
    layer.weight = Int8Params(layer.weight.data, requires_grad=False, SCB=layer.weight.SCB).to("meta")
    layer.weight.CB, layer.weight.SCB = codes, scales
    ref.assert_bits(layer(x).detach(), product(x, codes, scales, layer.bias))


# ---- states


def test_what_is_written_into_a_state_counts() -> None:
    """Unless the weight was given codes and scales of its own, or was replaced, later."""
    layer, x = layer8(), torch.randn(3, 64)
    layer(x)
    codes, scales = codes_of(), torch.rand(24)
    layer.state.CB = codes
    ref.assert_bits(layer(x).detach(), product(x, codes, layer.weight.SCB, layer.bias))
    assert layer.weight.data_ptr() == codes.data_ptr()
    layer.state.SCB = scales
    ref.assert_bits(layer(x).detach(), product(x, codes, scales, layer.bias))
    assert layer.weight.SCB is scales
    layer.weight.CB = layer.weight.SCB = None
    layer.state.CB, layer.state.SCB = codes_of(), scales * 2
    ref.assert_bits(layer(x).detach(), product(x, layer.state.CB, scales * 2, layer.bias))
    assert layer.weight.CB is None and layer.weight.data_ptr() == layer.state.CB.data_ptr()
    other = layer8()
    layer.weight = other.weight
    ref.assert_bits(layer(x).detach(), product(x, other.weight.data, other.weight.SCB, layer.bias))
    assert layer.state.CB is other.weight.CB and layer.state.SCB is other.weight.SCB


def test_states_are_compared() -> None:
    layer = layer8(threshold=6.0)
    other = copy.deepcopy(layer)
    assert layer.state == other.state and layer.state != bnb.MatmulLtState()
    assert bnb.MatmulLtState() == bnb.MatmulLtState() != 3
    other.state.SCB = other.state.SCB * 2
    assert layer.state != other.state


def test_a_layer_of_its_own_around_matmul() -> None:
    """As TGI has it: the state takes codes and scales over."""
    warn_once.cache_clear()
    w, bias, x = torch.randn(24, 64), torch.randn(24), torch.randn(3, 64)
    weight = Int8Params(w, has_fp16_weights=False, requires_grad=False).to("cpu")
    state = bnb.MatmulLtState()
    state.threshold, state.has_fp16_weights, state.memory_efficient_backward = 6.0, False, False
    state.use_pool = True
    expected = product(x, weight.data, weight.SCB, bias)
    state.CB, state.SCB = weight.CB, weight.SCB
    weight.CB = weight.SCB = None
    for training in (True, False):
        state.is_training = training
        ref.assert_bits(bnb.matmul(x, weight, bias=bias, state=state), expected)
        assert state.CB is not None and state.SCB is not None
        with pytest.warns(FutureWarning) if training else nullcontext():
            assert state.CxB is None
    del state.CB
    assert state.CB is None


def test_quantizing_in_place() -> None:
    """As Lightning does, by hand."""
    layer, w, x = Linear8bitLt(64, 24, has_fp16_weights=False), torch.randn(24, 64), torch.randn(3, 64)
    codes, scales, _ = F.int8_vectorwise_quant(w.half())
    layer.weight.data = codes
    layer.weight.CB, layer.weight.SCB = codes, scales
    ref.assert_bits(layer(x).detach(), product(x, codes, scales, layer.bias))
    layer = Linear8bitLt(64, 24, has_fp16_weights=True)
    layer.weight.data = w
    assert ref.relative_error(layer(x), torch.nn.functional.linear(x, w, layer.bias)) < 0.02


@every_removal
@pytest.mark.parametrize("make", [Linear4bit, nn.Embedding4bit])
def test_a_lost_quant_state_comes_back_from_the_layer(make: Any, remove: Any) -> None:
    layer = make(64, 24).to("cpu")
    x = torch.randn(3, 64) if make is Linear4bit else torch.tensor([1, 63])
    expected, state = layer(x).detach(), layer.weight.quant_state
    remove(layer.weight, "quant_state")
    ref.assert_bits(layer(x).detach(), expected)
    assert layer.weight.quant_state is state


# ---- through accelerate


def test_accelerate_places_an_int8_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate quantizes on the first GPU, which is the CPU here, before it brings codes and scales to the CPU."""
    modeling = pytest.importorskip("accelerate.utils.modeling")
    move = Int8Params.to
    monkeypatch.setattr(Int8Params, "to", lambda p, device, *a, **k: move(p, "cpu" if device == 0 else device, *a, **k))
    w, x = torch.randn(24, 64), torch.randn(3, 64)
    for start in ("cpu", "meta"):
        layer = Linear8bitLt(64, 24, bias=False, has_fp16_weights=False, device=start)
        modeling.set_module_tensor_to_device(layer, "weight", "cpu", value=w)
        assert type(layer.weight) is Int8Params and layer.weight.CB.data_ptr() == layer.weight.data_ptr()
        codes, scales, _ = F.int8_vectorwise_quant(w.half())
        ref.assert_bits(layer(x).detach(), product(x, codes, scales, None))


def test_accelerate_offloads_an_int8_layer() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    layer, x = layer8(), torch.randn(3, 64)
    expected = layer(x).detach()
    kept = {k: v.clone() for k, v in layer.state_dict().items()}
    hook = hooks.AlignDevicesHook(execution_device=torch.device("cpu"), offload=True, weights_map=kept)
    hooks.add_hook_to_module(layer, hook)
    for _ in range(3):
        assert layer.weight.is_meta
        ref.assert_bits(layer(x).detach(), expected)
        assert layer.weight.is_meta and layer.state.SCB is None
    hooks.remove_hook_from_module(layer)
    assert not layer.weight.is_meta
    ref.assert_bits(layer(x).detach(), expected)


# ---- every attribute of every class


def test_everything_that_can_be_written_elsewhere_can_be_here() -> None:
    """Each public attribute of each object is read, written, and deleted, and compared with the released package."""
    theirs = json.loads((GOLDEN / "attributes.json").read_text())
    mine = runpy.run_path(str(GOLDEN / "make_attributes.py"))["describe"]()
    assert sum(map(len, theirs.values())) > 90
    lost = {
        f"{kind}.{name}: {way}": (outcome, mine.get(kind, {}).get(name, {}).get(way))
        for kind, names in theirs.items()
        for name, ways in names.items()
        for way, outcome in ways.items()
        if outcome == "works" and mine.get(kind, {}).get(name, {}).get(way) != "works"
    }
    assert not lost


# ---- weights that are tied to a layer of floats


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("make", [Linear4bit, Linear8bitLt], ids=["4bit", "8bit"])
@pytest.mark.parametrize("moved", ["before", "after", "never"])
def test_a_tied_weight_is_used_as_it_is(make: Any, dtype: torch.dtype, bias: bool, moved: str) -> None:
    options: dict[str, Any] = {} if make is Linear4bit else {"has_fp16_weights": False}
    table = torch.nn.Embedding(24, 64, dtype=dtype)
    head = make(64, 24, bias, **options)
    if moved == "before":
        head.to("cpu")
    head.weight = table.weight
    if moved == "after":
        head.to("cpu")
    assert head.weight is table.weight and table.weight.dtype == dtype
    x = torch.randn(2, 3, 64, dtype=dtype, requires_grad=True)
    y = head(x)
    exact = torch.nn.functional.linear(x, table.weight, None if head.bias is None else head.bias.to(dtype))
    ref.assert_bits(y.detach(), exact.detach())
    y.float().sum().backward()
    assert x.grad is not None and table.weight.grad is not None, "the table learns through the head"
    other = head(x.detach().double())
    assert other.dtype == torch.float64 and ref.relative_error(other, exact.double()) < 2e-2
    result = head.load_state_dict(head.state_dict())
    assert not result.missing_keys and set(head.state_dict()) == {"weight", *(["bias"] if bias else [])}


@pytest.mark.parametrize("make", [nn.Embedding4bit, nn.EmbeddingNF4, nn.Embedding8bit])
def test_a_tied_embedding_is_read_as_it_is(make: Any) -> None:
    head, index = torch.nn.Linear(64, 12), torch.tensor([[0, 11], [3, 3]])
    table = make(12, 64)
    table.weight = head.weight
    ref.assert_bits(table.to("cpu")(index).detach(), head.weight.detach()[index])


def test_packed_floats_are_not_a_tied_weight() -> None:
    """FSDP shows a packed weight as a plain tensor of its storage type."""
    layer, x = Linear4bit(64, 24, quant_type="nf4", quant_storage=torch.bfloat16).to("cpu"), torch.randn(3, 64)
    expected = layer(x).detach()
    layer.weight = torch.nn.Parameter(layer.weight.data, requires_grad=False)
    ref.assert_bits(layer(x).detach(), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_scales_for_a_tied_weight_are_refused(strict: bool) -> None:
    head = Linear8bitLt(8, 8, bias=False, has_fp16_weights=False)
    head.weight = torch.nn.Parameter(torch.randn(8, 8))
    state = head.state_dict()
    assert set(state) == {"weight"}
    for given in ({**state, "SCB": torch.ones(8)}, layer8(8, 8, bias=False).state_dict()):
        with pytest.raises(RuntimeError, match="Loading a quantized checkpoint into non-quantized Linear8bitLt"):
            head.load_state_dict(given, strict=strict)


# ---- biases and compute types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["training", "no_grad", "inference_mode"])
@pytest.mark.parametrize("kind", ["4bit", "8bit", "8bit floats", "4bit bf16"])
def test_a_bias_takes_the_type_of_the_product(kind: str, mode: str, dtype: torch.dtype) -> None:
    """In place: the parameter stays the same object and keeps learning."""
    if kind.startswith("4bit"):
        layer: Any = Linear4bit(64, 24, compute_dtype=torch.bfloat16 if kind == "4bit bf16" else None)
    else:
        layer = Linear8bitLt(64, 24, has_fp16_weights=kind == "8bit floats")
    layer.to("cpu")
    bias, before, expected = layer.bias, layer.bias.detach().clone(), torch.bfloat16 if "bf16" in kind else dtype
    with {"training": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]():
        layer(torch.randn(3, 64, dtype=dtype))
    assert layer.bias is bias and bias.dtype == expected and bias.requires_grad and bias.is_leaf
    assert torch.equal(bias.detach(), before.to(expected)) and not bias.is_inference()
    layer(torch.randn(3, 64, dtype=dtype)).sum().backward()
    assert bias.grad is not None and bias.grad.dtype == expected


@pytest.mark.parametrize("make", [Linear4bit, Linear8bitLt])
def test_inputs_that_are_no_floats_leave_the_bias(make: Any) -> None:
    layer = make(64, 24).to("cpu")
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        layer(torch.ones(3, 64, dtype=torch.int64))
    layer(torch.randn(3, 64).double())
    assert layer.bias.dtype == torch.float32


def test_a_bias_under_a_transform_is_left() -> None:
    layer, x = Linear4bit(64, 24).to("cpu"), torch.randn(3, 64, dtype=torch.bfloat16)
    parameters = dict(layer.named_parameters())
    torch.func.functional_call(layer, {k: v.detach() for k, v in parameters.items() if k == "bias"}, (x,))
    assert layer.bias.dtype == torch.float32


SLOW = (
    "Input type into Linear4bit is torch.float16, but bnb_4bit_compute_dtype=torch.float32 (default). "
    "This will lead to slow "
)


@pytest.mark.parametrize("given", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_a_slow_compute_type_is_told_once(
    dtype: torch.dtype, rows: int, given: torch.dtype | None, caplog: pytest.LogCaptureFixture
) -> None:
    layer, x = Linear4bit(64, 24, compute_dtype=given).to("cpu"), torch.randn(rows, 64, dtype=dtype)
    if given is not None:
        layer.compute_type_is_set = False  # as PEFT and others ask for it to be settled anew
    for _ in range(3):
        assert layer(x).dtype == dtype
    assert layer.compute_type_is_set
    slow = dtype == torch.float16 and given in (None, torch.float32)
    text = SLOW + ("inference." if rows == 1 else "inference or training speed.")
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == (
        [("bitsandbytes.nn.modules", "WARNING", text)] if slow else []
    )
    assert layer.compute_dtype == (given if dtype == torch.float16 else dtype)
