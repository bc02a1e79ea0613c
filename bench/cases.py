"""The table of cases. Both packages run each of them through the same public Python API.

A case states the bytes it must move and the operations it must do, so that a rate and a share of the machine's limit
follow from its time. `reach` is the ratio to reach: time of the reference / time of the project.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[], Any]

SCALE = 4 / 64  # bytes of absmax an element, in blocks of 64
SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
SQUARE = (4096, 4096)
FLAT = 1 << 22


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], Call]  # prepares the data, gives the call to be timed
    # The limit it is held against: read, copy, update, cache, fresh32, fresh64 (bytes), fma, bf16, int8
    # (operations), "" (the call).
    bound: str = ""
    bytes: float = 0
    flops: float = 0
    reach: float | None = None
    versus: str = ""  # another way to do what this case of the table does: compared with the project only
    inference: bool = False  # timed within torch.inference_mode(), which takes 2 us to enter: a model does so once

    @property
    def family(self) -> str:
        return self.name.split()[0]


def _dtype(name: str) -> Any:
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def _randn(*shape: int, dtype: str) -> Any:
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_dtype(dtype))


def quantize(kind: str, dtype: str, nested: bool, reach: float) -> Case:
    def make() -> Call:
        import bitsandbytes.functional as F

        x = _randn(*SQUARE, dtype=dtype)
        return lambda: F.quantize_4bit(x, blocksize=64, quant_type=kind, compress_statistics=nested)

    name = f"quantize_4bit {kind} 4096x4096 {dtype}{' nested' * nested}"
    n = SQUARE[0] * SQUARE[1]
    return Case(name, make, "copy", n * (SIZE[dtype] + 0.5 + SCALE), reach=reach)


def dequantize(kind: str, dtype: str, reach: float | None) -> Case:
    def make() -> Call:
        import bitsandbytes.functional as F

        packed, state = F.quantize_4bit(_randn(*SQUARE, dtype=dtype), blocksize=64, quant_type=kind)
        return lambda: F.dequantize_4bit(packed, state)

    n = SQUARE[0] * SQUARE[1]
    return Case(
        f"dequantize_4bit {kind} 4096x4096 {dtype}",
        make,
        f"fresh{16 * SIZE[dtype]}",
        n * (SIZE[dtype] + 0.5 + SCALE),
        reach=reach,
    )


def quantize_blockwise(dtype: str, reach: float) -> Case:
    def make() -> Call:
        import bitsandbytes.functional as F

        x = _randn(FLAT, dtype=dtype)
        return lambda: F.quantize_blockwise(x, blocksize=256)

    return Case(f"quantize_blockwise 4M {dtype}", make, "copy", FLAT * (SIZE[dtype] + 1 + 4 / 256), reach=reach)


def dequantize_blockwise(dtype: str, reach: float) -> Case:
    def make() -> Call:
        import bitsandbytes.functional as F

        codes, state = F.quantize_blockwise(_randn(FLAT, dtype=dtype), blocksize=256)
        return lambda: F.dequantize_blockwise(codes, state)

    return Case(f"dequantize_blockwise 4M {dtype}", make, "copy", FLAT * (SIZE[dtype] + 1 + 4 / 256), reach=reach)


def _layer(k: int, n: int, dtype: str) -> Any:
    import torch

    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        k, n, bias=False, compute_dtype=_dtype(dtype), quant_type="nf4", compress_statistics=False
    )
    with torch.no_grad():
        layer.weight.data = _randn(n, k, dtype=dtype) / k**0.5
    return layer.to("cpu")  # this is what quantizes


def _linear_name(dtype: str, m: int, n: int, k: int) -> str:
    return f"Linear4bit {dtype} {n}x{k} M={m}"


def _matmul_bytes(dtype: str, m: int, n: int, k: int, weight: float = 0.5 + SCALE) -> float:
    return n * k * weight + m * (n + k) * SIZE[dtype]


def linear(
    dtype: str,
    m: int,
    reach: float | None,
    n: int = 4096,
    k: int = 4096,
    bound: str = "",
    layers: int = 1,
    deterministic: bool = False,
) -> Case:
    def make() -> Call:
        stack = [_layer(k, n, dtype).eval() for _ in range(layers)]
        x = _randn(m, k, dtype=dtype)

        def call() -> None:
            for layer in stack:
                layer(x)

        def deterministic_call() -> None:
            import torch

            torch.use_deterministic_algorithms(True)
            call()
            torch.use_deterministic_algorithms(False)

        return deterministic_call if deterministic else call

    name = _linear_name(dtype, m, n, k) + f" {layers} layers in turn" * (layers > 1) + " deterministic" * deterministic
    return Case(
        name, make, bound, layers * _matmul_bytes(dtype, m, n, k), layers * 2.0 * m * n * k, reach, inference=True
    )


def linear_training(dtype: str, m: int, reach: float) -> Case:
    def make() -> Call:
        layer = _layer(4096, 4096, dtype)
        x = _randn(m, 4096, dtype=dtype).requires_grad_()
        gradient = _randn(m, 4096, dtype=dtype)

        def call() -> None:
            x.grad = None
            layer(x).backward(gradient)

        return call

    flops = 2 * 2.0 * m * 4096 * 4096
    name = f"Linear4bit {dtype} 4096x4096 M={m} forward + backward"
    return Case(name, make, "bf16", 2 * _matmul_bytes(dtype, m, 4096, 4096), flops, reach)


def quantize_rows(m: int, k: int, dtype: str, threshold: float, reach: float | None) -> Case:
    def make() -> Call:
        import bitsandbytes.functional as F

        x = _randn(m, k, dtype=dtype)
        return lambda: F.int8_vectorwise_quant(x, threshold=threshold)

    name = f"int8_vectorwise_quant {m}x{k} {dtype}{f' threshold {threshold:g}' if threshold else ''}"
    return Case(name, make, "copy", m * k * (SIZE[dtype] + 1), reach=reach)


def int8_matmul(m: int, n: int, k: int, reach: float) -> Case:
    def make() -> Call:
        import torch

        import bitsandbytes.functional as F

        a, b = (torch.randint(-127, 128, (rows, k), dtype=torch.int8) for rows in (m, n))
        return lambda: F.int8_linear_matmul(a, b)

    flops, size = 2.0 * m * n * k, (m + n) * k + 4.0 * m * n
    return Case(f"int8_linear_matmul {m}x{n}x{k}", make, "int8", size, flops, reach)


def linear8(
    dtype: str,
    m: int,
    reach: float | None,
    n: int = 4096,
    k: int = 4096,
    bound: str = "",
    layers: int = 1,
    threshold: float = 6.0,
) -> Case:
    """One in a thousand columns of x holds outliers."""

    def make() -> Call:
        import bitsandbytes as bnb

        def layer() -> Any:
            made = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=threshold)
            weight = _randn(n, k, dtype=dtype) / k**0.5
            made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            return made.to("cpu").eval()  # this is what quantizes

        stack = [layer() for _ in range(layers)]
        x = _randn(m, k, dtype=dtype)
        x[:, :: max(1, min(1000, k - 1))] *= 10

        def call() -> None:
            for made in stack:
                made(x)

        return call

    name = f"Linear8bitLt {dtype} {n}x{k} M={m}" + f" {layers} layers in turn" * (layers > 1)
    return Case(
        name, make, bound, layers * _matmul_bytes(dtype, m, n, k, 1), layers * 2.0 * m * n * k, reach, inference=True
    )


def torch_linear(m: int, reach: float) -> Case:
    def make() -> Call:
        import torch

        weight, x = _randn(4096, 4096, dtype="bf16") / 64, _randn(m, 4096, dtype="bf16")

        return lambda: torch.nn.functional.linear(x, weight)

    flops = 2.0 * m * 4096 * 4096
    size = _matmul_bytes("bf16", m, 4096, 4096, 2)
    return Case(f"nn.Linear bf16 M={m}", make, "", size, flops, reach, _linear_name("bf16", m, 4096, 4096), True)


def dequantize_then_linear(dtype: str, m: int, reach: float) -> Case:
    def make() -> Call:
        import torch

        import bitsandbytes.functional as F

        packed, state = F.quantize_4bit(_randn(4096, 4096, dtype=dtype) / 64, blocksize=64, quant_type="nf4")
        x = _randn(m, 4096, dtype=dtype)

        return lambda: torch.nn.functional.linear(x, F.dequantize_4bit(packed, state))

    flops = 2.0 * m * 4096 * 4096
    size = _matmul_bytes(dtype, m, 4096, 4096)
    return Case(
        f"dequantize + linear {dtype} M={m}", make, "", size, flops, reach, _linear_name(dtype, m, 4096, 4096), True
    )


def float_route8(m: int, reach: float) -> Case:
    """The layer without an int8 product: its weight to fp32, then torch."""

    def make() -> Call:
        import torch

        import bitsandbytes.functional as F

        weight, scale, _ = F.int8_vectorwise_quant(_randn(4096, 4096, dtype="bf16") / 64)
        x = _randn(m, 4096, dtype="bf16")

        return lambda: torch.nn.functional.linear(x.float(), F.int8_vectorwise_dequant(weight, scale)).bfloat16()

    flops, size = 2.0 * m * 4096 * 4096, _matmul_bytes("bf16", m, 4096, 4096, 1)
    return Case(f"fp32 route M={m}", make, "", size, flops, reach, f"Linear8bitLt bf16 4096x4096 M={m}", True)


# Bytes of state an element, read and written: fp32, or codes.
STATES = {"Adam": 2, "AdamW": 2, "Lion": 1, "SGD": 1, "RMSprop": 1, "AdEMAMix": 3}
MANY = [1 << 14] * 200
MIXED = [(64 << (i % 14)) + 31 * (i % 5) for i in range(500)]
OPTIONS: dict[str, dict[str, Any]] = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "AdamW": {"weight_decay": 0.01}}


def _parameters(sizes: Sequence[int], dtype: str) -> list[Any]:
    import torch

    made = []
    for size in sizes:
        p = torch.nn.Parameter(_randn(size, dtype=dtype))
        p.grad = _randn(size, dtype=dtype) * 1e-3
        made.append(p)
    return made


def _optimizer_name(name: str, dtype: str, sizes: Sequence[int]) -> str:
    if len(sizes) == 1:
        return f"{name} {'4M' if sizes[0] == FLAT else sizes[0]} {dtype}"
    return f"{name} {len(sizes)} tensors" + (f" of {sizes[0]}" if len(set(sizes)) == 1 else "")


def optimizer(name: str, dtype: str, reach: float | None, sizes: Sequence[int] = (FLAT,), versus: str = "") -> Case:
    """A step of all tensors. `versus`: of a tensor of all their elements instead."""

    def make() -> Call:
        import bitsandbytes as bnb

        family = name.removesuffix("8bit")
        made: Any = getattr(bnb.optim, name)(_parameters(sizes, dtype), **OPTIONS.get(family, {}))
        step: Call = made.step
        return step

    eight = name.endswith("8bit")
    element = 3 * SIZE[dtype] + (2 if eight else 8) * STATES[name.removesuffix("8bit")]
    bound = "" if eight or len(sizes) > 1 else "update"
    return Case(_optimizer_name(name, dtype, sizes), make, bound, sum(sizes) * element, reach=reach, versus=versus)


def torch_adamw(reach: float) -> Case:
    def make() -> Call:
        import torch

        made = torch.optim.AdamW(_parameters([FLAT], "fp32"), fused=True)
        return made.step

    return Case("torch AdamW fused", make, "", FLAT * 28, reach=reach, versus=_optimizer_name("AdamW", "fp32", [FLAT]))


CASES: tuple[Case, ...] = (
    quantize("nf4", "bf16", False, 80),
    quantize("nf4", "fp32", False, 70),
    quantize("nf4", "bf16", True, 70),
    quantize("fp4", "bf16", False, 100),
    dequantize("nf4", "bf16", 3),
    dequantize("nf4", "fp32", 3),
    dequantize("fp4", "bf16", None),
    quantize_blockwise("fp32", 15),
    quantize_blockwise("bf16", 15),
    dequantize_blockwise("fp32", 1.5),
    dequantize_blockwise("bf16", 2.5),
    linear("bf16", 1, 1.25, bound="cache"),
    linear("bf16", 1, 1.25, bound="read", layers=20),
    linear("bf16", 1, None, bound="cache", deterministic=True),
    linear("bf16", 1, None, bound="read", layers=20, deterministic=True),
    linear("bf16", 8, None, bound="read", layers=20),
    linear("bf16", 8, 1.3, bound="cache"),
    linear("bf16", 32, 1.35, bound="bf16"),
    linear("bf16", 128, 1.35, bound="bf16"),
    linear("bf16", 512, 1.45, bound="bf16"),
    linear("bf16", 1, 3, n=1536, k=576),
    linear("bf16", 1, 3, n=576, k=1536),
    linear("bf16", 1, 3, n=64, k=64),
    linear("fp32", 1, 0.8, bound="cache"),
    linear("fp32", 128, 0.7, bound="fma"),
    linear_training("bf16", 256, 1.6),
    quantize_rows(2048, 4096, "fp16", 0.0, 20),
    quantize_rows(2048, 4096, "fp16", 6.0, None),
    int8_matmul(512, 4096, 4096, 1.1),
    linear8("bf16", 1, 2, bound="cache"),
    linear8("bf16", 1, None, bound="read", layers=10),
    linear8("bf16", 8, None, bound="cache"),
    *(linear8("bf16", m, reach, bound="int8") for m, reach in ((32, 3.5), (128, 1.9), (512, 1.5))),
    linear8("bf16", 1, 8, n=64, k=64),
    optimizer("Adam", "fp32", 2.5),
    optimizer("AdamW", "fp32", None),
    *(optimizer(name, "fp32", 20) for name in ("Adam8bit", "AdamW8bit")),
    optimizer("AdamW8bit", "bf16", 20),
    *(optimizer(name, "fp32", 15) for name in ("Lion8bit", "SGD8bit", "RMSprop8bit", "AdEMAMix8bit")),
    optimizer("AdamW8bit", "fp32", 15, MANY),
    optimizer("AdamW", "fp32", 4, MANY),
    optimizer("AdamW8bit", "fp32", None, MIXED),
    torch_adamw(1),
    optimizer("AdamW8bit", "fp32", 1 / 1.2, [sum(MIXED)], _optimizer_name("AdamW8bit", "fp32", MIXED)),
    *(float_route8(m, 4) for m in (1, 32, 128, 512)),
    *(torch_linear(m, 1 if m <= 32 else 0.95) for m in (1, 8, 32, 128, 512)),
    *(dequantize_then_linear("bf16", m, 1) for m in (1, 8, 32, 128, 512)),
    *(dequantize_then_linear("fp32", m, 1) for m in (1, 128)),
)
BY_NAME = {case.name: case for case in CASES}
assert len(BY_NAME) == len(CASES)

# ./dev bench --isa: what holds the project, and torch under it, to one instruction set as on a machine without more.
AVX2_ENV = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
ISA_ENV = {
    "scalar": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": AVX2_ENV,
    "avxvnni": AVX2_ENV,
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"},
    "avx512bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "amx": {},
}
# Against the best instruction set of the same machine: the share of the rate that a family of cases must keep on AVX2.
ISA_REACH = dict.fromkeys(("quantize_4bit", "dequantize_4bit", "quantize_blockwise", "dequantize_blockwise"), 0.4)


@dataclass(frozen=True)
class Figure:
    """A figure of the real model: its key in the output of bench.real_model, and the ratio to reach in each mode."""

    key: str
    title: str
    more_is_better: bool
    reach: dict[str, float] = field(default_factory=dict)


MODEL_MODES = ("nf4", "fp4", "int8")
MODEL_FIGURES = (
    Figure("load", "load s", False, {"nf4": 2, "fp4": 2}),
    Figure("mb", "model MB", False),
    Figure("decode", "decode tokens/s", True, {"nf4": 1.5, "fp4": 1.5, "int8": 2.5}),
    Figure("rest", "decode ms a token outside quantized layers", False),
    Figure("prefill", "prefill tokens/s", True, {"nf4": 1.3, "fp4": 1.3, "int8": 1.5}),
    Figure("perplexity", "perplexity", False),
    Figure("rss", "peak RSS MB", False, dict.fromkeys(MODEL_MODES, 1)),
)
IMPORT_NAME = "import beyond torch"
IMPORT_CODE = "import torch, time; t = time.perf_counter(); import bitsandbytes; print(time.perf_counter() - t)"
IMPORT_LIMIT_S = 0.15
