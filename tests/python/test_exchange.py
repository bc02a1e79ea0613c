"""Checkpoints of the released package load here and ours load there, with equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference as ref
import torch
from process import run_reference
from safetensors.torch import load_file, save_file

import bitsandbytes as bnb
import bitsandbytes.functional as F

GOLDEN = Path(__file__).parents[1] / "golden"
STORAGES = {"uint8": torch.uint8, "bfloat16": torch.bfloat16}
KINDS = [(quant_type, nested) for quant_type in ("nf4", "fp4") for nested in (False, True)]
every_kind = pytest.mark.parametrize(("quant_type", "nested"), KINDS)
every_storage = pytest.mark.parametrize("storage", STORAGES)


def golden(quant_type: str, nested: bool, storage: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The state of a layer that the released package saved, and what it dequantizes the weight to."""
    tensors = load_file(GOLDEN / f"checkpoint_{quant_type}_{'nested' if nested else 'plain'}.safetensors")
    prefix = storage + "."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, tensors["expected"]


def source() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "checkpoint_source.safetensors")


def fresh(quant_type: str, nested: bool, storage: str) -> bnb.nn.Linear4bit:
    rows, columns = source()["weight"].shape
    options = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": STORAGES[storage]}
    return bnb.nn.Linear4bit(columns, rows, compute_dtype=torch.bfloat16, **options).bfloat16()


def quantized(quant_type: str, nested: bool, storage: str) -> bnb.nn.Linear4bit:
    linear = fresh(quant_type, nested, storage)
    linear.load_state_dict(source())
    return linear.to("cpu")


def dequantize(linear: bnb.nn.Linear4bit) -> torch.Tensor:
    return F.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].shape == value.shape, key
        assert (ref.raw(found[key]) == ref.raw(value)).all(), key


@every_storage
@every_kind
def test_released_checkpoint_loads_and_is_saved_with_equal_bytes(
    quant_type: str, nested: bool, storage: str, tmp_path: Path
) -> None:
    state, expected = golden(quant_type, nested, storage)
    linear = fresh(quant_type, nested, storage).to("cpu")
    linear.load_state_dict(state, strict=True)
    assert torch.equal(dequantize(linear), expected)
    assert_same_state(linear.state_dict(), state)
    save_file({k: v.contiguous() for k, v in linear.state_dict().items()}, tmp_path / "ours.safetensors")
    assert_same_state(load_file(tmp_path / "ours.safetensors"), state)


@every_storage
@every_kind
def test_released_checkpoint_loads_as_transformers_does(quant_type: str, nested: bool, storage: str) -> None:
    """Through Params4bit.from_prequantized, with keys that still carry the path of the module."""
    state, expected = golden(quant_type, nested, storage)
    stats = {"model.layer." + k: v for k, v in state.items() if k not in ("weight", "bias")}
    weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert torch.equal(F.dequantize_4bit(weight.data, weight.quant_state), expected)
    assert (weight.quant_type, weight.compress_statistics, weight.blocksize) == (quant_type, nested, 64)
    assert weight.bnb_quantized and weight.quant_storage == STORAGES[storage]


@every_storage
@every_kind
def test_quantizing_gives_the_released_bytes(quant_type: str, nested: bool, storage: str) -> None:
    """All tensors; but for nested scales see test_nested_codes_differ_only_where_ours_are_nearer."""
    state, _ = golden(quant_type, nested, storage)
    ours = quantized(quant_type, nested, storage).state_dict()
    assert ours.keys() == state.keys()
    for key, value in state.items():
        if key == "weight.absmax" and not nested:
            # A block of zeros has absmax 0 here and 1e-38 there.
            assert torch.equal(torch.where(value == np.float32(1e-38), 0, value), ours[key])
        elif key != "weight.absmax":
            assert ours[key].dtype == value.dtype and (ref.raw(ours[key]) == ref.raw(value)).all(), key


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_nested_codes_differ_only_where_ours_are_nearer(quant_type: str) -> None:
    """The released CPU package looks 8-bit codes up in a table of 65,536 bins, which is not exact near 0."""
    state, _ = golden(quant_type, True, "uint8")
    theirs, code, scales = state["weight.absmax"], state["weight.nested_quant_map"], state["weight.nested_absmax"]
    linear = quantized(quant_type, True, "uint8")
    ours, offset = linear.weight.quant_state.absmax, linear.weight.quant_state.offset
    _, absmax = ref.quantize4(ref.floats(source()["weight"]), quant_type, 64)
    scale = scales.repeat_interleave(256)[: len(absmax)].double()
    exact = (torch.from_numpy(absmax).double() - offset) / scale
    distance = {"ours": (code[ours.int()] - exact).abs(), "theirs": (code[theirs.int()] - exact).abs()}
    differ = ours != theirs
    print(f"{quant_type}: {differ.sum()} of {len(ours)} nested codes differ from the released package's")
    assert (distance["ours"] <= distance["theirs"] + 1e-7).all()
    assert differ.sum() < 0.1 * len(ours)


# ---- the other direction: the released package itself


