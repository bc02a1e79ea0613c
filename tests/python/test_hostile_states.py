"""States from files that are broken: each is refused by name, and what honest files may hold is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from state_items import KEY, quantized, text_of, with_fields, with_text

import bitsandbytes.functional as F
from bitsandbytes.nn import Linear4bit, Params4bit

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
    cases["its layout is torch.sparse_coo"] = saved | {"weight": packed.to_sparse()}
    cases["its layout is nested"] = saved | {"weight": torch.nested.nested_tensor([packed])}
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


def test_an_entry_of_several_tensors_in_one_is_refused() -> None:
    items = quantized(True)[1].as_dict(packed=True)
    for name in ("absmax", "nested_absmax"):
        refused({**items, name: torch.nested.nested_tensor([items[name]])}, f"{name} has layout")


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
