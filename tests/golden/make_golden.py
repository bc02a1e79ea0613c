"""Writes the .txt files of this folder from the released package (bitsandbytes 0.50.2, and scipy).

    python tests/golden/make_golden.py

Inputs come from a counter-based generator of integer operations alone, so that tests/cases/cases.h makes the same bits.
Outputs are kept as one 64-bit hash. One case a line; what each column means stands on a file's first line.

The 4-bit outputs are the released package's, to the byte. Where it does not follow the rules of docs/NUMERICS.md:
- It divides by absmax in a short last block, and raises that block's absmax to 1e-38. So the input of quantize_4bit is
  padded with zeros to full blocks here, and the output cut.
- It decodes code 8 of fp4 to -0.0 where a tensor has one or two elements. dequantize_4bit is asked for full blocks.
- Its 8-bit codes go through a table of 65,536 bins and are not the nearest. The hash of quantize_blockwise is that of
  the exact rule, evaluated in numpy; the last column counts the elements for which the released package says otherwise.
"""

from pathlib import Path

import numpy as np
import torch

import bitsandbytes.functional as F

HERE = Path(__file__).parent
GOLDEN = 0x9E3779B97F4A7C15
SIZES = (1, 2, 63, 64, 65, 96, 4097, 100003)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# mantissa bits, exponent bits, lowest and number of (biased) group exponents
LAYOUT = {"f32": (23, 8, 24, 200), "f16": (10, 5, 1, 30), "bf16": (7, 8, 24, 200)}


def mix(z):
    """The output function of splitmix64."""
    z = np.asarray(z, np.uint64)
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random(seed, i):
    with np.errstate(over="ignore"):
        return mix(mix(np.uint64(seed)) + np.asarray(i, np.uint64) * np.uint64(GOLDEN))


def digest(raw):
    """Sum over i of mix(golden + (i << 8 | byte i)), modulo 2^64."""
    raw = np.frombuffer(np.ascontiguousarray(raw).tobytes(), np.uint8).astype(np.uint64)
    i = np.arange(raw.size, dtype=np.uint64)
    return f"{int(mix(((i << np.uint64(8)) | raw) + np.uint64(GOLDEN)).sum(dtype=np.uint64)):016x}"


def waves(dtype, seed, n):
    """Floats of both signs, 0, 1, 2, ... octaves (each half as often) below one that changes every 4096 elements."""
    mantissa, exponent, low, count = LAYOUT[dtype]
    i = np.arange(n, dtype=np.uint64)
    r = random(seed, i)
    top = np.uint64(low) + random(seed + 1, i >> np.uint64(12)) % np.uint64(count)
    field = (r >> np.uint64(1)) & np.uint64(0x7FFF) | np.uint64(0x8000)
    drop = np.log2((field & (~field + np.uint64(1))).astype(np.float64)).astype(np.uint64)
    e = np.where(top > drop, top - drop, np.uint64(0))
    m = (r >> np.uint64(40)) & np.uint64((1 << mantissa) - 1)
    bits = ((r & np.uint64(1)) << np.uint64(mantissa + exponent)) | (e << np.uint64(mantissa)) | m
    return bits.astype(np.uint32 if dtype == "f32" else np.uint16)


def patterns(dtype, seed):
    """Every finite 16-bit pattern once: ascending for seed 0, else in the order (i * 40503 + seed) mod 65536."""
    mantissa, exponent, _, _ = LAYOUT[dtype]
    i = np.arange(1 << 16, dtype=np.int64)
    bits = i if seed == 0 else (i * 40503 + seed) & 0xFFFF
    full = (1 << exponent) - 1
    return bits[(bits >> mantissa) & full != full].astype(np.uint16)


def tensor(bits, dtype):
    return torch.from_numpy(bits.view(np.int32 if dtype == "f32" else np.int16).copy()).view(TORCH[dtype])


def raw(t):
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16).numpy()


