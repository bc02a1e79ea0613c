"""The pure-torch kernels that any other device gets, called here on CPU tensors: the bytes of the native library."""

from __future__ import annotations

from typing import Any

import pytest
import reference as ref
import torch
from test_ops import is_product, nested, opcheck_cases, overload, registered, weight
from test_quantize import LAYOUTS, MAPS, SPECIAL

from bitsandbytes._ops_fourbit import linear_4bit_layout

ops = torch.ops.bitsandbytes
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
OTHER_DEVICES = ("CUDA", "XPU", "MPS", "HPU", "PrivateUse1")


def on_other_device(name: str, *args: Any, device: str = "PrivateUse1") -> Any:
    """Calls what the dispatcher would call for a tensor of that device."""
    return torch.library.get_kernel(f"bitsandbytes::{name}", device).call_boxed(CPU, *args)


@pytest.mark.parametrize("device", OTHER_DEVICES)
@pytest.mark.parametrize("name", [n.removeprefix("bitsandbytes::") for n in registered()])
def test_other_devices_have_every_op(name: str, device: str) -> None:
    assert torch.library.get_kernel(f"bitsandbytes::{name}", device) is not None


def test_every_op_equals_the_native_kernel() -> None:
    """Bit for bit, but for the order of sums in products."""
    for name, args in opcheck_cases():
        if name.endswith(".out"):
            outs = args[-1].clone(), args[-1].clone()
            overload(name)(*args[:-1], outs[0])
            assert on_other_device(name, *args[:-1], outs[1]) is None
            expected, found = (outs[0],), (outs[1],)
        else:
            expected, found = overload(name)(*args), on_other_device(name, *args)
            if isinstance(expected, torch.Tensor):
                expected, found = (expected,), (found,)
        for e, f in zip(expected, found, strict=True):
            if is_product(name):
                assert (e.shape, e.dtype) == (f.shape, f.dtype)
                tolerance = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[e.dtype]
                torch.testing.assert_close(f, e, rtol=tolerance, atol=tolerance)
            else:
                ref.assert_bits(f, e)


@pytest.mark.parametrize("storage", ref.STORAGES, ids=str)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_bytes(quant_type: str, dtype: torch.dtype, storage: torch.dtype) -> None:
    for n in (0, 1, 2, 5, 63, 65, 4097):
        for blocksize in (32, 64, 4096):
            x = torch.randn(n).to(dtype)
            expected = ops.quantize_4bit(x, blocksize, quant_type, storage)
            found = on_other_device("quantize_4bit", x, blocksize, quant_type, storage)
            for e, f in zip(expected, found, strict=True):
                assert (e.shape, e.dtype) == (f.shape, f.dtype) and (ref.raw(e) == ref.raw(f)).all()
            args = (*expected, blocksize, quant_type, [n], dtype)
            ref.assert_bits(on_other_device("dequantize_4bit", *args), ops.dequantize_4bit(*args))


@pytest.mark.parametrize("case", [*SPECIAL, *LAYOUTS, "thresholds"])
def test_special_bytes(case: str) -> None:
    if case in SPECIAL:
        x = torch.tensor(SPECIAL[case])
    elif case in LAYOUTS:
        x = LAYOUTS[case](torch.float32).detach()
    else:
        points = torch.cat([torch.from_numpy(t) for t in ref.THRESHOLDS.values()])
        x = torch.stack([points, points.nextafter(points + 1), points.nextafter(points - 1)])
        x = torch.cat([torch.ones(3, 1), torch.nn.functional.pad(x, (0, 33))], dim=1)
    for quant_type in ("nf4", "fp4"):
        expected = ops.quantize_4bit(x, 64, quant_type, torch.uint8)
        for e, f in zip(expected, on_other_device("quantize_4bit", x, 64, quant_type, torch.uint8), strict=True):
            ref.assert_bits(f, e)
        args = (*expected, 64, quant_type, list(x.shape), torch.float32)
        ref.assert_bits(on_other_device("dequantize_4bit", *args), ops.dequantize_4bit(*args))
    for name in ("dynamic", "linear unsigned"):
        code = MAPS[name]()
        expected = ops.quantize_blockwise(x, code, 64)
        for e, f in zip(expected, on_other_device("quantize_blockwise", x, code, 64), strict=True):
            ref.assert_bits(f, e)
        args = (*expected, code, 64, torch.bfloat16)
        ref.assert_bits(on_other_device("dequantize_blockwise", *args), ops.dequantize_blockwise(*args))


@pytest.mark.parametrize("name", MAPS)
def test_blockwise_bytes(name: str) -> None:
    code = MAPS[name]()
    middle = ((code[1:].double() + code[:-1]) / 2).float()
    x = torch.cat(
        [
            torch.ones(1),
            middle,
            middle.nextafter(middle + 1),
            middle.nextafter(middle - 1),
            torch.randn(1000).clamp(-1, 1),
        ]
    )
    for blocksize in (4096, 64, 1, 7, 100, 16384, 2**63 - 1):
        for e, f in zip(
            ops.quantize_blockwise(x, code, blocksize),
            on_other_device("quantize_blockwise", x, code, blocksize),
            strict=True,
        ):
            ref.assert_bits(
                code[f.int()] if f.dtype == torch.uint8 else f, code[e.int()] if e.dtype == torch.uint8 else e
            )
        args = (*ops.quantize_blockwise(x, code, blocksize), code, blocksize, torch.bfloat16)
        ref.assert_bits(on_other_device("dequantize_blockwise", *args), ops.dequantize_blockwise(*args))


def test_products_are_those_of_the_dequantized_weight() -> None:
    packed, absmax, w = weight(24, 96)
    x = torch.randn(5, 96)
    y = on_other_device("gemm_4bit", x, packed, [24, 96], absmax, 64, "nf4", None, None, None, None)
    torch.testing.assert_close(y, x @ w.t())
    packed, scales, codes, code, offset, w = nested(300, 96)
    y = on_other_device("gemm_4bit", x, packed, [300, 96], scales, 64, "nf4", torch.ones(300), codes, code, offset)
    restored = ops.dequantize_blockwise(codes, scales, code, 256, torch.float32) + offset
    w = ops.dequantize_4bit(packed, restored, 64, "nf4", [300, 96], torch.float32)
    torch.testing.assert_close(y, x @ w.t() + 1)
    layout = linear_4bit_layout((300, 96), 64, "nf4")
    same = on_other_device("linear_4bit.nested", x, packed, scales, layout, torch.ones(300), codes, code, offset)
    torch.testing.assert_close(same, y)  # of the kernel that the device has for gemm_4bit
