"""The bytes of quantize and dequantize, against a plain numpy reference."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st

import bitsandbytes.functional as F

ops = torch.ops.bitsandbytes

SIZES = st.integers(0, 5000) | st.sampled_from([0, 1, 2, 63, 64, 65, 96, 4097, 100003])
SEEDS = st.integers(0, 2**32 - 1)


def random(n: int, dtype: torch.dtype, exponent: int, seed: int) -> torch.Tensor:
    """Normal numbers times a power of ten that suits the type."""
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (
        exponent / (8 if dtype == torch.float16 else 1)
    )
    return x.to(dtype)


# ---- quantize and dequantize, 4 bits


def check_4bit(x: torch.Tensor, quant_type: str, blocksize: int, storage: torch.dtype = torch.uint8) -> None:
    packed, absmax = ops.quantize_4bit(x, blocksize, quant_type, storage)
    n = x.numel()
    expected, expected_absmax = ref.quantize4(ref.floats(x), quant_type, blocksize)
    size = storage.itemsize
    assert packed.dtype == storage and packed.shape == (ref.blocks_of(expected.size, size), 1)
    given_bytes = ref.raw(packed)
    np.testing.assert_array_equal(given_bytes[: expected.size], expected)
    assert not given_bytes[expected.size :].any(), "bytes behind the last code are zero"
    ref.assert_bits(absmax, torch.from_numpy(expected_absmax))
    fake_packed, fake_absmax = ops.quantize_4bit(x.to("meta"), blocksize, quant_type, storage)
    assert (fake_packed.shape, fake_packed.dtype, fake_absmax.shape) == (packed.shape, storage, absmax.shape)
    for dtype in ref.FLOATS:
        y = (
            torch.from_numpy(ref.dequantize4(expected, expected_absmax, quant_type, blocksize, n))
            .to(dtype)
            .reshape(x.shape)
        )
        ref.assert_bits(ops.dequantize_4bit(packed, absmax, blocksize, quant_type, x.shape, dtype), y)
        out = torch.full(x.shape, 7.0, dtype=dtype)
        ops.dequantize_4bit.out(packed, absmax, blocksize, quant_type, x.shape, dtype, out)
        ref.assert_bits(out, y)


@given(
    n=SIZES,
    dtype=st.sampled_from(ref.FLOATS),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from(ref.BLOCKSIZES),
    storage=st.sampled_from(ref.STORAGES),
    exponent=st.integers(-30, 30),
    seed=SEEDS,
)
def test_4bit_random(n, dtype, quant_type, blocksize, storage, exponent, seed) -> None:
    check_4bit(random(n, dtype, exponent, seed), quant_type, blocksize, storage)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_4bit_at_the_thresholds(quant_type: str, dtype: torch.dtype) -> None:
    """Every threshold, code value and midpoint and the floats next to them, in blocks whose absmax is 1 and 3."""
    values = ref.VALUES[quant_type].astype(np.float64)
    points = np.concatenate(
        [values, ref.THRESHOLDS[quant_type], (np.sort(values)[1:] + np.sort(values)[:-1]) / 2]
    ).astype(np.float32)
    points = np.concatenate(
        [points, np.nextafter(points, 2, dtype=np.float32), np.nextafter(points, -2, dtype=np.float32)]
    )
    points = points[np.abs(points) <= 1]
    padded = np.zeros((ref.blocks_of(points.size, 31), 32), np.float32)
    padded[:, 0] = 1
    rest = np.zeros(padded.shape[0] * 31, np.float32)
    rest[: points.size] = points
    padded[:, 1:] = rest.reshape(-1, 31)
    for scale in (1.0, 3.0):
        check_4bit((torch.from_numpy(padded) * scale).to(dtype), quant_type, 32)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_4bit_every_finite_pattern(quant_type: str, dtype: torch.dtype) -> None:
    """All 16-bit patterns, in their order (blocks of equal exponent) and shuffled (tiny beside huge)."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    for blocksize in (32, 64, 4096):
        check_4bit(x, quant_type, blocksize)
        check_4bit(x[torch.randperm(x.numel())], quant_type, blocksize)


