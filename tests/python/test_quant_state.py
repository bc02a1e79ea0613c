"""QuantState: its forms in a checkpoint, equality, moves, copies; and the dict packing it stands on."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import reference as ref
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized
from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict

PACKED = ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"]
NESTED = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"]


def state_of(nested: bool, dtype: torch.dtype = torch.bfloat16, quant_type: str = "nf4") -> F.QuantState:
    return F.quantize_4bit(torch.randn(40, 96).to(dtype), quant_type=quant_type, compress_statistics=nested)[1]


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dict_round_trip(nested: bool, packed: bool, dtype: torch.dtype) -> None:
    state = state_of(nested, dtype)
    items = state.as_dict(packed=packed)
    before = dict(items)
    found = F.QuantState.from_dict(items, device="cpu")
    assert found == state and items == before, "the dict is not consumed"
    assert found.dtype == dtype and found.shape == (40, 96) and isinstance(found.shape, torch.Size)
    prefixed = {f"model.layers.0.q_proj.weight.{k}": v for k, v in items.items()}
    if packed:
        assert F.QuantState.from_dict(prefixed, device="cpu") == state


def test_packed_form() -> None:
    assert list(state_of(False).as_dict(packed=True)) == PACKED
    items = state_of(True).as_dict(packed=True)
    assert list(items) == NESTED
    text = bytes(items["quant_state.bitsandbytes__nf4"].tolist()).decode()
    fields = json.loads(text)
    assert list(fields) == [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]
    assert text == json.dumps(fields) and fields["dtype"] == "bfloat16" and fields["shape"] == [40, 96]
    assert items["absmax"].dtype == torch.uint8 and items["nested_absmax"].dtype == torch.float32


def test_states_share_no_memory_that_safetensors_would_refuse() -> None:
    a, b = state_of(True).as_dict(packed=True), state_of(True).as_dict(packed=True)
    assert not {v.data_ptr() for v in a.values()} & {v.data_ptr() for v in b.values()}


def test_unpacked_form() -> None:
    items = state_of(True).as_dict()
    assert set(items) | {"quant_state"} == set(F.QuantState.valid_qs_keys)
    assert items["shape"] == (40, 96) and items["dtype"] == "bfloat16" and isinstance(items["nested_offset"], float)


WRONG: dict[str, Any] = {
    "found neither packed nor unpacked": lambda d: {},
    "absmax": lambda d: {k: v for k, v in d.items() if k != "absmax"},
    "nested_quant_map": lambda d: {k: v for k, v in d.items() if k != "nested_quant_map"},
    "surprise": lambda d: d | {"surprise": torch.ones(1)},
    "bitsandbytes__fp4": lambda d: d | {"quant_state.bitsandbytes__fp4": d["quant_state.bitsandbytes__nf4"]},
    "JSON": lambda d: d | {"quant_state.bitsandbytes__nf4": torch.tensor([1, 2, 3], dtype=torch.uint8)},
    "float99": lambda d: d | {"quant_state.bitsandbytes__nf4": _with(d, dtype="float99")},
}


def _with(items: dict[str, torch.Tensor], **changes: Any) -> torch.Tensor:
    return pack_dict_to_tensor(unpack_tensor_to_dict(items["quant_state.bitsandbytes__nf4"]) | changes)


@pytest.mark.parametrize("word", WRONG)
def test_wrong_dicts_are_refused(word: str) -> None:
    with pytest.raises(ValueError, match="packed or unpacked" if "neither" in word else word):
        F.QuantState.from_dict(WRONG[word](state_of(True).as_dict(packed=True)), device="cpu")


@pytest.mark.parametrize("nested", [False, True])
def test_equality(nested: bool) -> None:
    state = state_of(nested)
    assert state == copy.deepcopy(state) and state == pickle.loads(pickle.dumps(state))
    assert state != state_of(not nested) and state != state_of(nested) and state != 5
    for name, value in (
        ("blocksize", 128),
        ("quant_type", "fp4"),
        ("dtype", torch.float32),
        ("shape", torch.Size([96, 40])),
    ):
        other = copy.deepcopy(state)
        setattr(other, name, value)
        assert other != state, name
    for name in ("absmax", "code", *(("offset",) if nested else ())):
        other = copy.deepcopy(state)
        getattr(other, name).view(-1)[0] += 1
        assert other != state, name
    with pytest.raises(TypeError):
        hash(state)


@pytest.mark.parametrize("nested", [False, True])
def test_list_form(nested: bool) -> None:
    state = state_of(nested)
    absmax, shape, dtype, blocksize, second, quant_type = state[:]
    assert (
        absmax is state.absmax
        and shape == state.shape
        and dtype == torch.bfloat16
        and blocksize == 64
        and quant_type == "nf4"
    )
    assert second == [state.offset, state.state2] if nested else second is None
    assert state[0] is state.absmax and state[-1] == "nf4"
    with pytest.raises(IndexError):
        state[6]


def test_to_moves_everything_in_place() -> None:
    state = state_of(True)
    state.to("meta")
    tensors = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert all(t.is_meta for t in tensors)
    assert not F.create_dynamic_map().is_meta and not state_of(True).state2.code.is_meta, "the shared map stays"


def test_attribute_of_a_state_dict_key() -> None:
    """FSDP reads weight.quant_state.bitsandbytes__nf4 by attribute."""
    state = state_of(True)
    packed = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"]
    assert torch.equal(state.bitsandbytes__nf4, packed)
    for name in ("bitsandbytes__fp4", "bitsandbytes__None", "surprise"):
        assert not hasattr(state, name)


def test_blockwise_state() -> None:
    codes, state = F.quantize_blockwise(torch.randn(5000), blocksize=512, nested=True)
    assert state[:] == [state.absmax, None, torch.float32, 512, [state.offset, state.state2], None]
    assert state.state2.blocksize == 512 and state.absmax.dtype == torch.uint8
    assert torch.equal(F.dequantize_blockwise(codes, copy.deepcopy(state)), F.dequantize_blockwise(codes, state))


def test_dict_packing() -> None:
    source = {"a": 1, "b": [1.5, "é", None], "c": {"d": True}}
    packed = pack_dict_to_tensor(source)
    assert packed.dtype == torch.uint8 and bytes(packed.tolist()) == json.dumps(source).encode()
    assert unpack_tensor_to_dict(packed) == source
    for wrong, word in (
        (packed.float(), "uint8"),
        (packed[:-1], "JSON"),
        (torch.tensor([0x31], dtype=torch.uint8), "dict"),
    ):
        with pytest.raises(ValueError, match=word):
            unpack_tensor_to_dict(wrong)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_layout_of_the_released_package_on_cpus(nested: bool, storage: torch.dtype) -> None:
    """Rows in groups of 32: byte (k / 2, row, k % 2) holds the codes of `row` (low nibble) and `row + 16` (high)."""
    weight, options = (
        torch.randn(64, 128),
        {"quant_type": "nf4", "compress_statistics": nested, "quant_storage": storage},
    )
    packed, state = F.quantize_4bit(weight, **options)
    before = copy.deepcopy(state)
    other, other_state = F._convert_weight_packed_for_cpu(packed, state)
    assert state == before and other.shape == (64, 64) and other.dtype == torch.uint8
    stored = packed.view(torch.uint8).view(64, 64)

    def nibble(row: int, k: int) -> int:
        return int(stored[row, k // 2]) >> (4 if k % 2 == 0 else 0) & 15

    flat = other.flatten().tolist()
    for group, row, k in ((0, 0, 0), (0, 5, 7), (1, 15, 127), (1, 3, 64)):
        byte = flat[group * 32 * 64 + (k // 2) * 32 + row * 2 + k % 2]
        assert byte == nibble(32 * group + row + 16, k) << 4 | nibble(32 * group + row, k)
    assert other_state.packing_format_for_cpu and other_state.absmax.shape == (2, 64)
    expected = F.dequantize_4bit(packed, state)
    assert torch.equal(F.dequantize_4bit(other, other_state), expected), "what is packed so is still read right"
    back, back_state = F._convert_weight_packed_for_cpu_inverse(other, other_state)
    assert (
        torch.equal(back.view(torch.uint8), packed.view(torch.uint8)) and back.dtype == storage and back_state == state
    )
    for wrong in ({"block_n": 16}, {"block_n": 64}):
        with pytest.raises(ValueError, match="block_n"):
            F._convert_weight_packed_for_cpu(packed, state, **wrong)
    with pytest.raises(ValueError, match="shape"):
        F._convert_weight_packed_for_cpu(*F.quantize_4bit(weight[:48], **options))


# ---- parametrized parameters, which carry a state


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4, 24, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("eoi,i->eo", self.w, x) + self.w.sum()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_parametrized_parameter(quant_type: str, nested: bool) -> None:
    module = Experts()
    packed, state = F.quantize_4bit(module.w.data, quant_type=quant_type, compress_statistics=nested)
    expected = F.dequantize_4bit(packed, state)
    replace_parameter_4bit(module, "w", compress_statistics=nested, quant_type=quant_type)
    ref.assert_bits(module.w, expected)
    saved = module.state_dict()
    assert list(saved) == ["w", *(f"w.{k}" for k in state.as_dict(packed=True))]
    other = Experts()
    replace_parameter_4bit(other, "w", compress_statistics=not nested, quant_type="nf4")
    other.load_state_dict(saved, strict=True)
    ref.assert_bits(other.w, expected)
    third = Experts()
    third.w = torch.nn.Parameter(saved["w"], requires_grad=False)
    replace_parameter_4bit_prequantized(third, "w", {k: v for k, v in saved.items() if k != "w"}, torch.device("cpu"))
    ref.assert_bits(third.w, expected)


def test_parametrized_parameter_is_read_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Experts()
    replace_parameter_4bit(module, "w")
    calls: list[int] = []
    dequantize = F.dequantize_4bit
    monkeypatch.setattr(F, "dequantize_4bit", lambda *args: calls.append(1) or dequantize(*args))
    module(torch.ones(40))
    assert len(calls) == 1
    with pytest.raises(RuntimeError):
        module(torch.ones(41))
    assert not torch.nn.utils.parametrize._cache_enabled and not torch.nn.utils.parametrize._cache


def test_parametrize_refuses_what_is_no_parameter() -> None:
    module = Experts()
    module.number = 5
    with pytest.raises(AttributeError, match="nope"):
        replace_parameter_4bit(module, "nope")
    with pytest.raises(TypeError, match="number"):
        replace_parameter_4bit(module, "number")
    with pytest.raises(ValueError, match="quant_type"):
        replace_parameter_4bit(module, "w", quant_type="int4")


@pytest.mark.parametrize("part", ["offset", "state2"])
def test_incomplete_nested_state_is_refused(part: str) -> None:
    packed, state = F.quantize_4bit(torch.randn(64, 128), compress_statistics=True, quant_type="nf4")
    setattr(state, part, None)
    with pytest.raises(ValueError, match=part):
        F.dequantize_4bit(packed, state)


@pytest.mark.parametrize("nested", [False, True])
def test_packed_state_of_8_bits_round_trips(nested: bool) -> None:
    codes, state = F.quantize_blockwise(torch.randn(64, 64), nested=nested)
    again = F.QuantState.from_dict(state.as_dict(packed=True), torch.device("cpu"))
    assert again == state
    assert torch.equal(F.dequantize_blockwise(codes, again), F.dequantize_blockwise(codes, state))


def test_wrong_states_are_named() -> None:
    packed, state = F.quantize_4bit(torch.randn(64, 128))
    x = torch.randn(3, 128)
    for wrong in ("x", 5, [1, 2]):
        with pytest.raises(TypeError, match="quant_state"):
            F.dequantize_4bit(packed, wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="quant_state"):
            bnb.matmul_4bit(x, packed.t(), wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="B is NoneType"):
        bnb.matmul_4bit(x, None, state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"blocksize is 64\.0"):
        F.quantize_4bit(x, blocksize=64.0)  # type: ignore[arg-type]
