"""Statistics of any floating point type become fp32 where they enter a state. A layout that operators do not have is
read right all the same."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import reference as ref
import torch
from state_items import both_nestings, quantized

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit

ops = torch.ops.bitsandbytes
CASTS = (torch.bfloat16, torch.float16, torch.float64)
every_cast = pytest.mark.parametrize("cast", CASTS, ids=str)


def floats_of(state: F.QuantState) -> list[torch.Tensor]:
    second = [] if state.state2 is None else [state.offset, state.state2.absmax, state.state2.code]
    return [state.code, *second, *([] if state.nested else [state.absmax])]


def cast_items(items: dict[str, Any], cast: torch.dtype) -> dict[str, Any]:
    return {k: v.to(cast) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in items.items()}


# ---- statistics of another type become fp32 where they enter


def constructed(packed: torch.Tensor, state: F.QuantState, cast: torch.dtype) -> F.QuantState:
    def again(s: F.QuantState, **more: Any) -> F.QuantState:
        absmax = s.absmax if s.absmax.dtype == torch.uint8 else s.absmax.to(cast)
        return F.QuantState(absmax, s.shape, s.code.to(cast), s.blocksize, s.quant_type, s.dtype, **more)

    if state.state2 is None:
        return again(state)
    return again(state, offset=state.offset.to(cast), state2=again(state.state2))


def assigned(packed: torch.Tensor, state: F.QuantState, cast: torch.dtype) -> F.QuantState:
    state = copy.deepcopy(state)
    for part in (state, state.state2):
        for name in ("absmax", "code", "offset"):
            value = getattr(part, name, None)
            if value is not None and value.is_floating_point():
                setattr(part, name, value.to(cast))
    return state


def raw_cast(state: F.QuantState, cast: torch.dtype) -> F.QuantState:
    """A state as another version of the package may have pickled it."""
    state = copy.deepcopy(state)
    for part in filter(None, (state, state.state2)):
        part.__dict__.update(cast_items(part.__dict__, cast))
    assert state.code.dtype == cast
    return state


def from_torch_file(packed: torch.Tensor, state: F.QuantState, cast: torch.dtype) -> F.QuantState:
    buffer = io.BytesIO()
    torch.save(raw_cast(state, cast), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def loaded_layer(packed: torch.Tensor, state: F.QuantState, cast: torch.dtype, **options: Any) -> F.QuantState:
    layer = Linear4bit(96, 40, bias=False, compute_dtype=torch.float32)
    layer = layer if options else layer.to("cpu")
    saved = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    layer.load_state_dict(cast_items(saved, cast), **options)
    return layer.weight.quant_state


def loaded_parametrization(packed: torch.Tensor, state: F.QuantState, cast: torch.dtype) -> F.QuantState:
    module = torch.nn.Linear(96, 40, bias=False)
    replace_parameter_4bit(module, "weight")
    saved = {"weight": packed, **{f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}}
    module.load_state_dict(cast_items(saved, cast))
    return module.parametrizations.weight[0].quant_state


ENTRIES: dict[str, Callable[[torch.Tensor, F.QuantState, torch.dtype], F.QuantState]] = {
    "constructor": constructed,
    "assignment": assigned,
    "dict": lambda p, s, c: F.QuantState.from_dict(cast_items(s.as_dict(), c), "cpu"),
    "packed dict": lambda p, s, c: F.QuantState.from_dict(cast_items(s.as_dict(packed=True), c), "cpu"),
    "prequantized": lambda p, s, c: (
        Params4bit.from_prequantized(p, cast_items(s.as_dict(packed=True), c), device="cpu").quant_state
    ),
    "pickle": lambda p, s, c: pickle.loads(pickle.dumps(raw_cast(s, c))),
    "deepcopy": lambda p, s, c: copy.deepcopy(raw_cast(s, c)),
    "pickled parameter": lambda p, s, c: (
        pickle.loads(pickle.dumps(Params4bit(p, quant_state=raw_cast(s, c), bnb_quantized=True))).quant_state
    ),
    "torch.load": from_torch_file,
    "load_state_dict": loaded_layer,
    "load_state_dict, assign": lambda p, s, c: loaded_layer(p, s, c, assign=True),
    "parametrize": loaded_parametrization,
}


@pytest.mark.parametrize("entry", ENTRIES)
@every_cast
@both_nestings
def test_statistics_become_fp32(entry: str, cast: torch.dtype, nested: bool) -> None:
    packed, state = quantized(nested)
    found = ENTRIES[entry](packed, state, cast)
    assert all(t.dtype == torch.float32 for t in floats_of(found)), entry
    assert found.absmax.dtype == (torch.uint8 if nested else torch.float32)
    for value, original in zip(floats_of(found), floats_of(state), strict=True):
        in_json = value.dim() == 0 and not entry.startswith(("constr", "assign", "pickle", "deep", "torch"))
        ref.assert_bits(value, original if in_json else original.to(cast).float())
    # Every use agrees with a state that was rounded by hand.
    exact = copy.deepcopy(state)
    for part in filter(None, (exact, exact.state2)):
        part.__dict__.update({k: v.float() for k, v in cast_items(part.__dict__, cast).items() if k in ("code",)})
        if part.absmax.is_floating_point():
            part.absmax = part.absmax.to(cast).float()
    exact.offset = found.offset
    weight = F.dequantize_4bit(packed, exact)
    ref.assert_bits(F.dequantize_4bit(packed, found), weight)
    x = torch.randn(3, 96, requires_grad=True)
    y = bnb.matmul_4bit(x, packed.t(), found)
    assert ref.relative_error(y, x.detach().double() @ weight.double().t()) < 1e-6
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, weight.sum(0).expand(3, -1))
    assert ref.relative_error(F.gemv_4bit(x.detach()[:1], packed, state=found), y.detach()[:1]) < 1e-6
    layer = Linear4bit(96, 40, bias=False, compute_dtype=torch.float32)
    layer.weight = Params4bit(packed, quant_state=found, bnb_quantized=True)
    ref.assert_bits(layer(x.detach()), y.detach())


@both_nestings
def test_a_default_dtype_does_not_show(nested: bool) -> None:
    _, state = quantized(nested)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
        again = pickle.loads(pickle.dumps(state))
        fresh = F.quantize_4bit(torch.randn(4, 64), compress_statistics=nested)[1]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == again == state and all(t.dtype == torch.float32 for t in floats_of(fresh))


@both_nestings
@every_cast
def test_moving_a_state_to_a_dtype_changes_nothing(nested: bool, cast: torch.dtype) -> None:
    _, state = quantized(nested)
    before = copy.deepcopy(state)
    state.to(cast)  # type: ignore[arg-type]
    assert state == before


@every_cast
def test_functions_take_statistics_of_any_type(cast: torch.dtype) -> None:
    x = torch.randn(1000)
    code = F.create_dynamic_map().to(cast)
    codes, state = F.quantize_blockwise(x, code=code, blocksize=64)
    ref.assert_bits(state.code, code.float())
    expected = F.dequantize_blockwise(codes, absmax=state.absmax.to(cast).float(), code=code.float(), blocksize=64)
    ref.assert_bits(F.dequantize_blockwise(codes, absmax=state.absmax.to(cast), code=code, blocksize=64), expected)
    packed, state = quantized(False)
    out = torch.empty(40, 96)
    F.dequantize_4bit(packed, absmax=state.absmax.to(cast), out=out, quant_type="nf4")
    state.absmax = state.absmax.to(cast)
    ref.assert_bits(out, F.dequantize_4bit(packed, state))
    rows, scales, _ = F.int8_vectorwise_quant(torch.randn(8, 32))
    short = scales.to(cast)
    ref.assert_bits(F.int8_vectorwise_dequant(rows, short), F.int8_vectorwise_dequant(rows, short.float()))
    sums = F.int8_linear_matmul(rows, rows)
    ref.assert_bits(F.int8_mm_dequant(sums, short, short), F.int8_mm_dequant(sums, short.float(), short.float()))


def int8_entries(cast: torch.dtype) -> dict[str, Any]:
    layer = Linear8bitLt(32, 16, bias=False, has_fp16_weights=False).to("cpu")
    CB, SCB = layer.weight.data, layer.weight.SCB

    def with_weight(weight: Int8Params) -> Linear8bitLt:
        new = copy.deepcopy(layer)
        new.weight = weight
        return new

    def written(layer: Linear8bitLt) -> Linear8bitLt:
        layer.weight.SCB = layer.weight.SCB.to(cast)
        return layer

    def raw(layer: Linear8bitLt) -> Linear8bitLt:
        layer.weight.__dict__["SCB"] = SCB.to(cast)
        return pickle.loads(pickle.dumps(layer))

    def loaded(assign: bool) -> Linear8bitLt:
        new = copy.deepcopy(layer)
        new.load_state_dict(cast_items(layer.state_dict(), cast), assign=assign)
        return new

    return {
        "scale": SCB.to(cast).float(),
        "weight": CB,
        "constructor": with_weight(Int8Params(CB, requires_grad=False, SCB=SCB.to(cast))),
        "assignment": written(copy.deepcopy(layer)),
        "pickle": raw(copy.deepcopy(layer)),
        "load": loaded(False),
        "load, assign": loaded(True),
    }


@every_cast
def test_int8_scales_become_fp32(cast: torch.dtype) -> None:
    entries = int8_entries(cast)
    scale, CB = entries.pop("scale"), entries.pop("weight")
    x = torch.randn(3, 32)
    expected = ops.int8_linear(x, CB, scale)
    for name, layer in entries.items():
        for _ in range(2):
            ref.assert_bits(layer(x).detach(), expected)
        ref.assert_bits(layer.weight.SCB, scale)
        assert layer.state.SCB is layer.weight.SCB, name
    state = MatmulLtState(CB=CB, SCB=scale.to(cast))
    state.has_fp16_weights = False
    again = pickle.loads(pickle.dumps(state))
    state.SCB = state.SCB.to(cast)
    for s in (state, again):
        ref.assert_bits(bnb.matmul(x, CB, state=s), expected)


# ---- the layout of _convert_weight_packed_for_cpu


def in_cpu_layout(nested: bool, released: bool, n: int = 64, k: int = 128) -> tuple[Any, ...]:
    """A weight, and the same in the layout; `released`: with what the released package keeps, absmax in bf16."""
    packed, state = quantized(nested, n, k)
    other, other_state = F._convert_weight_packed_for_cpu(packed, state)
    if released:
        for name in [name for name in other_state.__dict__ if name.startswith("original_")]:
            delattr(other_state, name)
    assert other_state.absmax.dtype == torch.bfloat16  # as C functions take it
    return packed, state, other, other_state


@both_nestings
@pytest.mark.parametrize("released", [False, True])
def test_products_read_the_layout_of_the_released_package(nested: bool, released: bool) -> None:
    packed, state, other, other_state = in_cpu_layout(nested, released)
    weight = F.dequantize_4bit(packed, state).double()
    limit = 2.5e-3 if released else 1e-6
    x = torch.randn(4, 128, requires_grad=True)
    exact = x.detach().double() @ weight.t()
    layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32)
    layer.weight = Params4bit(other, quant_state=other_state, quant_type="nf4", bnb_quantized=True)
    for call in (
        lambda: bnb.matmul_4bit(x, other, other_state),
        lambda: bnb.matmul_4bit(x, other.t(), other_state),
        lambda: layer(x),
        lambda: pickle.loads(pickle.dumps(layer))(x),
        lambda: torch.compile(layer, backend="aot_eager")(x),
    ):
        y = call()
        assert ref.relative_error(y, exact) < limit
        (grad,) = torch.autograd.grad(y.sum(), x)
        assert ref.relative_error(grad, weight.sum(0).expand(4, -1)) < limit
    with torch.no_grad():
        assert ref.relative_error(layer(x), exact) < limit
        for b in (other, other.t()):
            assert ref.relative_error(F.gemv_4bit(x[:1], b, state=other_state), exact[:1]) < limit
            assert ref.relative_error(F.dequantize_4bit(b, other_state).reshape(64, 128), weight) < limit


@both_nestings
def test_the_layout_of_the_released_package_is_saved_as_stored(nested: bool) -> None:
    packed, state, other, other_state = in_cpu_layout(nested, False)
    layer = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32)
    layer.weight = Params4bit(other, quant_state=other_state, quant_type="nf4", bnb_quantized=True)
    saved = layer.state_dict()
    assert torch.equal(saved["weight"], packed) and other_state != state
    fresh = Linear4bit(128, 64, bias=False, compute_dtype=torch.float32)
    fresh.load_state_dict(saved)
    assert fresh.weight.quant_state == state
    with pytest.raises(ValueError, match="packing_format_for_cpu"):
        other_state.as_dict(packed=True)
    with pytest.raises(ValueError, match="in this layout"):
        F._convert_weight_packed_for_cpu(other, other_state)
    with pytest.raises(ValueError, match="packed_weight has 4032 elements, expected 4096"):
        F.gemv_4bit(torch.ones(1, 128), other[:63], state=other_state)


def test_embeddings_read_the_layout_of_the_released_package() -> None:
    _, _, other, other_state = in_cpu_layout(False, False)
    layer = bnb.nn.EmbeddingNF4(64, 128)
    layer.weight = Params4bit(other, quant_state=other_state, quant_type="nf4", bnb_quantized=True)
    index = torch.tensor([0, 63, 17])
    ref.assert_bits(layer(index), F.dequantize_4bit(other, other_state)[index])