SPECIAL = {
    "zeros": [0.0] * 64,
    "negative zeros": [-0.0] * 64,
    "one value": [0.0] * 63 + [-3.0],
    "smallest subnormal": [1e-45, -1e-45] * 32,
    "subnormal absmax": [1e-40, -5e-41, 0.0, 2e-39] * 16,
    "subnormal beside large": [-1e-45, 1e30, 1e-45, 0.0] * 16,
    "largest": [3.4028234663852886e38, -3.4028234663852886e38, 1.0, 0.0] * 16,
    "NaN": [1.0, float("nan"), -1.0, 0.0] * 16,
    "infinity": [1.0, float("inf"), -1.0, 0.0] * 16,
    "negative infinity": [1.0, float("-inf"), -1.0, -0.0] * 16,
    "NaN and infinity": [float("inf"), float("nan"), -1.0, 0.0] * 16,
}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("case", SPECIAL)
def test_4bit_special_blocks(case: str, quant_type: str) -> None:
    """One policy (docs/NUMERICS.md), and a neighbouring block is not touched by it."""
    plain = torch.randn(64)
    for x in (torch.tensor(SPECIAL[case]), torch.cat([plain, torch.tensor(SPECIAL[case]), plain])):
        check_4bit(x, quant_type, 64)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_zero_stays_zero(quant_type: str) -> None:
    x = torch.randn(64 * 50)
    x[::3] = 0.0
    packed, absmax = ops.quantize_4bit(x, 64, quant_type, torch.uint8)
    y = ops.dequantize_4bit(packed, absmax, 64, quant_type, x.shape, torch.float32)
    assert (y[::3] == 0).all() and not torch.signbit(y[::3]).any()


# ---- 8 bits


MAPS = {
    "dynamic": lambda: F.create_dynamic_map(),
    "dynamic unsigned": lambda: F.create_dynamic_map(signed=False),
    "linear": lambda: F.create_linear_map(),
    "linear unsigned": lambda: F.create_linear_map(signed=False),
    "normal": lambda: F.create_normal_map(),
    "fp8": lambda: F.create_fp8_map(),
    "padded": lambda: F.create_dynamic_map(total_bits=6),
    "random": lambda: torch.rand(256, generator=torch.Generator().manual_seed(5)).mul(2).sub(1).sort()[0],
    "clustered": lambda: torch.cat(
        [torch.linspace(-1, -0.999, 100), torch.linspace(1e-3, 1.001e-3, 155), torch.ones(1)]
    ),
}


def check_blockwise(x: torch.Tensor, code: torch.Tensor, blocksize: int) -> None:
    codes, absmax = ops.quantize_blockwise(x, code, blocksize)
    values = code.numpy()
    expected, expected_absmax = ref.quantize8(ref.floats(x), values, blocksize)
    assert codes.shape == x.shape and codes.dtype == torch.uint8
    # Equal values may have several codes; which of them is no matter.
    np.testing.assert_array_equal(values[codes.numpy().reshape(-1)], values[expected])
    if len(np.unique(values)) == 256:
        np.testing.assert_array_equal(codes.numpy().reshape(-1), expected)
    ref.assert_bits(absmax, torch.from_numpy(expected_absmax))
    for dtype in ref.FLOATS:
        y = (
            torch.from_numpy(ref.dequantize8(codes.numpy(), expected_absmax, values, blocksize))
            .to(dtype)
            .reshape(x.shape)
        )
        ref.assert_bits(ops.dequantize_blockwise(codes, absmax, code, blocksize, dtype), y)
        out = torch.full(x.shape, 7.0, dtype=dtype)
        ops.dequantize_blockwise.out(codes, absmax, code, blocksize, dtype, out)
        ref.assert_bits(out, y)


@given(
    n=SIZES,
    dtype=st.sampled_from(ref.FLOATS),
    name=st.sampled_from(list(MAPS)),
    blocksize=st.sampled_from(ref.BLOCKSIZES),
    exponent=st.integers(-30, 30),
    seed=SEEDS,
)
def test_blockwise_random(n, dtype, name, blocksize, exponent, seed) -> None:
    check_blockwise(random(n, dtype, exponent, seed), MAPS[name](), blocksize)


@pytest.mark.parametrize("name", MAPS)
def test_blockwise_is_the_nearest_code(name: str) -> None:
    """Judged by distance: no other code is nearer by more than what the rounding of t and of a midpoint can do."""
    code = MAPS[name]()
    x = torch.cat([torch.linspace(-1, 1, 20001), torch.randn(10000) * 1e-3, torch.randn(10000) * 1e-6]).clamp(-1, 1)
    codes, absmax = ops.quantize_blockwise(torch.cat([torch.ones(1), x]), code, 4096)
    scale = absmax.repeat_interleave(4096)[: len(x) + 1].double()
    t = torch.cat([torch.ones(1), x]).double() / scale
    distance = (code.double()[codes.int()] - t).abs()
    nearest = (code.double().sort()[0][None] - t[:, None]).abs().amin(dim=1)
    assert (distance - nearest <= 2.0**-21 * t.abs()).all()