LOAD_OURS = """
import torch
from bitsandbytes import functional as F
from safetensors.torch import load_file, save_file
found = {}
for path in sys.argv[2:]:
    tensors = load_file(path)
    weight = bitsandbytes.nn.Params4bit.from_prequantized(
        tensors["weight"], {k: v for k, v in tensors.items() if k not in ("weight", "bias")}, device="cpu")
    found[path] = F.dequantize_4bit(weight.data, weight.quant_state)
    # and what it saves again
    linear = bitsandbytes.nn.Linear4bit(*reversed(weight.quant_state.shape), quant_type=weight.quant_type).bfloat16()
    linear.weight, linear.bias = weight, torch.nn.Parameter(tensors["bias"])
    again = linear.state_dict()
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        assert again[key].dtype == value.dtype
        assert torch.equal(again[key].contiguous().view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)), key
save_file(found, sys.argv[1])
"""


def test_released_package_loads_our_state(reference_python: str, tmp_path: Path) -> None:
    """It dequantizes our state to our values and saves our bytes again."""
    layers = {}
    for quant_type, nested in KINDS:
        for storage in STORAGES:
            path = tmp_path / f"{quant_type}_{nested}_{storage}.safetensors"
            layers[str(path)] = quantized(quant_type, nested, storage)
            save_file({k: v.contiguous() for k, v in layers[str(path)].state_dict().items()}, path)
    run_reference(reference_python, LOAD_OURS, str(tmp_path / "found.safetensors"), *layers)
    found = load_file(tmp_path / "found.safetensors")
    assert found.keys() == layers.keys()
    for path, linear in layers.items():
        assert torch.equal(found[path], dequantize(linear)), path


def test_states_pickled_here_load_there(reference_python: str, tmp_path: Path) -> None:
    linear = quantized("nf4", True, "uint8")
    torch.save({"state": linear.weight.quant_state, "weight": linear.weight.data}, tmp_path / "state.pt")
    code = """
import torch
from bitsandbytes import functional as F
saved = torch.load(sys.argv[1], weights_only=False)
torch.save(F.dequantize_4bit(saved["weight"], saved["state"]), sys.argv[2])
"""
    run_reference(reference_python, code, str(tmp_path / "state.pt"), str(tmp_path / "found.pt"))
    assert torch.equal(torch.load(tmp_path / "found.pt"), dequantize(linear))


# ---- LLM.int8()


def golden_int8() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The state of a layer that the released package saved; what it dequantizes to, an input and its output."""
    tensors = load_file(GOLDEN / "checkpoint_int8.safetensors")
    more = {key: tensors.pop(key) for key in ("expected", "x", "y")}
    return tensors, more


def int8_layer() -> bnb.nn.Linear8bitLt:
    rows, columns = source()["weight"].shape
    layer = bnb.nn.Linear8bitLt(columns, rows, has_fp16_weights=False, threshold=6.0).bfloat16()
    layer.load_state_dict(source())
    return layer.to("cpu")


def test_released_int8_checkpoint_loads_and_is_saved_with_equal_bytes(tmp_path: Path) -> None:
    state, more = golden_int8()
    layer = int8_layer()
    layer.load_state_dict(state, strict=True)
    ref.assert_bits(F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB), more["expected"])
    with torch.no_grad():
        assert ref.relative_error(layer(more["x"]), more["y"]) < 5e-3, "both round to bf16, theirs more than once"
    assert_same_state(layer.state_dict(), state)
    save_file(layer.state_dict(), tmp_path / "ours.safetensors")
    assert_same_state(load_file(tmp_path / "ours.safetensors"), state)


def test_quantizing_gives_the_released_codes() -> None:
    """The released layer rounds its bf16 weight to fp16 first, which changes tiny elements alone."""
    state, _ = golden_int8()
    ours = int8_layer().state_dict()
    through_fp16 = F.int8_vectorwise_quant(source()["weight"].half())
    assert torch.equal(through_fp16[0], state["weight"])
    ref.assert_bits(through_fp16[1], state["SCB"])
    assert (ours["weight"].int() - state["weight"].int()).abs().max() <= 1
    assert (ours["weight"] != state["weight"]).float().mean() < 1e-3
    torch.testing.assert_close(ours["SCB"], state["SCB"], rtol=1e-3, atol=0)


LOAD_OUR_INT8 = """
import torch
from bitsandbytes import functional as F
from safetensors.torch import load_file, save_file
tensors = load_file(sys.argv[1])
x = tensors.pop("x")
layer = bitsandbytes.nn.Linear8bitLt(*reversed(tensors["weight"].shape), has_fp16_weights=False, threshold=6.0)
layer = layer.bfloat16().to("cpu").eval()
layer.load_state_dict(tensors, strict=True)
with torch.no_grad():
    y = layer(x)
again = {key: value.contiguous() for key, value in layer.state_dict().items()}
save_file(again | {"y": y, "expected": F.int8_vectorwise_dequant(again["weight"], again["SCB"])}, sys.argv[2])
"""


def test_released_package_loads_our_int8_state(reference_python: str, tmp_path: Path) -> None:
    layer, x = int8_layer(), golden_int8()[1]["x"]
    save_file({**layer.state_dict(), "x": x}, tmp_path / "ours.safetensors")
    run_reference(reference_python, LOAD_OUR_INT8, str(tmp_path / "ours.safetensors"), str(tmp_path / "theirs"))
    found = load_file(tmp_path / "theirs")
    y, expected = found.pop("y"), found.pop("expected")
    assert_same_state(found, layer.state_dict())
    ref.assert_bits(F.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB), expected)
    with torch.no_grad():
        assert ref.relative_error(layer(x), y) < 5e-3
