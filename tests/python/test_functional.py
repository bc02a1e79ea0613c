"""bitsandbytes.functional: states, nested statistics, outputs given by the caller, maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference as ref
import torch
from process import run_reference
from torch._subclasses.fake_tensor import FakeTensorMode

import bitsandbytes.functional as F

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("storage", ref.STORAGES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(7, 96), (1, 3, 5), (), (0, 4), (1,)], ids=str)
def test_4bit_round_trip(shape, dtype, quant_type, storage) -> None:
    x = torch.randn(shape).to(dtype)
    packed, state = F.quantize_4bit(x, quant_type=quant_type, blocksize=64, quant_storage=storage)
    expected, absmax = ref.quantize4(ref.floats(x), quant_type, 64)
    np.testing.assert_array_equal(ref.raw(packed)[: expected.size], expected)
    assert (state.shape, state.dtype, state.blocksize, state.quant_type) == (x.shape, dtype, 64, quant_type)
    assert not state.nested
    np.testing.assert_array_equal(state.code.numpy(), ref.VALUES[quant_type])
    y = torch.from_numpy(ref.dequantize4(expected, absmax, quant_type, 64, x.numel())).to(dtype).reshape(shape)
    ref.assert_bits(F.dequantize_4bit(packed, state), y)
    named = {"nf4": (F.quantize_nf4, F.dequantize_nf4), "fp4": (F.quantize_fp4, F.dequantize_fp4)}[quant_type]
    packed2, state2 = named[0](x, quant_storage=storage)
    assert torch.equal(packed2.view(torch.uint8), packed.view(torch.uint8))
    ref.assert_bits(named[1](packed2, state2), y)


def test_defaults() -> None:
    x = torch.randn(256)
    packed, state = F.quantize_4bit(x)
    assert (state.quant_type, state.blocksize, packed.dtype, state.nested) == ("fp4", 64, torch.uint8, False)
    codes, state = F.quantize_blockwise(torch.randn(5000))
    assert (state.blocksize, codes.dtype, state.nested) == (4096, torch.uint8, False)
    ref.assert_bits(state.code, F.create_dynamic_map())


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(300, 64), (17, 33), (1,)], ids=str)
def test_nested_statistics(quant_type: str, shape: tuple[int, ...]) -> None:
    """offset = mean(absmax); absmax - offset by the dynamic map in blocks of 256."""
    x = torch.randn(shape) * torch.rand(shape[0], *[1] * (len(shape) - 1))
    packed, state = F.quantize_4bit(x, quant_type=quant_type, compress_statistics=True)
    expected, absmax = ref.quantize4(ref.floats(x), quant_type, 64)
    np.testing.assert_array_equal(ref.raw(packed), expected)
    assert state.nested and state.state2.blocksize == 256 and state.state2.dtype == torch.float32
    ref.assert_bits(state.offset, torch.from_numpy(absmax).mean())
    code = F.create_dynamic_map()
    ref.assert_bits(state.state2.code, code)
    codes, scales = ref.quantize8(absmax - state.offset.numpy(), code.numpy(), 256)
    np.testing.assert_array_equal(state.absmax.numpy(), codes)
    np.testing.assert_array_equal(state.state2.absmax.numpy(), scales)
    restored = ref.dequantize8(codes, scales, code.numpy(), 256) + state.offset.numpy()
    y = torch.from_numpy(ref.dequantize4(expected, restored, quant_type, 64, x.numel())).reshape(shape)
    ref.assert_bits(F.dequantize_4bit(packed, state), y)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("blocksize", [*ref.BLOCKSIZES[1:], 1, 7, 100, 8192, 16384, 2**63 - 1])
def test_blockwise_round_trip(blocksize: int, dtype: torch.dtype, nested: bool) -> None:
    x = torch.randn(300, 101).to(dtype)
    codes, state = F.quantize_blockwise(x, blocksize=blocksize, nested=nested)
    values = state.code.numpy()
    expected, absmax = ref.quantize8(ref.floats(x), values, blocksize)
    np.testing.assert_array_equal(codes.numpy().reshape(-1), expected)
    if nested:
        offset = torch.from_numpy(absmax).mean()
        ref.assert_bits(state.offset, offset)
        inner = state.state2
        expected_codes, scales = ref.quantize8(absmax - offset.numpy(), inner.code.numpy(), inner.blocksize)
        np.testing.assert_array_equal(state.absmax.numpy(), expected_codes)
        absmax = ref.dequantize8(expected_codes, scales, inner.code.numpy(), inner.blocksize) + offset.numpy()
    else:
        np.testing.assert_array_equal(state.absmax.numpy(), absmax)
    y = torch.from_numpy(ref.dequantize8(expected, absmax, values, blocksize)).to(dtype).reshape(x.shape)
    ref.assert_bits(F.dequantize_blockwise(codes, state), y)


def test_quantization_error_is_bounded() -> None:
    """Half the largest gap of the map, times absmax."""
    x = torch.randn(64, 512)
    for quant_type, values in ref.VALUES.items():
        y = F.dequantize_4bit(*F.quantize_4bit(x, quant_type=quant_type))
        gap = float(np.diff(np.sort(values)).max()) / 2
        assert ((x - y).abs().view(-1, 64).amax(1) <= x.abs().view(-1, 64).amax(1) * gap * 1.001).all()
    y = F.dequantize_blockwise(*F.quantize_blockwise(x, blocksize=256))
    gap = F.create_dynamic_map().diff().max() / 2
    assert ((x - y).abs().view(-1, 256).amax(1) <= x.abs().view(-1, 256).amax(1) * gap * 1.001).all()


# ---- outputs given by the caller


def test_outputs_of_quantize() -> None:
    x = torch.randn(128)
    packed, state = F.quantize_4bit(x, quant_type="nf4")
    out, absmax = torch.empty_like(packed), torch.empty(2)
    got, state2 = F.quantize_4bit(x, out=out, absmax=absmax, quant_type="nf4")
    assert got is out and state2.absmax is absmax
    assert torch.equal(out, packed) and torch.equal(absmax, state.absmax)
    codes, state = F.quantize_blockwise(x, blocksize=64)
    out, absmax = torch.empty_like(codes), torch.empty(2)
    got, state2 = F.quantize_blockwise(x, out=out, absmax=absmax, blocksize=64)
    assert got is out and state2.absmax is absmax
    assert torch.equal(out, codes) and torch.equal(absmax, state.absmax)


@pytest.mark.parametrize("nested", [False, True])
def test_outputs_of_dequantize(nested: bool) -> None:
    x = torch.randn(12, 70).bfloat16()
    packed, state = F.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
    out = torch.empty_like(x)
    assert F.dequantize_4bit(packed, state, out=out) is out
    ref.assert_bits(out, F.dequantize_4bit(packed, state))
    if not nested:
        again = torch.empty_like(x)
        F.dequantize_4bit(packed, absmax=state.absmax, out=again, blocksize=64, quant_type="nf4")
        ref.assert_bits(again, out)
    codes, state = F.quantize_blockwise(x, nested=nested)
    out = torch.empty_like(x)
    assert F.dequantize_blockwise(codes, state, out=out) is out
    ref.assert_bits(out, F.dequantize_blockwise(codes, state))
    if not nested:
        assert F.dequantize_blockwise(codes, absmax=state.absmax).dtype == torch.float32
        ref.assert_bits(F.dequantize_blockwise(codes, absmax=state.absmax, code=state.code).bfloat16(), out)


def test_transposed_weights_dequantize_transposed() -> None:
    """Linear4bit hands the packed weight over as weight.t(): a [1, bytes] tensor gives the transposed result."""
    packed, state = F.quantize_4bit(torch.randn(24, 64), quant_type="nf4")
    ref.assert_bits(F.dequantize_4bit(packed.t(), state), F.dequantize_4bit(packed, state).t())


# ---- maps


MAKERS = {
    "4bit": lambda name: F.get_4bit_type(name, device="cpu"),
    "dynamic": lambda signed, exponent, total: F.create_dynamic_map(signed == "1", int(exponent), int(total)),
    "linear": lambda signed, total, zero: F.create_linear_map(signed == "1", int(total), zero == "1"),
    "normal": lambda offset, extra: F.create_normal_map(float(offset), extra == "1"),
    "fp8": lambda signed, exponent, precision, total: F.create_fp8_map(
        signed == "1", int(exponent), int(precision), int(total)
    ),
}
GOLDEN_MAPS = dict(line.split(" : ") for line in (GOLDEN / "codebooks.txt").read_text().splitlines() if line[0] != "#")


@pytest.mark.parametrize("call", GOLDEN_MAPS)
def test_map_equals_the_released_one(call: str) -> None:
    maker, *arguments = call.split()
    expected = np.array([int(word, 16) for word in GOLDEN_MAPS[call].split()], np.uint32).view(np.float32)
    ref.assert_bits(MAKERS[maker](*arguments), torch.from_numpy(expected))


RELEASED_MAPS = """
import torch, itertools
import bitsandbytes.functional as F
found = {}
def note(name, *arguments):
    try:
        values = getattr(F, f"create_{name}_map")(*arguments)
    except Exception:
        values = None
    found[name, *arguments] = values if values is not None and not values.isnan().any() else None