@pytest.mark.parametrize("name", MAPS)
def test_blockwise_at_the_midpoints(name: str) -> None:
    code = MAPS[name]()
    middle = ((code[1:].double() + code[:-1]) / 2).float().numpy()
    points = np.concatenate(
        [middle, np.nextafter(middle, np.float32(2)), np.nextafter(middle, np.float32(-2)), code.numpy()]
    )
    x = np.ones((ref.blocks_of(points.size, 63), 64), np.float32)
    x[:, 1:] = np.resize(points, (x.shape[0], 63))
    check_blockwise(torch.from_numpy(x), code, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_blockwise_every_finite_pattern(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()]
    for name in ("dynamic", "dynamic unsigned", "linear", "random"):
        check_blockwise(x, MAPS[name](), 256)
        check_blockwise(x[torch.randperm(x.numel())], MAPS[name](), 64)


@pytest.mark.parametrize("name", ["dynamic", "dynamic unsigned"])
@pytest.mark.parametrize("case", SPECIAL)
def test_blockwise_special_blocks(case: str, name: str) -> None:
    plain = torch.randn(64)
    for x in (torch.tensor(SPECIAL[case]), torch.cat([plain, torch.tensor(SPECIAL[case]), plain])):
        check_blockwise(x, MAPS[name](), 64)


def test_blockwise_zero_stays_zero() -> None:
    """The released CPU kernel makes code 131 of it."""
    x = torch.randn(4096)
    x[::2] = 0.0
    code = F.create_dynamic_map()
    codes, absmax = ops.quantize_blockwise(x, code, 256)
    assert (ops.dequantize_blockwise(codes, absmax, code, 256, torch.float32)[::2] == 0).all()


# ---- memory layouts


LAYOUTS = {
    "transposed": lambda d: torch.randn(48, 65, dtype=d).t(),
    "every second": lambda d: torch.randn(2 * 65 * 48, dtype=d)[::2],
    "inner slice": lambda d: torch.randn(48, 100, dtype=d)[:, 7:72],
    "channels last": lambda d: torch.randn(2, 3, 16, 33, dtype=d).to(memory_format=torch.channels_last),
    "expanded": lambda d: torch.randn(65, 1, dtype=d).expand(65, 48),
    "expanded scalar": lambda d: torch.tensor(2.5, dtype=d).expand(3, 77),
    "offset of one": lambda d: torch.randn(3121, dtype=d)[1:],
    "0-d": lambda d: torch.tensor(-1.25, dtype=d),
    "empty": lambda d: torch.empty(0, dtype=d),
    "empty rows": lambda d: torch.empty(5, 0, 7, dtype=d),
    "one element": lambda d: torch.tensor([[[3.0]]], dtype=d),
    "requires grad": lambda d: torch.randn(100, dtype=d, requires_grad=True),
    "negative view": lambda d: torch._neg_view(torch.randn(77, dtype=d)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](dtype)
    before = x.detach().clone()
    check_4bit(x, "nf4", 64)
    check_4bit(x, "fp4", 64, torch.bfloat16)
    check_blockwise(x, MAPS["dynamic"](), 64)
    ref.assert_bits(x.detach(), before)


def test_strided_codes_and_absmax() -> None:
    x = torch.randn(64, 64)
    packed, absmax = ops.quantize_4bit(x, 64, "nf4", torch.uint8)
    y = ops.dequantize_4bit(packed, absmax, 64, "nf4", [64, 64], torch.float32)
    spread = torch.zeros(2048, 3, dtype=torch.uint8)
    spread[:, 1] = packed[:, 0]
    scales = torch.zeros(64, 2)
    scales[:, 0] = absmax
    ref.assert_bits(ops.dequantize_4bit(spread[:, 1:2], scales[:, 0], 64, "nf4", [64, 64], torch.float32), y)
    code = F.create_dynamic_map()
    codes, absmax = ops.quantize_blockwise(x, code, 64)
    y = ops.dequantize_blockwise(codes, absmax, code, 64, torch.float32)
    ref.assert_bits(
        ops.dequantize_blockwise(codes.t(), absmax, code, 64, torch.float32),
        ops.dequantize_blockwise(codes.t().clone(), absmax, code, 64, torch.float32),
    )
    doubled = torch.stack([code, code], dim=1)[:, 0]
    ref.assert_bits(ops.dequantize_blockwise(codes, absmax, doubled, 64, torch.float32), y)
    again, _ = ops.quantize_blockwise(x, doubled, 64)
    assert torch.equal(again, codes)


@pytest.mark.slow
def test_more_elements_than_31_bits_count() -> None:
    """2^31 + 64: 4 GiB of bf16, 1 GiB of 4-bit and 2 GiB of 8-bit codes. The end is compared with the reference."""
    n, tail = 2**31 + 64, 4096 + 64
    x = torch.randn(2**20, dtype=torch.bfloat16).repeat(2**11 + 1)[:n]
    x[-tail:] = torch.randn(tail, dtype=torch.bfloat16)
    for quant_type in ("nf4", "fp4"):
        packed, absmax = ops.quantize_4bit(x, 64, quant_type, torch.uint8)
        expected, expected_absmax = ref.quantize4(ref.floats(x[-tail:]), quant_type, 64)
        np.testing.assert_array_equal(packed[-tail // 2 :, 0].numpy(), expected)
        np.testing.assert_array_equal(absmax[-tail // 64 :].numpy(), expected_absmax)
        assert torch.equal(packed[: 2**19], packed[2**19 : 2**20]), "equal input, equal bytes"
        y = ops.dequantize_4bit(packed, absmax, 64, quant_type, [n], torch.bfloat16)
        values = torch.from_numpy(ref.dequantize4(expected, expected_absmax, quant_type, 64, tail)).bfloat16()
        ref.assert_bits(y[-tail:], values)
        del packed, y
    code = F.create_dynamic_map()
    codes, absmax = ops.quantize_blockwise(x, code, 64)
    expected, expected_absmax = ref.quantize8(ref.floats(x[-tail:]), code.numpy(), 64)
    np.testing.assert_array_equal(codes[-tail:].numpy(), expected)
    y = ops.dequantize_blockwise(codes, absmax, code, 64, torch.bfloat16)
    ref.assert_bits(
        y[-tail:], torch.from_numpy(ref.dequantize8(expected, expected_absmax, code.numpy(), 64)).bfloat16()
    )


@pytest.mark.slow
def test_hundred_million_random_floats() -> None:
    """Random bit patterns, so that a block spans all exponents, and by turns such that span a dozen octaves."""
    generator = torch.Generator().manual_seed(1)
    code, chunk = F.create_dynamic_map(), 1 << 22
    for i in range(24):
        bits = torch.randint(-(2**31), 2**31, (chunk,), dtype=torch.int32, generator=generator)
        if i % 2:
            bits = bits & 0x007FFFFF | (bits & -(2**31)) | (100 + i) << 23
            bits = bits - (torch.randint(0, 12, (chunk,), dtype=torch.int32, generator=generator) << 23)
        x = bits.view(torch.float32)
        x = torch.where(x.isfinite(), x, 0.0)
        blocksize = ref.BLOCKSIZES[i % len(ref.BLOCKSIZES)]
        for quant_type in ("nf4", "fp4"):
            packed, absmax = ops.quantize_4bit(x, blocksize, quant_type, torch.uint8)
            expected, expected_absmax = ref.quantize4(ref.floats(x), quant_type, blocksize)
            np.testing.assert_array_equal(packed[:, 0].numpy(), expected)
            np.testing.assert_array_equal(absmax.numpy(), expected_absmax)
        codes, _ = ops.quantize_blockwise(x, code, blocksize)
        np.testing.assert_array_equal(codes.numpy(), ref.quantize8(ref.floats(x), code.numpy(), blocksize)[0])


@pytest.mark.parametrize("kind", ["fp4", "nf4"])
def test_functions_of_one_format_are_the_general_ones_with_it_fixed(kind: str) -> None:
    """By position and by name; what is fixed, too many or unknown is refused."""
    x = torch.randn(64, 8)
    quantize, dequantize = (getattr(F, f"{what}_{kind}") for what in ("quantize", "dequantize"))
    assert pickle.loads(pickle.dumps(quantize)) is quantize
    wanted, state = F.quantize_4bit(x, None, None, 128, True, kind, torch.bfloat16)
    for packed, found in (
        quantize(x, None, None, 128, True, torch.bfloat16),
        quantize(A=x, blocksize=128, compress_statistics=True, quant_storage=torch.bfloat16),
    ):
        assert torch.equal(packed.view(torch.uint8), wanted.view(torch.uint8)) and packed.dtype == torch.bfloat16
        assert found.quant_type == kind and found.blocksize == 128 and found.nested
    assert torch.equal(dequantize(wanted, state), F.dequantize_4bit(wanted, state))
    out = torch.empty(64, 8)
    packed, state = quantize(x)
    assert torch.equal(dequantize(packed, None, state.absmax, out), F.dequantize_4bit(packed, state)) and out.any()
    for args, options in (((x, None, None, 64, True, torch.uint8, 1), {}), ((x,), {"quant_type": kind}), ((), {})):
        with pytest.raises(TypeError):
            quantize(*args, **options)
