"""What a state may hold: statistics of any floating point type, exactly as many as there are blocks, and files that are
broken. A layout that operators do not have is read right all the same."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import reference as ref
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_default_backend import on_other_device

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.autograd._functions import MatmulLtState
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict

ops = torch.ops.bitsandbytes
CASTS = (torch.bfloat16, torch.float16, torch.float64)
every_cast = pytest.mark.parametrize("cast", CASTS, ids=str)
both_nestings = pytest.mark.parametrize("nested", [False, True])
KEY = "quant_state.bitsandbytes__nf4"


def quantized(nested: bool, n: int = 40, k: int = 96) -> tuple[torch.Tensor, F.QuantState]:
    return F.quantize_4bit(torch.randn(n, k), quant_type="nf4", compress_statistics=nested)


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


# ---- exactly as many bytes and scales as there are elements and blocks


def operator_calls() -> dict[str, tuple[list[Any], dict[int, str]]]:
    """Right arguments, and by their place the names of those whose size is given by the others."""
    n, k = 300, 96
    packed, state = quantized(False, n, k)
    nested_packed, nested = quantized(True, n, k)
    x, out = torch.randn(2, k), torch.empty(2, n)
    codes, state8 = F.quantize_blockwise(torch.randn(1000), blocksize=100)
    second = nested.state2
    product = [x, packed, [n, k], state.absmax, 64, "nf4", None, None, None, None]
    of_nested = [x, nested_packed, [n, k], second.absmax, 64, "nf4", None, nested.absmax, second.code, nested.offset]
    layout = bnb._ops_fourbit.linear_4bit_layout((n, k), 64, "nf4")
    whole = [packed, state.absmax, 64, "nf4", [n, k], torch.float32]
    blockwise = [codes, state8.absmax, state8.code, 100, torch.float32]
    vector = [x, packed, [n, k], state.absmax, state.code, 64]
    rows, scales, _ = F.int8_vectorwise_quant(torch.randn(6, k))
    return {
        "dequantize_4bit": (whole, {0: "A", 1: "absmax"}),
        "dequantize_4bit.out": ([*whole, torch.empty(n, k)], {0: "A", 1: "absmax"}),
        "gemm_4bit": (product, {1: "B", 3: "absmax"}),
        "gemm_4bit nested": (of_nested, {1: "B", 3: "absmax", 7: "absmax_8bit", 8: "absmax_code", 9: "absmax_offset"}),
        "linear_4bit": ([x, packed, state.absmax, layout, None], {1: "B", 2: "absmax"}),
        "linear_4bit.nested": (
            [x, nested_packed, second.absmax, layout, None, nested.absmax, second.code, nested.offset],
            {1: "B", 2: "absmax", 5: "absmax_8bit"},
        ),
        "gemv_4bit": (vector, {1: "B", 3: "absmax", 4: "code"}),
        "gemv_4bit.out": ([*vector, out], {1: "B", 3: "absmax"}),
        "dequantize_blockwise": (blockwise, {1: "absmax", 2: "code"}),
        "dequantize_blockwise.out": ([*blockwise, torch.empty(1000)], {1: "absmax", 2: "code"}),
        "int8_vectorwise_dequant": ([rows, scales], {1: "stats"}),
        "int8_linear": ([x, rows, scales, None, 0.0], {2: "SCB"}),
    }


@pytest.mark.parametrize("device", ["cpu", "meta", "other"])
@pytest.mark.parametrize("name", operator_calls())
def test_operators_take_exact_sizes_only(name: str, device: str) -> None:
    def call(args: list[Any]) -> Any:
        op, _, overload = name.split()[0].partition(".")
        if device == "other":
            return on_other_device(name.split()[0], *args)
        args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        return getattr(getattr(ops, op), overload or "default")(*args)

    args, sized = operator_calls()[name]
    call(args)
    for at, argument in sized.items():
        right = args[at]
        flat = right.reshape(-1)
        for wrong in (torch.cat((flat, flat[:1])), flat[:-1], flat[: flat.numel() // 2], torch.cat((flat, flat))):
            with pytest.raises(ValueError, match=rf"{argument} (has|is) "):
                call([*args[:at], wrong, *args[at + 1 :]])
    if sized.get(1) == "B" or (sized.get(0) == "A" and "4bit" in name):  # a value cast of packed bytes doubles them
        at = 1 if sized.get(1) == "B" else 0
        with pytest.raises(ValueError, match=r"[AB] (has|is) \d+ bytes, expected"):
            call([*args[:at], args[at].to(torch.bfloat16), *args[at + 1 :]])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_storage_items_are_filled_up(storage: torch.dtype) -> None:
    for n in (0, 1, 3, 15, 16, 17, 33, 100):
        x = torch.randn(n)
        packed, state = F.quantize_4bit(x, quant_storage=storage)
        F.dequantize_4bit(packed, state)
        with pytest.raises(ValueError, match=r"A (has|is)"):
            F.dequantize_4bit(torch.cat((packed, packed.new_zeros(1, 1))), state)


def longer(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat((packed, packed[:64]))


@both_nestings
def test_loaders_take_exact_sizes_only(nested: bool) -> None:
    packed, state = quantized(nested)
    stats = state.as_dict(packed=True)
    saved = {"weight": packed, **{f"weight.{k}": v for k, v in stats.items()}}
    for weight in (longer(packed), packed[:-1], packed.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"data has \d+ bytes, expected 1920"):
            Params4bit.from_prequantized(weight, stats, device="cpu")
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=r"weight: .*\d+ bytes, expected 1920"):
                Linear4bit(96, 40, bias=False).load_state_dict({**saved, "weight": weight}, assign=assign)
        module = torch.nn.Linear(96, 40, bias=False)
        replace_parameter_4bit(module, "weight")
        with pytest.raises(RuntimeError, match=r"weight: .*\d+ bytes, expected 1920"):
            module.load_state_dict({**saved, "weight": weight})
        module = torch.nn.Linear(96, 40, bias=False)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match="weight has"):
            replace_parameter_4bit_prequantized(module, "weight", stats, torch.device("cpu"))
    for name in ("absmax", "nested_absmax", "quant_map", "nested_quant_map"):
        if name not in stats:
            continue
        for wrong in (torch.cat((stats[name], stats[name][:1])), stats[name][:-1]):
            with pytest.raises(RuntimeError, match=rf"weight: .*{name} has {wrong.numel()} elements"):
                Linear4bit(96, 40, bias=False).load_state_dict({**saved, f"weight.{name}": wrong})
    with pytest.raises(ValueError, match="absmax has 60 elements, expected 30"):
        F.QuantState.from_dict(with_fields(stats, blocksize=128), "cpu")


def test_int8_loaders_take_exact_sizes_only() -> None:
    layer = Linear8bitLt(32, 16, bias=False, has_fp16_weights=False).to("cpu")
    saved = layer.state_dict()
    for SCB in (saved["SCB"][:-1], torch.cat((saved["SCB"], saved["SCB"])), saved["SCB"][:0]):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match="SCB has shape"):
                copy.deepcopy(layer).load_state_dict({**saved, "SCB": SCB}, assign=assign)
    table = bnb.nn.Embedding8bit(12, 50).to("cpu")
    table.weight.SCB = table.weight.SCB.repeat(2)
    with pytest.raises(ValueError, match="SCB has 24 elements, expected 12"):
        table(torch.tensor([1]))
    table4 = bnb.nn.EmbeddingNF4(12, 64).to("cpu")
    for weight in (longer(table4.weight.data), table4.weight.data[:-1]):
        with pytest.raises(ValueError, match=r"weight has \d+ bytes, expected 384"):
            broken = copy.deepcopy(table4)
            broken.weight.data = weight
            broken(torch.tensor([1]))


# ---- broken files


def with_fields(items: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**items, KEY: pack_dict_to_tensor(unpack_tensor_to_dict(items[KEY]) | changes)}


def with_text(items: dict[str, Any], text: str | bytes) -> dict[str, Any]:
    raw = text.encode() if isinstance(text, str) else text
    return {**items, KEY: torch.tensor(list(raw), dtype=torch.uint8)}


def text_of(items: dict[str, Any]) -> str:
    return bytes(items[KEY].tolist()).decode()


HOSTILE_FIELDS: dict[str, list[Any]] = {
    "shape": [
        [-40, 96], [40.0, 96.0], ["40", "96"], "40", 3840, None, [[40, 96]], {"0": 40}, [True, 3840], [2**70, 2**70],
        [2**62, 2**62, 2**62], [40, 97], [0, 2**63], [10**300], [],
    ],
    "blocksize": [0, -64, 1, 63, 64.0, "64", None, True, [64], 2**70, 10**300, {}],
    "quant_type": ["fp4", "int4", "", None, 4, ["nf4"], {"nf4": 1}],
    "dtype": ["float99", "Tensor", "int8", "float64", "complex64", "", None, 16, ["float32"], "__class__", "nn"],
    "nested_blocksize": [0, -1, 256.0, "256", None, True, 2**70, []],
    "nested_dtype": ["float99", None, 3, [], "uint8"],
    "nested_offset": ["0.5", None, True, [0.5], {}, 10**400, 1e300, -1e39],
    "absmax": [[1.0, 2.0], 1],
    "surprise": [1],
}  # fmt: skip

NOT_A_TENSOR = (None, 5, "x", [1.0], {})
HOSTILE_TENSORS: dict[str, list[Any]] = {
    "absmax": [*NOT_A_TENSOR, torch.zeros(0), torch.zeros(60), torch.zeros(60, dtype=torch.int64),
               torch.zeros(60, dtype=torch.complex64), torch.zeros(61, dtype=torch.uint8), torch.zeros(60).to_sparse()],
    "quant_map": [*NOT_A_TENSOR, torch.zeros(0), torch.zeros(15), torch.zeros(256), torch.zeros(16, dtype=torch.int32)],
    "nested_absmax": [*NOT_A_TENSOR, torch.zeros(0), torch.zeros(2), torch.zeros(1, dtype=torch.bool)],
    "nested_quant_map": [*NOT_A_TENSOR, torch.zeros(0), torch.zeros(255), torch.zeros(256, dtype=torch.uint8)],
    KEY: [*NOT_A_TENSOR, torch.zeros(0, dtype=torch.uint8), torch.zeros(5), torch.zeros(3, dtype=torch.uint8),
          torch.zeros(10, dtype=torch.uint8, device="meta"), torch.full((2**17,), 32, dtype=torch.uint8)],
}  # fmt: skip

HOSTILE_TEXTS: list[str | bytes] = [
    "", " ", "null", "[]", "5", '"x"', "{", "{}", '{"a": }', "NaN",
    "[" * 60000, '{"a":' * 10000, b"\xff\xfe\x00", b"\x80{}",
    '{"shape": ' + "[" * 50000 + "]" * 50000 + "}", '{"blocksize": ' + "9" * 60000 + "}", "\x00" * 50,
    '{"quant_type": "\ud800"}'.encode("utf-8", "surrogatepass"), "{" + '"a": 1,' * 5000 + '"b": 2}',
]  # fmt: skip


def refused(items: Any, word: str = "") -> None:
    with pytest.raises(ValueError, match=r"QuantState\.from_dict: ") as info:
        F.QuantState.from_dict(items, device="cpu")
    assert word in str(info.value) and len(str(info.value)) < 1000, info.value


@pytest.mark.parametrize("field", HOSTILE_FIELDS)
def test_hostile_fields_are_refused(field: str) -> None:
    items = quantized(True)[1].as_dict(packed=True)
    for value in HOSTILE_FIELDS[field]:
        refused(
            with_fields(items, **{field: value}), "absmax" if field == "shape" and value in ([40, 97], []) else field
        )
        unpacked = F.QuantState.from_dict(items, "cpu").as_dict() | {field: value}
        if field != "surprise" and not (field == "quant_type" and value in ("fp4", None)):
            refused(unpacked, "absmax" if field == "shape" and value in ([40, 97], []) else field)


@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_entries_are_refused(name: str) -> None:
    items = quantized(True)[1].as_dict(packed=True)
    for value in HOSTILE_TENSORS[name]:
        refused({**items, name: value}, "" if name == KEY else name)
    path = {f"model.layers.0.weight.{k}": v for k, v in items.items()}
    refused({**path, "model.layers.0.weight.absmax": torch.zeros(3)}, "model.layers.0.weight.absmax has dtype float32")


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=range(len(HOSTILE_TEXTS)))
def test_hostile_texts_are_refused(text: str | bytes) -> None:
    refused(with_text(quantized(True)[1].as_dict(packed=True), text))


def test_entries_given_twice_are_refused() -> None:
    items = quantized(True)[1].as_dict(packed=True)
    text = text_of(items)
    refused(with_text(items, text.replace('"blocksize": 64', '"blocksize": 64, "blocksize": 128')), "twice")
    refused({**items, "other.absmax": items["absmax"]}, "expected one absmax")
    refused({"a." + KEY: items[KEY], **items}, "expected one")
    refused({1: 2}), refused(5), refused([]), refused(None)


def test_what_an_honest_file_may_hold() -> None:
    """An offset that is not finite, which a weight with a NaN has; text with escapes and blanks."""
    packed, state = F.quantize_4bit(torch.full((64,), torch.nan), compress_statistics=True, quant_type="nf4")
    found = F.QuantState.from_dict(state.as_dict(packed=True), "cpu")
    assert found.offset.isnan() and F.dequantize_4bit(packed, found).isnan().all()
    items = quantized(True)[1].as_dict(packed=True)
    expected = F.QuantState.from_dict(items, "cpu")
    for text in (json.dumps(json.loads(text_of(items)), indent=4), text_of(items).replace("nf4", "\\u006ef4")):
        assert F.QuantState.from_dict(with_text(items, text), "cpu") == expected


def test_broken_files_are_refused_by_layers_with_the_name_of_the_entry() -> None:
    packed, state = quantized(True)
    stats = state.as_dict(packed=True)
    for broken, word in (
        (with_text(stats, "[" * 60000), KEY),
        (with_fields(stats, shape="x"), f"shape in {KEY}"),
        ({**stats, "absmax": [1]}, "absmax"),
    ):
        saved = {"0.weight": packed, **{f"0.weight.{k}": v for k, v in broken.items()}}
        model = torch.nn.Sequential(Linear4bit(96, 40, bias=False))
        before = model[0].weight.data.clone()
        with pytest.raises(RuntimeError, match=r"0\.weight: QuantState\.from_dict: ") as info:
            model.load_state_dict(saved)
        assert word in str(info.value) and torch.equal(model[0].weight.data, before)
        with pytest.raises(ValueError, match="QuantState"):
            Params4bit.from_prequantized(packed, broken, device="cpu")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_packed_codes_are_not_read_with_the_statistics_of_others(assign: bool, strict: bool) -> None:
    old, new = (Linear4bit(96, 40, bias=False).to("cpu") for _ in range(2))
    x = torch.randn(2, 96)
    before, saved = old(x), new.state_dict()
    packed = saved["weight"]
    cases = {
        "absmax, quant_map and quant_state are missing": {"weight": packed},
        "absmax is on the meta device": saved | {"weight.absmax": saved["weight.absmax"].to("meta")},
    }
    if not assign:  # which makes a layer on the meta device
        cases["its tensor is on the meta device"] = saved | {"weight": packed.to("meta")}
    for message, broken in cases.items():
        with pytest.raises(RuntimeError, match=f"weight: .*{message}"):
            torch.nn.Sequential(old).load_state_dict(
                {f"0.{k}": v for k, v in broken.items()}, strict=strict, assign=assign
            )
        assert torch.equal(old(x), before)
    without = {k: v for k, v in saved.items() if k != "weight"}
    assert "weight" in old.load_state_dict(without, strict=False, assign=assign).missing_keys
    assert torch.equal(old(x), before)


def test_states_with_entries_on_the_meta_device() -> None:
    items = quantized(True)[1].as_dict(packed=True)
    for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
        on_meta = {**items, name: items[name].to("meta")}
        refused(on_meta, f"{name} is on the meta device, expected a tensor with data")
        assert F.QuantState.from_dict(on_meta, "meta").absmax.is_meta


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from([*HOSTILE_FIELDS, "quant_map", "nested_absmax"])


@settings(max_examples=40)
@given(st.dictionaries(fields, json_values, min_size=1, max_size=3), st.data())
def test_any_text_is_a_state_or_a_named_error(changes: dict[str, Any], data: st.DataObject) -> None:
    items = STATES[data.draw(st.booleans())]
    text = json.dumps(json.loads(text_of(items)) | changes)
    at = data.draw(st.integers(0, len(text)))
    raw = text.encode()
    for broken in (raw, raw[:at], raw[:at] + data.draw(st.binary(max_size=3)) + raw[at:]):
        try:
            F.QuantState.from_dict(with_text(items, broken), "cpu")
        except ValueError as error:
            assert str(error).startswith("QuantState.from_dict: ")


STATES = {nested: quantized(nested)[1].as_dict(packed=True) for nested in (False, True)}