for signed, total in itertools.product((True, False), range(1, 9)):
    for exponent in (*range(12), 40):
        note("dynamic", signed, exponent, total)
        for precision in range(9 if exponent < 9 else 0):
            note("fp8", signed, exponent, precision, total)
    for zero in (True, False):
        note("linear", signed, total, zero)
for offset, extra in itertools.product((0.51, 0.6, 0.9, 0.9677083, 0.99, 0.9999), (True, False)):
    note("normal", offset, extra)
torch.save(found, sys.argv[1])
"""


def test_maps_for_all_arguments_equal_the_released_ones(reference_python: str, tmp_path: Path) -> None:
    """Where it gives none, or NaN, there is a named error."""
    run_reference(reference_python, RELEASED_MAPS, str(tmp_path / "maps.pt"))
    released = torch.load(tmp_path / "maps.pt")
    for (name, *arguments), expected in released.items():
        make = getattr(F, f"create_{name}_map")
        if expected is None:
            with pytest.raises(ValueError, match=f"create_{name}_map: "):
                make(*arguments)
        else:
            ref.assert_bits(make(*arguments), expected)
    for call in (("dynamic", True, 1, 1), ("dynamic", True, 0, 1), ("dynamic", False, 0, 1), ("fp8", False, 0, 8, 8)):
        assert released[call] is not None
    assert sum(expected is not None for expected in released.values()) > 150


@pytest.mark.parametrize("arguments", [(True, 7.0), (True, "7"), (True, None), (True, 7, 2**80), (True, -1)])
def test_wrong_arguments_of_maps_are_named(arguments: tuple[Any, ...]) -> None:
    for make in (F.create_dynamic_map, F.create_fp8_map):
        with pytest.raises(ValueError, match=f"{make.__name__}: .*_bits is "):
            make(*arguments)
    with pytest.raises(ValueError, match="create_normal_map: offset is"):
        F.create_normal_map(float("nan"))


def test_maps_do_not_depend_on_a_default_device() -> None:
    F.name2qmap.clear()
    with torch.device("meta"):
        assert F.create_dynamic_map().is_meta  # as all that is made here
        F.quantize_blockwise(torch.ones(64, device="cpu"))
    ref.assert_bits(F.name2qmap["dynamic"], F.create_dynamic_map())


@pytest.mark.parametrize("blocksize", [0, -1, 100, 16384, 64.0, True, "64", None, 2**63])
def test_wrong_blocksizes_are_named(blocksize: Any) -> None:
    calls = {
        "quantize_4bit": lambda x: F.quantize_4bit(x, blocksize=64 if blocksize is None else blocksize),
        "quantize_blockwise": lambda x: F.quantize_blockwise(x, blocksize=blocksize),
    }
    for name, call in calls.items():
        if (name == "quantize_4bit" and blocksize is None) or (name != "quantize_4bit" and blocksize in (100, 16384)):
            continue
        with pytest.raises(ValueError, match=f"{name}: blocksize is "):
            call(torch.ones(64))
    with FakeTensorMode(), pytest.raises(ValueError, match="quantize_blockwise: blocksize on cuda"):
        F.quantize_blockwise(torch.ones(64, device="cuda"), torch.ones(256, device="cuda"), blocksize=blocksize)


@pytest.mark.parametrize("make", [F.create_dynamic_map, F.create_linear_map, F.create_normal_map, F.create_fp8_map])
def test_maps_are_sorted_bytes(make) -> None:
    code = make()
    assert code.shape == (256,) and code.dtype == torch.float32 and (code.diff() >= 0).all() and code.abs().max() == 1


# ---- products


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_gemv_4bit(dtype: torch.dtype, nested: bool) -> None:
    w = torch.randn(48, 96).to(dtype)
    packed, state = F.quantize_4bit(w, quant_type="nf4", compress_statistics=nested)
    exact = F.dequantize_4bit(packed, state).double()
    x = torch.randn(1, 96).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype]
    for weight in (packed, packed.t()):
        y = F.gemv_4bit(x, weight, state=state)
        assert y.shape == (1, 48) and y.dtype == dtype
        assert ref.relative_error(y, x.double() @ exact.t()) < tolerance
    out = torch.empty(1, 48, dtype=dtype)
    assert F.gemv_4bit(x, packed.t(), out=out, state=state) is out
    ref.assert_bits(out, y)


def test_gemv_4bit_needs_a_state() -> None:
    with pytest.raises(ValueError, match="state"):
        F.gemv_4bit(torch.randn(1, 64), torch.zeros(64, 1, dtype=torch.uint8))
