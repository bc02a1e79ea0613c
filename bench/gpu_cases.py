"""The cases of ./dev gpu's benchmark: operators on a CUDA GPU, what each moves and computes, and the share to reach."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import bitsandbytes.functional as F

ops = torch.ops.bitsandbytes

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))  # rows and columns of the weight
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 128, 512, 2048)
FLAT = 1 << 26
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE = 4 / 64  # bytes of absmax an element, in blocks of 64

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """`call` runs on what `make` gives. `bytes` is what it must move, `flops` what it must compute."""

    name: str
    make: Callable[[torch.device], Tensors]
    call: Callable[..., Any]
    bytes: float
    flops: float = 0
    of: str = "copy"  # what the share of is stated: the copy bandwidth, or another case by name
    reach: float | None = None  # the share to reach


def _flat(n: int, dtype: str, device: torch.device) -> torch.Tensor:
    return torch.randn(n, device=device, dtype=FLOATS[dtype])


def block_cases(n: int = FLAT) -> Iterator[Case]:
    for kind, dtype in (("nf4", "bf16"), ("nf4", "fp16"), ("nf4", "fp32"), ("fp4", "bf16")):
        size, float_type = FLOATS[dtype].itemsize, FLOATS[dtype]

        def quantize(x: torch.Tensor, kind: str = kind) -> Any:
            return ops.quantize_4bit(x, 64, kind, torch.uint8)

        def dequantize(packed: torch.Tensor, absmax: torch.Tensor, kind: str = kind, t: Any = float_type) -> Any:
            return ops.dequantize_4bit(packed, absmax, 64, kind, [n], t)

        def make(device: torch.device, dtype: str = dtype) -> Tensors:
            return (_flat(n, dtype, device),)

        def packed(device: torch.device, dtype: str = dtype, quantize: Any = quantize) -> Tensors:
            return quantize(_flat(n, dtype, device))

        moved = n * (size + 0.5 + SCALE)
        yield Case(f"quantize_4bit {kind} {dtype}", make, quantize, moved, reach=0.85)
        yield Case(f"dequantize_4bit {kind} {dtype}", packed, dequantize, moved, reach=0.88)
    for dtype in ("bf16", "fp32"):
        size, float_type = FLOATS[dtype].itemsize, FLOATS[dtype]

        def blockwise(x: torch.Tensor, code: torch.Tensor) -> Any:
            return ops.quantize_blockwise(x, code, 256)

        def back(codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, t: Any = float_type) -> Any:
            return ops.dequantize_blockwise(codes, absmax, code, 256, t)

        def plain(device: torch.device, dtype: str = dtype) -> Tensors:
            return _flat(n, dtype, device), _dynamic_map(device)

        def coded(device: torch.device, plain: Any = plain, blockwise: Any = blockwise) -> Tensors:
            x, code = plain(device)
            return (*blockwise(x, code), code)

        moved = n * (size + 1 + 4 / 256)
        yield Case(f"quantize_blockwise {dtype}", plain, blockwise, moved, reach=0.8)
        yield Case(f"dequantize_blockwise {dtype}", coded, back, moved, reach=0.8)


def _dynamic_map(device: torch.device) -> torch.Tensor:
    return F.create_dynamic_map().to(device)


def product_cases(shapes: Any = SHAPES, batches: Any = BATCHES) -> Iterator[Case]:
    for (n, k), m in ((shape, m) for shape in shapes for m in batches):
        yield _matmul(m, n, k)
        yield _gemm(m, n, k, nested=False)
    n, k = shapes[0]
    for m in batches:
        yield _gemm(m, n, k, nested=True)


def _matmul(m: int, n: int, k: int) -> Case:
    def make(device: torch.device) -> Tensors:
        return _flat(m * k, "bf16", device).view(m, k), _flat(n * k, "bf16", device).view(n, k)

    moved = 2 * (n * k + m * (n + k))
    return Case(f"torch.matmul bf16 {n}x{k} M={m}", make, torch.nn.functional.linear, moved, 2.0 * m * n * k)


def _gemm(m: int, n: int, k: int, nested: bool) -> Case:
    def make(device: torch.device) -> Tensors:
        a = _flat(m * k, "bf16", device).view(m, k)
        packed, absmax = ops.quantize_4bit(_flat(n * k, "bf16", device), 64, "nf4", torch.uint8)
        if not nested:
            return a, packed, absmax
        code, offset = _dynamic_map(device), absmax.mean()
        codes, scales = ops.quantize_blockwise(absmax - offset, code, 256)
        return a, packed, scales, codes, code, offset

    def call(a: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor, *second: torch.Tensor) -> Any:
        return ops.gemm_4bit(a, packed, [n, k], absmax, 64, "nf4", None, *second)

    moved = n * k * (0.5 + (1 + 4 / 256) / 64 if nested else 0.5 + SCALE) + 2 * m * (n + k)
    of, reach = "copy", None
    if m >= 512:
        of, reach = _matmul(m, n, k).name, 0.85
    elif m == 1 and (n, k) == (14336, 4096):
        reach = 0.85
    return Case(f"gemm_4bit bf16 {n}x{k} M={m}{' nested' * nested}", make, call, moved, 2.0 * m * n * k, of, reach)


def int8_cases(shapes: Any = SHAPES, batches: Any = BATCHES, rows: int = 16384) -> Iterator[Case]:
    n, k = shapes[0]

    def make(device: torch.device) -> Tensors:
        return (_flat(rows * k, "fp16", device).view(rows, k),)

    yield Case("int8_vectorwise_quant fp16", make, ops.int8_vectorwise_quant, rows * k * 3 + rows * 4, reach=0.85)
    for (n, k), m in ((shape, m) for shape in shapes for m in batches):
        yield _linear8(m, n, k)
        if m >= 512:
            yield _int_mm(m, n, k)
            yield _int8_matmul(m, n, k)


def _codes(rows: int, k: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-127, 128, (rows, k), device=device, dtype=torch.int8)


def _int_mm(m: int, n: int, k: int) -> Case:
    def make(device: torch.device) -> Tensors:
        return _codes(m, k, device), _codes(n, k, device).t()

    moved = k * (m + n) + 4 * m * n
    return Case(f"torch._int_mm {n}x{k} M={m}", make, torch._int_mm, moved, 2.0 * m * n * k)


def _int8_matmul(m: int, n: int, k: int) -> Case:
    def make(device: torch.device) -> Tensors:
        return _codes(m, k, device), _codes(n, k, device)

    of = _int_mm(m, n, k)
    name = f"int8_linear_matmul {n}x{k} M={m}"
    return Case(name, make, ops.int8_linear_matmul, of.bytes, of.flops, of.name, 0.65)


def _linear8(m: int, n: int, k: int) -> Case:
    """A whole layer, with 1 column in 1000 of outliers; for one row held against torch.nn.Linear in bf16."""

    def make(device: torch.device) -> Tensors:
        x = _flat(m * k, "bf16", device).view(m, k)
        x[:, ::1000] *= 10
        return x, _codes(n, k, device), torch.rand(n, device=device)

    def call(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> Any:
        return ops.int8_linear(x, codes, scale, None, 6.0)

    moved = n * (k + 4) + 2 * m * (n + k)
    of, reach = (_matmul(m, n, k).name, 1.0) if m == 1 else ("copy", None)
    return Case(f"int8_linear bf16 {n}x{k} M={m}", make, call, moved, 2.0 * m * n * k, of, reach)


def optimizer_cases(n: int = FLAT, tensors: int = 500) -> Iterator[Case]:
    for name, states, dtype in (("adam", 2, "bf16"), ("adam", 2, "fp32"), ("lion", 1, "bf16")):
        yield _plain_step(name, states, dtype, n)
        yield _coded_step(name, states, dtype, n)
    yield _many_steps("bf16", n, tensors)


def _parameter(n: int, dtype: str, device: torch.device) -> Tensors:
    return _flat(n, dtype, device), _flat(n, dtype, device)


def _plain_step(name: str, states: int, dtype: str, n: int) -> Case:
    def make(device: torch.device) -> Tensors:
        return (*_parameter(n, dtype, device), *(torch.rand(n, device=device) for _ in range(states)))

    def call(g: torch.Tensor, p: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None = None) -> None:
        numbers = (0.0, 0.0, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.01, 7, 1e-2, 1.0)
        ops.optimizer_update_32bit(name, g, p, first, second, None, *numbers)

    return Case(f"{name} 32-bit {dtype}", make, call, n * (3 * FLOATS[dtype].itemsize + 8 * states), reach=0.9)


def _coded(n: int, device: torch.device) -> Tensors:
    return torch.randint(128, 256, (n,), device=device, dtype=torch.uint8), torch.rand(-(-n // 256), device=device)


def _coded_step(name: str, states: int, dtype: str, n: int) -> Case:
    def make(device: torch.device) -> Tensors:
        maps = (F.create_dynamic_map(signed).to(device) for signed in (True, False)[:states])
        return (*_parameter(n, dtype, device), *(t for own in maps for t in (*_coded(n, device), own)))

    def call(g: torch.Tensor, p: torch.Tensor, *own: torch.Tensor) -> None:
        codes, absmax, maps = ([*own[i::3], None][:2] for i in range(3))
        numbers = (0.9, 0.999, 0.0, 0.0, 1e-8, 7, 1e-2)
        ops.optimizer_update_8bit_blockwise(name, g, p, *codes, *numbers, *maps, *absmax, 0.01, 1.0)

    moved = n * (3 * FLOATS[dtype].itemsize + 2 * states) + 8 * states * -(-n // 256)
    return Case(f"{name} 8-bit {dtype}", make, call, moved, reach=0.8)


def _many_steps(dtype: str, n: int, tensors: int) -> Case:
    """A group of many tensors in one call, held against one tensor of their sum."""
    size, left = n // tensors // 256 * 256, tensors // 2
    sizes = [size // 2] * left + [size + size // 2] * left + [size] * (tensors % 2)
    sizes[-1] += n - sum(sizes)

    def make(device: torch.device) -> Tensors:
        maps = (F.create_dynamic_map(signed).to(device) for signed in (True, False))
        own = ((*_parameter(m, dtype, device), *_coded(m, device), *_coded(m, device)) for m in sizes)
        return (*maps, *(t for parameter in own for t in parameter))

    def call(first: torch.Tensor, second: torch.Tensor, *own: torch.Tensor) -> None:
        g, p, state1, absmax1, state2, absmax2 = (list(own[i::6]) for i in range(6))
        steps = [7] * tensors
        numbers = (1e-2, 0.9, 0.999, 0.0, 0.0, 1e-8, 0.01)
        ops.optimizer_step("adam", p, g, state1, state2, absmax1, absmax2, [], first, second, steps, *numbers)

    of = _coded_step("adam", 2, dtype, n)
    return Case(
        f"optimizer_step adam 8-bit {dtype}, {tensors} tensors", make, call, of.bytes, of=of.name, reach=1 / 1.2
    )


# What is measured first, as a borrowed GPU may be gone before the end. Each product stands beside torch's.
ORDER = (
    r"^copy$",
    r"^(gemm_4bit|torch\.matmul) bf16 (4096x14336|14336x4096|8192x8192) M=1$",
    r"^(gemm_4bit|torch\.matmul) bf16 \d+x\d+ M=(8|48|128|512)$",
    r"^quantize_",
    r"^dequantize_",
    r"^(adam 8-bit|optimizer_step)",
)


def in_order(cases: Iterable[Case]) -> list[Case]:
    """By ORDER, then as they come."""
    return sorted(cases, key=lambda c: next((i for i, p in enumerate(ORDER) if re.search(p, c.name)), len(ORDER)))


def all_cases() -> list[Case]:
    return in_order([copy_case(), *block_cases(), *product_cases(), *int8_cases(), *optimizer_cases()])


def copy_case(n: int = 1 << 29) -> Case:
    def make(device: torch.device) -> Tensors:
        return torch.empty(n, device=device, dtype=torch.uint8), torch.ones(n, device=device, dtype=torch.uint8)

    return Case("copy", make, torch.Tensor.copy_, 2 * n)
