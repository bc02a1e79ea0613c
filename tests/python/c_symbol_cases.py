"""How clients call each C function of the released package through ctypes, and what must come out: a case a function.

A case takes the library and the function's name, calls it as the released Python files and public programs do, on CPU
tensors, and compares with the operators. The CUDA library runs on the emulated GPU, whose memory is the host's."""

from __future__ import annotations

import ctypes as ct
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitsandbytes.functional as F
from bitsandbytes._codes import nearest_codes

ops: Any = torch.ops.bitsandbytes
ptr = F.get_ptr
DTYPES = {"fp32": torch.float32, "32": torch.float32, "fp16": torch.float16, "16": torch.float16}
DTYPES["bf16"] = torch.bfloat16
DYNAMIC = F.create_dynamic_map()
i32, f32 = ct.c_int32, ct.c_float
STREAM = ct.c_void_p(0)


def dtype_of(name: str) -> torch.dtype:
    found = re.findall(r"_g?(fp32|fp16|bf16|32|16)(?=_|$)", name)
    return DTYPES[found[-1]] if found else torch.float16


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.int8) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(given: Tensor, expected: Tensor) -> None:
    assert given.dtype == expected.dtype and torch.equal(given.flatten(), expected.flatten())


def near(given: Tensor, expected: Tensor, error: float) -> None:
    difference = (given.double() - expected.double()).norm() / expected.double().norm()
    assert difference < error, float(difference)


def single(x: float) -> float:
    """What a C float makes of it."""
    return float(f32(x).value)


# ---- blocks