def largest(x, blocksize):
    padded = np.zeros(-(-x.size // blocksize) * blocksize, np.float32)
    padded[: x.size] = np.abs(x)
    return padded.reshape(-1, blocksize).max(1)


def quantize_4bit_case(kind, dtype, source, seed, bits, blocksize):
    blocks = -(-bits.size // blocksize)
    padded = np.zeros(blocks * blocksize, bits.dtype)
    padded[: bits.size] = bits
    codes, state = F.quantize_4bit(tensor(padded, dtype), blocksize=blocksize, quant_type=kind)
    codes = codes.flatten().numpy()[: (bits.size + 1) // 2]
    return f"{kind} {dtype} {source} {seed} {bits.size} {blocksize} {digest(codes)} {digest(state.absmax.numpy())}"


def quantize_4bit():
    yield "# format dtype input seed n blocksize hash(codes) hash(absmax)"
    for kind in ("nf4", "fp4"):
        for dtype in ("f16", "bf16"):
            for seed in (0, 12345):
                for blocksize in BLOCKSIZES:
                    yield quantize_4bit_case(kind, dtype, "patterns", seed, patterns(dtype, seed), blocksize)
        for dtype in TORCH:
            for n in SIZES:
                for blocksize in BLOCKSIZES:
                    yield quantize_4bit_case(kind, dtype, "waves", n, waves(dtype, n, n), blocksize)
            yield quantize_4bit_case(kind, dtype, "waves", 4, waves(dtype, 4, 1 << 22), 64)


def absmax_of(seed, count):
    """Magnitudes of a wave; every 7th is 0."""
    a = waves("f32", seed, count).view(np.float32)
    return np.where(np.arange(count) % 7 == 6, np.float32(0), np.abs(a))


def dequantize_4bit():
    yield "# format dtype seed n blocksize hash(output)"
    for kind in ("nf4", "fp4"):
        for dtype in TORCH:
            for n in (*SIZES, 1 << 20):
                for blocksize in BLOCKSIZES:
                    blocks = -(-n // blocksize)
                    codes = np.zeros(blocks * blocksize // 2, np.uint8)
                    codes[: (n + 1) // 2] = random(n, np.arange((n + 1) // 2)).astype(np.uint8)
                    absmax = torch.from_numpy(absmax_of(n + 1, blocks))
                    shape = (blocks * blocksize,)
                    state = F.QuantState(absmax, shape=shape, dtype=TORCH[dtype], blocksize=blocksize, quant_type=kind)
                    out = raw(F.dequantize_4bit(torch.from_numpy(codes).reshape(-1, 1), state)).reshape(-1)[:n]
                    yield f"{kind} {dtype} {n} {n} {blocksize} {digest(out)}"


MAPS = {
    "dynamic": F.create_dynamic_map(),
    "dynamic_unsigned": F.create_dynamic_map(signed=False),
    "linear": F.create_linear_map(),
    "fp8": F.create_fp8_map(),
}


def exact_codes(x, code, blocksize):
    """Boundary i lies at fp32((code[i] + code[i+1]) * 0.5); a t on it takes the even one of the two codes."""
    absmax = largest(x, blocksize)
    t = x * np.repeat(np.float32(1) / np.maximum(absmax, np.float32(1e-38)), blocksize)[: x.size]
    mid = (code[:-1] + code[1:]) * np.float32(0.5)
    even, odd = mid[0::2], mid[1::2]
    codes = np.searchsorted(even, t, side="left") + np.searchsorted(odd, t, side="right")
    return codes.astype(np.uint8), absmax


def quantize_blockwise():
    yield "# map dtype seed n blocksize hash(exact codes) hash(absmax) elements_where_the_released_package_differs"
    for name, code in MAPS.items():
        for dtype in TORCH:
            for n in SIZES:
                for blocksize in BLOCKSIZES if n > 64 else (64, 256):
                    x = tensor(waves(dtype, n, n), dtype)
                    codes, absmax = exact_codes(x.float().numpy(), code.numpy(), blocksize)
                    theirs, state = F.quantize_blockwise(x, code=code, blocksize=blocksize)
                    if not np.array_equal(absmax, state.absmax.numpy()):
                        raise SystemExit(f"absmax differs: {name} {dtype} {n} {blocksize}")
                    differs = int((theirs.numpy() != codes).sum())
                    yield f"{name} {dtype} {n} {n} {blocksize} {digest(codes)} {digest(absmax)} {differs}"


def dequantize_blockwise():
    yield "# map dtype seed n blocksize hash(output)"
    for name, code in MAPS.items():
        for dtype in TORCH:
            for n in SIZES:
                for blocksize in BLOCKSIZES if n > 64 else (64, 256):
                    codes = random(n, np.arange(n)).astype(np.uint8)
                    absmax = absmax_of(n + 1, -(-n // blocksize))
                    state = F.QuantState(torch.from_numpy(absmax), code=code, blocksize=blocksize, dtype=TORCH[dtype])
                    out = F.dequantize_blockwise(torch.from_numpy(codes), state)
                    yield f"{name} {dtype} {n} {n} {blocksize} {digest(raw(out))}"


INT8_SHAPES = ((1, 64), (5, 63), (33, 1027), (300, 512), (7, 4096))


def int8_rows():
    yield "# dtype seed rows columns threshold hash(codes) hash(scale) hash(outlier columns, int64)"
    for dtype in TORCH:
        for rows, columns in INT8_SHAPES:
            for threshold in (0.0, 6.0, 2.0**-20):
                seed = rows + columns
                x = tensor(waves(dtype, seed, rows * columns), dtype).view(rows, columns)
                codes, scale, outliers = torch.ops.bitsandbytes.int8_vectorwise_quant(x.clone(), threshold)
                if not (scale == 0).logical_or(scale >= 2.0**-100).all():
                    raise SystemExit(f"1 / scale overflows in the released package: {dtype} {rows} {columns}")
                columns_out = torch.zeros(0, dtype=torch.int64) if outliers is None else outliers
                yield (
                    f"{dtype} {seed} {rows} {columns} {threshold} {digest(codes.numpy())} {digest(scale.numpy())} "
                    f"{digest(columns_out.numpy())}"
                )


def int8_dequantize():
    yield "# seed rows columns hash(output)"
    for rows, columns in INT8_SHAPES:
        seed = rows + columns
        codes = torch.from_numpy(random(seed, np.arange(rows * columns)).astype(np.uint8).view(np.int8))
        scale = torch.from_numpy(absmax_of(seed + 1, rows))
        out = torch.ops.bitsandbytes.int8_vectorwise_dequant(codes.view(rows, columns), scale)
        yield f"{seed} {rows} {columns} {digest(out.numpy())}"


def hexadecimal(values):
    return " ".join(f"{v:08x}" for v in np.asarray(values, np.float32).view(np.uint32))


def spaced(values):
    return " ".join(map(str, values))


DYNAMIC = ((1, 7, 8), (0, 7, 8), (1, 6, 8), (1, 3, 8), (1, 1, 8), (1, 8, 8), (1, 4, 6), (0, 4, 5), (1, 3, 4))
DYNAMIC += ((1, 1, 1), (1, 0, 1), (0, 0, 1))  # the smallest
FP8 = ((1, 5, 2, 8), (1, 4, 3, 8), (0, 5, 3, 8), (1, 2, 1, 4), (1, 3, 2, 6), (0, 4, 4, 8), (0, 0, 8, 8))


def codebooks():
    yield "# maker arguments... : values as fp32 bits"
    plain = torch.tensor
    torch.tensor = lambda *a, **k: plain(*a, **k).float()  # of int4 it divides integers in place, which torch refuses
    for kind in ("nf4", "fp4", "int4", "af4"):
        yield f"4bit {kind} : {hexadecimal(F.get_4bit_type(kind, device='cpu'))}"
    torch.tensor = plain
    for signed, *rest in DYNAMIC:
        yield f"dynamic {signed} {spaced(rest)} : {hexadecimal(F.create_dynamic_map(bool(signed), *rest))}"
    for signed, total, zero in ((1, 8, 1), (0, 8, 1), (1, 8, 0), (0, 8, 0), (1, 4, 1), (1, 5, 0), (0, 6, 1)):
        yield f"linear {signed} {total} {zero} : {hexadecimal(F.create_linear_map(bool(signed), total, bool(zero)))}"
    for offset, extra in ((0.9677083, 1), (0.9677083, 0), (0.99, 1), (0.95, 0)):
        yield f"normal {offset} {extra} : {hexadecimal(F.create_normal_map(offset, bool(extra)))}"
    for signed, *rest in FP8:
        yield f"fp8 {signed} {spaced(rest)} : {hexadecimal(F.create_fp8_map(bool(signed), *rest))}"


if __name__ == "__main__":
    torch.set_num_threads(2)
    for make in (
        quantize_4bit,
        dequantize_4bit,
        quantize_blockwise,
        dequantize_blockwise,
        int8_rows,
        int8_dequantize,
        codebooks,
    ):
        (HERE / f"{make.__name__}.txt").write_text("\n".join(make()) + "\n")
        print(make.__name__, flush=True)
