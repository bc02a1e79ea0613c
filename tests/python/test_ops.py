"""torch.ops.bitsandbytes as a contract: schemas, kernels, fakes, and the pure-torch kernels of any other device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import reference as ref
import torch

import bitsandbytes.functional as F
from bitsandbytes._ops_fourbit import linear_4bit_layout

ops = torch.ops.bitsandbytes

# As printed by the released package 0.50.2.
SCHEMAS = [
    f"bitsandbytes::{schema}"
    for schema in (
        "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
        "dequantize_4bit(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) "
        "-> Tensor",
        "dequantize_4bit.out(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype, "
        "Tensor($0! -> ) out) -> ()",
        "quantize_blockwise(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
        "dequantize_blockwise(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
        "dequantize_blockwise.out(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype, "
        "Tensor($0! -> ) out) -> ()",
        "gemv_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize) -> Tensor",
        "gemv_4bit.out(Tensor A, Tensor B, int[] shapeB, Tensor absmax, Tensor code, int blocksize, "
        "Tensor($0! -> ) out) -> ()",
        "gemm_4bit(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
        "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor",
    )
]
OWN = {"bitsandbytes::linear_4bit", "bitsandbytes::linear_4bit.nested"}
ON_THE_CPU = {"bitsandbytes::create_map"}  # whatever device its result is for


def overload(qualified: str) -> torch._ops.OpOverload:
    name, _, variant = qualified.removeprefix("bitsandbytes::").partition(".")
    return getattr(getattr(ops, name), variant or "default")


def registered() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return sorted(n for n in names if n.startswith("bitsandbytes::") and n not in ON_THE_CPU)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: s.partition("(")[0].removeprefix("bitsandbytes::"))
def test_schema_equals_the_released_one(schema: str) -> None:
    assert str(overload(schema.partition("(")[0])._schema) == schema


@pytest.mark.parametrize("name", registered())
def test_every_op_has_a_cpu_kernel_a_fake_and_a_default(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta") or overload(name)._defined_in_python is not None
    entry = torch._library.simple_registry.singleton.find(name)
    assert entry.fake_impl.kernel is not None, "no fake"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeExplicitAutograd"), (
        "no kernel for other devices"
    )


# ---- opcheck


def weight(
    n: int, k: int, quant_type: str = "nf4", blocksize: int = 64, storage: torch.dtype = torch.uint8
) -> tuple[torch.Tensor, ...]:
    w = torch.randn(n, k)
    packed, absmax = ops.quantize_4bit(w, blocksize, quant_type, storage)
    return packed, absmax, ops.dequantize_4bit(packed, absmax, blocksize, quant_type, [n, k], torch.float32)


def nested(n: int, k: int) -> tuple[torch.Tensor, ...]:
    packed, absmax, w = weight(n, k)
    offset = absmax.mean()
    code = F.create_dynamic_map()
    codes, scales = ops.quantize_blockwise(absmax - offset, code, 256)
    return packed, scales, codes, code, offset, w


def opcheck_cases() -> Iterator[tuple[str, tuple[Any, ...]]]:
    code8, code4 = F.create_dynamic_map(), F.get_4bit_type("nf4", device="cpu")
    for dtype, shape in itertools.product(ref.FLOATS, [(64,), (3, 7), (), (0,), (2, 0, 5)]):
        x = torch.randn(shape).to(dtype)
        for quant_type, storage in (("nf4", torch.uint8), ("fp4", torch.bfloat16)):
            yield "quantize_4bit", (x, 64, quant_type, storage)
            packed, absmax = ops.quantize_4bit(x, 64, quant_type, storage)
            args = (packed, absmax, 64, quant_type, list(shape), dtype)
            yield "dequantize_4bit", args
            yield "dequantize_4bit.out", (*args, torch.empty(shape, dtype=dtype))
        yield "quantize_blockwise", (x, code8, 256)
        codes, absmax = ops.quantize_blockwise(x, code8, 256)
        yield "dequantize_blockwise", (codes, absmax, code8, 256, dtype)
        yield "dequantize_blockwise.out", (codes, absmax, code8, 256, dtype, torch.empty(shape, dtype=dtype))
    for dtype, (n, k), batch in itertools.product(ref.FLOATS, [(16, 64), (5, 33)], [(), (1,), (2, 3), (0,)]):
        packed, absmax, _ = weight(n, k)
        a = torch.randn(*batch, k).to(dtype)
        args = (a, packed, [n, k], absmax, code4, 64)
        yield "gemv_4bit", args
        yield "gemv_4bit.out", (*args, torch.empty(*batch, n, dtype=dtype))
        bias, layout = torch.randn(n).to(dtype), linear_4bit_layout((n, k), 64, "nf4")
        yield "gemm_4bit", (a, packed, [n, k], absmax, 64, "nf4", bias)
        yield "linear_4bit", (a, packed, absmax, layout, bias)
        packed, scales, codes, code, offset, _ = nested(n, k)
        yield "gemm_4bit", (a, packed, [n, k], scales, 64, "nf4", None, codes, code, offset)
        yield "linear_4bit.nested", (a, packed, scales, layout, bias, codes, code, offset)


OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_create_map_is_one_for_all_devices() -> None:
    for name, numbers in (("dynamic", [1, 7, 8]), ("linear", [0, 5, 1]), ("normal", [0.95, 1]), ("fp8", [1, 4, 3, 8])):
        args = (torch.empty(256), name, [float(n) for n in numbers])
        torch.library.opcheck(ops.create_map.default, args, test_utils=OPCHECKS)
    for wrong in (torch.empty(255), torch.empty(256).double(), torch.empty(16, 16), torch.empty(512)[::2]):
        with pytest.raises(ValueError, match="create_map: out is"):
            ops.create_map(wrong, "dynamic", [1.0, 7.0, 8.0])
    with pytest.raises(ValueError, match="create_4bit_map: name is"):
        ops.create_map(torch.empty(16), "int5", [])
    with pytest.raises(ValueError, match="create_map: numbers"):
        ops.create_map(torch.empty(256), "fp8", [1.0])


def is_product(name: str) -> bool:
    """Whether an operator of opcheck_cases sums, in an order of the device. The others are held bit for bit."""
    return "quantize" not in name


def test_opcheck() -> None:
    checked = set()
    for name, args in opcheck_cases():
        torch.library.opcheck(overload(name), args, test_utils=OPCHECKS)
        checked.add("bitsandbytes::" + name)
    assert checked == {s.partition("(")[0] for s in SCHEMAS} | OWN


def test_opcheck_with_dynamic_shapes() -> None:
    """make_fx traces with symbolic sizes and runs the graph again: slow, so one case of each op."""
    seen = set()
    for name, args in opcheck_cases():
        if name not in seen and args[0].numel() > 1:
            seen.add(name)
            torch.library.opcheck(overload(name), args)
    assert len(seen) == len(SCHEMAS) + len(OWN)


@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_linear_4bit_is_gemm_4bit(quant_type: str, blocksize: int) -> None:
    packed, absmax, _ = weight(24, 96, quant_type, blocksize)
    layout = linear_4bit_layout((24, 96), blocksize, quant_type)
    x, bias = torch.randn(3, 96, dtype=torch.bfloat16), torch.randn(24)
    expected = ops.gemm_4bit(x, packed, [24, 96], absmax, blocksize, quant_type, bias)
    assert torch.equal(ops.linear_4bit(x, packed, absmax, layout, bias), expected)


def test_linear_4bit_takes_no_other_layout() -> None:
    assert linear_4bit_layout((24, 96), 100, "nf4") is None
    assert linear_4bit_layout((24, 96), 64, "int4") is None
    assert linear_4bit_layout((24,), 64, "nf4") is None
    assert linear_4bit_layout(None, 64, "nf4") is None
    assert linear_4bit_layout((24, 96), [64], "nf4") is None
    assert linear_4bit_layout((2**29, 96), 64, "nf4") is None
    packed, absmax, _ = weight(24, 96)
    layout = linear_4bit_layout((24, 96), 64, "nf4")
    for wrong, message in ((-1, "layout is -1"), (layout + (1 << 4), "97"), (layout + (1 << 33), "B")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.linear_4bit(torch.randn(1, 96), packed, absmax, wrong)
    with pytest.raises((ValueError, RuntimeError), match="linear_4bit: A"):
        ops.linear_4bit(torch.randn(1, 64), packed, absmax, layout)


def test_the_layout_of_a_state_follows_its_parts() -> None:
    packed, state = F.quantize_4bit(torch.randn(24, 96), quant_type="nf4")
    assert state.linear_layout == linear_4bit_layout((24, 96), 64, "nf4")
    state.shape = torch.Size([12, 192])
    assert state.linear_layout == linear_4bit_layout((12, 192), 64, "nf4")
    assert F.gemv_4bit(torch.randn(1, 192), packed, state=state).shape == (1, 12)
    state.quant_type = "fp4"
    assert state.linear_layout == linear_4bit_layout((12, 192), 64, "fp4")
    state.blocksize = 100
    assert state.linear_layout is None
    with pytest.raises((ValueError, RuntimeError), match="blocksize"):
        F.gemv_4bit(torch.randn(1, 192), packed, state=state)


@pytest.mark.parametrize("shift", [0, 63])
def test_out_may_not_lie_in_an_input(shift: int) -> None:
    packed, absmax, _ = weight(64, 64)
    memory = torch.randn(64 + shift)
    a, out = memory[:64], memory[shift:]
    before = memory.clone()
    code = F.get_4bit_type("nf4", device="cpu")
    with pytest.raises(ValueError, match="gemm_4bit: out is in the memory of a"):
        ops.gemv_4bit.out(a, packed, [64, 64], absmax, code, 64, out)
    buffer = torch.zeros(256, dtype=torch.uint8)
    floats = buffer.view(torch.float32).view(8, 8)
    with pytest.raises(ValueError, match="dequantize_4bit: out is in the memory of codes"):
        ops.dequantize_4bit.out(buffer[:32], absmax[:1], 64, "nf4", [8, 8], torch.float32, floats)
    codes, memory = torch.randint(256, (64,), dtype=torch.uint8), torch.randn(256 + 64)
    with pytest.raises(ValueError, match="dequantize_blockwise: out is in the memory of code"):
        ops.dequantize_blockwise.out(codes, torch.ones(1), memory[:256], 64, torch.float32, memory[255:319])
    assert torch.equal(a, before[:64])
    # Next to each other they may lie.
    memory = torch.randn(128)
    expected = ops.gemv_4bit(memory[:64], packed, [64, 64], absmax, code, 64)
    ops.gemv_4bit.out(memory[:64], packed, [64, 64], absmax, code, 64, memory[64:])
    assert torch.equal(memory[64:], expected)