def quantize(lib: Any, name: str) -> None:
    integer = ct.c_longlong if "_cpu_" in name else i32
    for n, blocksize in ((1000, 64), (4096, 4096), (1, 256), (0, 64)):
        x = values(n, dtype=dtype_of(name.removesuffix("_fp4").removesuffix("_nf4")))
        kind = name[-3:] if name.endswith(("_fp4", "_nf4")) else None
        absmax = torch.full((-(-n // blocksize),), torch.nan)
        out = torch.zeros(n if kind is None else (n + 1) // 2, dtype=torch.uint8)
        code = None if kind else DYNAMIC
        lib[name](ptr(code), ptr(x), ptr(absmax), ptr(out), integer(blocksize), integer(n))
        if kind is None:
            codes, scale = ops.quantize_blockwise(x, DYNAMIC, blocksize)
        else:
            codes, scale = ops.quantize_4bit(x, blocksize, kind, torch.uint8)
        same(out, codes)
        same(absmax, scale)


def dequantize(lib: Any, name: str) -> None:
    kind = (re.findall("fp4|nf4", name) or [None])[0]
    dtype = dtype_of(name.replace("_fp4", "").replace("_nf4", ""))
    rows, columns, blocksize = 6, 160, 64
    n = rows * columns
    x, out = values(n), torch.full((rows, columns), torch.nan, dtype=dtype)
    if kind is None:
        codes, absmax = ops.quantize_blockwise(x, DYNAMIC, blocksize)
        expected = ops.dequantize_blockwise(codes, absmax, DYNAMIC, blocksize, dtype)
    else:
        codes, absmax = ops.quantize_4bit(x, blocksize, kind, torch.uint8)
        expected = ops.dequantize_4bit(codes, absmax, blocksize, kind, [n], dtype)
    pointers = ptr(None if kind else DYNAMIC), ptr(codes), ptr(absmax), ptr(out)
    if "_cpu_" not in name:
        lib[name](*pointers, ct.c_int(blocksize), ct.c_int(n), STREAM)
    elif kind is None:
        lib[name](*pointers, ct.c_longlong(blocksize), ct.c_longlong(n))
    else:
        lib[name](*pointers[1:], ct.c_longlong(blocksize), ct.c_longlong(rows), ct.c_longlong(columns))
    same(out, expected)


# ---- products with 4-bit weights


def weight(n: int, k: int, kind: str, blocksize: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, absmax, and the weight in fp32."""
    codes, absmax = ops.quantize_4bit(values(n * k, seed=7), blocksize, kind, torch.uint8)
    return codes, absmax, ops.dequantize_4bit(codes, absmax, blocksize, kind, [n, k], torch.float32)


ERROR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def gemm_4bit(lib: Any, name: str) -> None:
    dtype, n, k = dtype_of(name), 48, 128
    for m, kind, nested in ((1, "nf4", False), (5, "fp4", True), (40, "nf4", True)):
        a, bias = values(m, k, dtype=dtype), values(n, seed=3, dtype=dtype)
        codes, absmax, w = weight(n, k, kind)
        scales, extra = absmax, [None] * 3
        if nested:
            offset = absmax.mean()
            absmax_8bit, scales = ops.quantize_blockwise(absmax - offset, DYNAMIC, 256)
            extra = [absmax_8bit, DYNAMIC, offset]
            again = ops.dequantize_blockwise(absmax_8bit, scales, DYNAMIC, 256, torch.float32) + offset
            w = ops.dequantize_4bit(codes, again, 64, kind, [n, k], torch.float32)
        out = torch.full((m, n), torch.nan, dtype=dtype)
        pointers = [t if t is None else t.data_ptr() for t in (a, codes, scales, *extra, out, bias)]
        lib[name](*pointers, m, n, k, 64, 1 if kind == "fp4" else 2, 0)
        near(out, a.double() @ w.double().t() + bias.double(), ERROR[dtype])


def gemv_4bit(lib: Any, name: str) -> None:
    """As the released package and unsloth call it; any 16 values."""
    dtype = dtype_of(name)
    for m, k, batch, kind in ((40, 256, 1, "nf4"), (7, 130, 1, "fp4"), (9, 51, 3, "nf4"), (5, 64, 1, "int4")):
        codes, absmax, w = weight(m, k, "nf4" if kind == "int4" else kind)
        code = F.get_4bit_type(kind, device="cpu")
        if kind == "int4":
            nibbles = torch.stack((codes.flatten() >> 4, codes.flatten() & 15), -1).flatten().long()
            w = (code[nibbles].view(-1, 64) * absmax[:, None]).view(m, k)
        a, out = values(batch, k, dtype=dtype), torch.full((batch, m), torch.nan, dtype=dtype)
        sizes = i32(m), i32(batch), i32(k)
        pointers = ptr(a), ptr(codes), ptr(absmax), ptr(code), ptr(out)
        lib[name](*sizes, *pointers, i32(m), i32((k + 1) // 2), i32(m), i32(64), STREAM)
        near(out, a.double() @ w.double().t(), ERROR[dtype])


def gemv_4bit_cpu(lib: Any, name: str) -> None:
    kind, n, k, wide = ("fp4" if "fp4" in name else "nf4"), 64, 128, 8
    codes, absmax, _ = weight(n, k, kind)
    state = F.QuantState(absmax, torch.Size([n, k]), blocksize=64, quant_type=kind, dtype=torch.float32)
    packed, packed_state = F._convert_weight_packed_for_cpu(codes, state)
    w = ops.dequantize_4bit(codes, absmax.bfloat16().float(), 64, kind, [n, k], torch.float32)
    for m, x_stride, out_stride in ((1, k, n), (5, k, n), (3, k + wide, n + wide)):
        x = values(m, x_stride, dtype=torch.bfloat16)
        out = torch.zeros(m, out_stride, dtype=torch.bfloat16)
        sizes = [ct.c_int64(s) for s in (m, n, k)]
        rest = [ct.c_int64(s) for s in (64, x_stride, out_stride)]
        lib[name](*sizes, ptr(x), ptr(packed), ptr(packed_state.absmax), ptr(out), *rest)
        near(out[:, :n], x[:, :k].double() @ w.double().t(), ERROR[torch.bfloat16])
        assert not out[:, n:].any()


# ---- optimizers: numbers are floats, as in C

NUMBERS = {"beta1": 0.9, "beta2": 0.99, "beta3": 0.999, "alpha": 2.0, "eps": 1e-6, "weight_decay": 0.01}
NUMBERS = {k: single(v) for k, v in NUMBERS.items()}
LR, SCALE = single(1e-2), single(0.5)


def rule_of(name: str) -> str:
    return re.findall("adam(?!ix|emamix)|ademamix|lion|momentum|rmsprop|adagrad", name)[0]


def step_32bit(lib: Any, name: str) -> None:
    rule, dtype, n = rule_of(name), dtype_of(name), 700
    for max_unorm in (0.0, 0.02):
        p, unorm = values(n, dtype=dtype), torch.zeros(1)
        state1, state2 = torch.zeros((2, n) if rule == "ademamix" else (n,)), torch.zeros(n)
        second = state2 if rule in ("adam", "ademamix") else None
        ours = [t if t is None else t.clone() for t in (p, state1, second, unorm)]
        for step in (1, 2):
            g = values(n, seed=step, dtype=dtype)
            g[5] = 0
            norm = torch.linalg.vector_norm(ours[0], dtype=torch.float32).item() if max_unorm else 0.0
            number = [f32(max_unorm), f32(norm), *map(f32, NUMBERS.values())]
            numbers = *number, i32(step), f32(LR), f32(SCALE), ct.c_bool(True), i32(n)
            lib[name](ptr(g), ptr(ours[0]), ptr(ours[1]), ptr(ours[2]), ptr(ours[3]), *numbers)
            F.optimizer_update_32bit(
                *(rule, g, p, state1, NUMBERS["beta1"], NUMBERS["eps"], step, LR, second),
                *(NUMBERS[k] for k in ("beta2", "beta3", "alpha", "weight_decay")),
                *(SCALE, unorm, single(max_unorm), True),
            )
        for given, expected in zip(ours, (p, state1, second, unorm), strict=True):
            if expected is not None:
                same(given, expected)
        assert not torch.equal(p, values(n, dtype=dtype)) and bool(unorm > 0) == bool(max_unorm)


def step_8bit(lib: Any, name: str) -> None:
    rule, dtype, n = rule_of(name), dtype_of(name), 700
    rows = 2 if rule == "ademamix" else 1
    two = rule in ("adam", "ademamix")
    qmap1, qmap2 = DYNAMIC, F.create_dynamic_map(signed=False)
    p = values(n, dtype=dtype)
    state1, state2 = torch.zeros(rows, n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)
    absmax1, absmax2 = torch.zeros(rows, 3), torch.zeros(3)
    theirs = (p, state1, state2, absmax1, absmax2)
    ours = [t.clone() for t in theirs]
    for step in (1, 2):
        g = values(n, seed=step, dtype=dtype)
        numbers = [f32(NUMBERS[k]) for k in ("beta1", "beta2", "beta3", "alpha", "eps")]
        second = (ptr(ours[2]), ptr(qmap2), ptr(ours[4])) if two else (None, None, None)
        lib[name](
            *(ptr(ours[0]), ptr(g), ptr(ours[1]), second[0], *numbers, i32(step), f32(LR)),
            *(ptr(qmap1), second[1], ptr(ours[3]), second[2]),
            *(f32(NUMBERS["weight_decay"]), f32(SCALE), ct.c_bool(False), i32(n)),
        )
        F.optimizer_update_8bit_blockwise(
            *(rule, g, p, state1.view(rows, n) if rows == 2 else state1.view(n), state2 if two else None),
            *(NUMBERS[k] for k in ("beta1", "beta2", "beta3", "alpha", "eps")),
            *(step, LR, qmap1, qmap2 if two else None),
            *(absmax1 if rows == 2 else absmax1.view(-1), absmax2 if two else None, NUMBERS["weight_decay"], SCALE),
        )
    for given, expected in zip(ours, theirs, strict=True):
        same(given, expected)
    assert state1.any()


def step_static(lib: Any, name: str) -> None:
    """One scale for a whole state: dequantized, moved in fp32, quantized again with the new largest magnitude."""
    rule, dtype, n = rule_of(name), dtype_of(name), 700
    maps = DYNAMIC, F.create_dynamic_map(signed=False)
    p = values(n, dtype=dtype)
    mine = p.clone()
    codes = [nearest_codes(torch.zeros(n), m) for m in maps]
    largest = [torch.zeros(1), torch.zeros(1)]
    expected = [[c.clone(), m.clone()] for c, m in zip(codes, largest, strict=True)]
    two = rule == "adam"
    for step in (1, 2):
        g, new = values(n, seed=step, dtype=dtype), [torch.zeros(1), torch.zeros(1)]
        pairs = [[ptr(t) for t in x] if two else [ptr(x[0]), None] for x in (codes, maps, largest, new)]
        betas = [f32(NUMBERS[k]) for k in ("beta1", "beta2", "eps")]
        lib[name](
            *(ptr(mine), ptr(g), *pairs[0], None, f32(0), f32(0), *betas, i32(step), f32(LR)),
            *(*pairs[1], *pairs[2], *pairs[3], f32(NUMBERS["weight_decay"]), f32(SCALE), i32(n)),
        )
        largest = new
        states = [m[c.int()] * most for (c, most), m in zip(expected, maps, strict=True)]
        F.optimizer_update_32bit(
            *(rule, g, p, states[0], NUMBERS["beta1"], NUMBERS["eps"], step, LR, states[1] if two else None),
            *(NUMBERS["beta2"], 0.0, 0.0, NUMBERS["weight_decay"], SCALE),
        )
        for kept, state, m in zip(expected, states, maps, strict=True):
            kept[1] = state.abs().max()
            kept[0] = nearest_codes(state * (1 / kept[1].clamp(min=1e-38)), m)
    same(mine, p)
    for i in range(1 + two):
        same(codes[i], expected[i][0])
        same(largest[i], expected[i][1].view(1))


def squares(lib: Any, name: str) -> None:
    for n, step in ((1, 3), (20000, 205)):
        g, history = values(n, dtype=dtype_of(name)), torch.full((100,), 7.0)
        lib[name](ptr(g), ptr(history), i32(step), i32(n))
        torch.testing.assert_close(history[step % 100], g.double().square().sum().float(), rtol=1e-6, atol=0)
        assert (history == 7).sum() == 99


# ---- LLM.int8()


def dequantize_sums(lib: Any, name: str) -> None:
    rows, columns = 5, 70
    sums = integers(-100000, 100000, rows, columns, dtype=torch.int32)
    row, column, bias = values(rows).abs(), values(columns, seed=1).abs(), values(columns, seed=2, dtype=torch.float16)
    for b in (bias, None):
        out = torch.empty(rows, columns, dtype=torch.float16)
        pointers = [t if t is None else t.data_ptr() for t in (sums, row, column, out, b)]
        lib[name](*pointers, rows, columns, 0)
        same(out, ops.int8_mm_dequant(sums, row, column, torch.float16, b))


def quantize_int8(lib: Any, name: str) -> None:
    x = values(6, 80, dtype=torch.float16, scale=3)
    for threshold in (0.0, 4.0):
        out, scale = torch.empty(6, 80, dtype=torch.int8), torch.empty(6)
        lib[name](x.data_ptr(), out.data_ptr(), scale.data_ptr(), threshold, 6, 80, 0)
        outliers = x.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
        codes, expected, _ = ops.int8_vectorwise_quant(x.masked_fill(outliers, 0), 0.0)
        same(out, codes)
        same(scale, expected)
        # The released package clears columns itself then, as the operator does.
        codes, expected, columns = ops.int8_vectorwise_quant(x, threshold)
        if threshold:
            assert len(columns) and out[:, columns].any()
            out[:, columns] = 0
        same(out, codes)


def gemm_int8(lib: Any, name: str) -> None:
    """C [n, m] = B [n, k] A [m, k]^T: weights are A, activations are B."""
    for m, n, k, wide in ((20, 7, 36, 0), (33, 5, 13, 3)):
        a, b = integers(-127, 128, m, k + wide), integers(-127, 128, n, k + wide, seed=1)
        scale = values(m).abs() / 500
        narrow = name != "cigemmlt_32"
        c = torch.full((n, m + wide), 99, dtype=torch.int8 if narrow else torch.int32)
        row_scale = scale.data_ptr() if name.endswith("rowscale") else None
        context = ct.c_void_p(lib.get_context())
        sizes = m, n, k, a.data_ptr(), b.data_ptr(), c.data_ptr(), row_scale, k + wide, k + wide, m + wide
        assert lib[name](context, *sizes, 0) == 0
        sums = b[:, :k].int() @ a[:, :k].int().t()
        if narrow:
            scaled = sums.float() * scale if row_scale else sums.float()
            sums = scaled.round().clamp(-128, 127).to(torch.int8)
        same(c[:, :m].contiguous(), sums)
        assert (c[:, m:] == 99).all()


def columns_of(stored: Tensor, transposed: bool) -> Tensor:
    """BLAS's matrix op(stored), which is stored column by column, as int32 [rows, columns]."""
    return (stored if transposed else stored.t()).int()


def igemm(lib: Any, name: str) -> None:
    m, n, k = 9, 6, 21
    for ta, tb, wide in ((False, False, 0), (True, False, 0), (False, True, 2), (True, True, 1)):
        a = integers(-127, 128, *((m, k) if ta else (k, m)))
        b = integers(-127, 128, *((k, n) if tb else (n, k)), seed=1)
        stored_a, stored_b = (torch.cat((t, t[:, :wide]), 1).contiguous() for t in (a, b))
        c = torch.full((n, m + wide), 99, dtype=torch.int32)
        leading = [i32(t.shape[1]) for t in (stored_a, stored_b, c)]
        flags, sizes = (ct.c_bool(ta), ct.c_bool(tb)), (i32(m), i32(n), i32(k))
        lib[name](ct.c_void_p(1), *flags, *sizes, ptr(stored_a), ptr(stored_b), ptr(c), *leading)
        same(c[:, :m].t().contiguous(), columns_of(a, ta) @ columns_of(b, tb))
        assert (c[:, m:] == 99).all()


def batched_igemm(lib: Any, name: str) -> None:
    """As functional.batched_igemm of the released package calls it for A [4, 5, 8] @ B [4, 8, 6]."""
    a, b = integers(-127, 128, 4, 5, 8), integers(-127, 128, 4, 8, 6, seed=1)
    out = torch.empty(4, 5, 6, dtype=torch.int32)
    sizes = *map(i32, (6, 5, 8)), ptr(b), ptr(a), ptr(out), *map(i32, (6, 8, 6))
    strides = ct.c_long(48), ct.c_long(40), ct.c_long(30), ct.c_uint32(4)
    lib[name](ct.c_void_p(1), ct.c_bool(False), ct.c_bool(False), *sizes, *strides)
    same(out, a.int() @ b.int())


# ---- the rest


def context(lib: Any, name: str) -> None:
    assert lib[name]()


def has(lib: Any, name: str) -> None:
    flags = re.findall(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    assert lib[name]() is (name.removeprefix("has_").removesuffix("_cpu").replace("512b", "512_b") in " ".join(flags))


def allocate(lib: Any, name: str) -> None:
    address = lib[name](ct.c_size_t(4000))
    floats = (ct.c_float * 1000).from_address(address)
    floats[999] = 2.5
    assert floats[999] == 2.5 and address % 8 == 0


def prefetch(lib: Any, name: str) -> None:
    x = values(10)
    for device in (0, -1):
        lib[name](ptr(x), ct.c_size_t(x.nbytes), i32(device))
    same(x, values(10))


def elementwise(lib: Any, name: str) -> None:
    kind = torch.uint8 if "uint8" in name else torch.float32
    a, b, value = values(700).to(kind), values(700, seed=1), 7
    expected = {"cfill": torch.full_like(a, value), "carange": torch.arange(700.0), "c_mul": a * b}
    number = ct.c_uint8(value) if kind == torch.uint8 else f32(value)
    lib[name](ptr(a), ptr(b) if "mul" in name else None, number, ct.c_int64(700))
    same(a, expected[name.rsplit("_", 1)[0]])


def unscaled(lib: Any, name: str) -> None:
    x, codes, floats = values(700).clamp(-2, 2), integers(0, 256, 700, dtype=torch.uint8), torch.empty(700)
    if name == "cquantize":
        lib[name](ptr(DYNAMIC), ptr(x), ptr(codes), ct.c_int(700))
        same(codes, nearest_codes(x, DYNAMIC))
    else:
        lib[name](ptr(DYNAMIC), ptr(codes), ptr(floats), ct.c_int(700), STREAM)
        same(floats, DYNAMIC[codes.int()])


def sparse(lib: Any, name: str) -> None:
    rows, columns, n, nnz = 6, 40, 10, 25
    row, column = integers(0, rows, nnz, dtype=torch.int32), integers(0, columns, nnz, seed=1, dtype=torch.int32)
    value = values(nnz, dtype=torch.float16)
    row[3], column[4] = 77, -1  # outside: skipped
    inside = (row < rows) & (column >= 0)
    at = row[inside].long(), column[inside].long()
    dense = torch.zeros(rows, columns, dtype=torch.float64).index_put_(at, value[inside].double(), accumulate=True)
    b, out = values(columns, n, seed=2, dtype=torch.float16), values(rows, n, seed=3, dtype=torch.float16)
    before = out.double()
    if name == "cspmm_coo":
        for transposed in (False, True):
            stored = b.t().contiguous() if transposed else b
            sizes = i32(nnz), i32(rows), i32(columns), i32(n), i32(stored.shape[1]), ptr(stored), i32(n), ptr(out)
            lib[name](ct.c_void_p(1), ptr(row), ptr(column), ptr(value), *sizes, ct.c_bool(transposed))
            near(out, dense @ b.double(), 1e-3)
        return
    scale = values(n).abs() if name.endswith("int8") else None
    operand = integers(-127, 128, columns, n) if name.endswith("int8") else b
    counts = [torch.zeros(rows, dtype=torch.int32) for _ in range(3)]
    pointers = (ptr(t) for t in (*counts, row, column, value, operand, out, scale))
    lib[name](*pointers, i32(rows), i32(nnz), i32(rows), i32(columns), i32(n))
    w = operand.double() if scale is None else operand.double() * scale.double() / 127
    near(out, before + dense @ w, 1e-3)


CASES: dict[str, Callable[[Any, str], None]] = {
    r"cquantize_blockwise_(cpu_)?(fp32|fp16|bf16)(_fp4|_nf4)?": quantize,
    r"cdequantize_blockwise_(cpu_)?((fp4|nf4)_)?(fp32|fp16|bf16)(_fp4|_nf4)?": dequantize,
    r"cgemm_4bit_(fp32|fp16|bf16)": gemm_4bit,
    r"cgemm_4bit_inference_naive_(fp32|fp16|bf16)": gemv_4bit,
    r"gemv_4bit_inference_cpu_\w+": gemv_4bit_cpu,
    r"c\w+32bit_grad_\w+": step_32bit,
    r"c\w+_8bit_blockwise_grad_\w+": step_8bit,
    r"c\w+_static_8bit_grad_\w+": step_static,
    r"cpercentile_clipping_\w+": squares,
    r"cdequant_mm_int32_fp16": dequantize_sums,
    r"cint8_vector_quant": quantize_int8,
    r"cigemmlt_\w+": gemm_int8,
    r"cigemm": igemm,
    r"cbatched_igemm": batched_igemm,
    r"get_context|get_cusparse": context,
    r"has_\w+": has,
    r"cget_managed_ptr": allocate,
    r"cprefetch": prefetch,
    r"cfill_\w+|carange_fp32|c_mul_fp32": elementwise,
    r"cquantize|cdequantize": unscaled,
    r"cspmm_coo\w*": sparse,
}


def case_of(name: str) -> Callable[[Any, str], None]:
    """The one case that fits."""
    (case,) = (case for pattern, case in CASES.items() if re.fullmatch(pattern, name))
    return case
