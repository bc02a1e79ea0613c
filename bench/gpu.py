"""./dev gpu's benchmark: operators on a CUDA GPU, against copying, torch.matmul and perhaps the released package.

Each case runs from a CUDA graph that calls the operator for several copies of its tensors in turn, results included, so
that nothing is found in the second-level cache; the fastest replay counts. Both packages are called through the
operators that they have in common, each in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bench import report

ROOT = Path(__file__).resolve().parent.parent
ops = torch.ops.bitsandbytes

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))  # rows and columns of the weight
BATCHES = (1, 2, 4, 8, 16, 32, 48, 64, 128, 512, 2048)
FLAT = 1 << 26
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SCALE = 4 / 64  # bytes of absmax an element, in blocks of 64
HOST_LIMIT_US = 8.0

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


def all_cases() -> list[Case]:
    return [*block_cases(), *product_cases(), *int8_cases(), *optimizer_cases()]


def copy_case(n: int = 1 << 29) -> Case:
    def make(device: torch.device) -> Tensors:
        return torch.empty(n, device=device, dtype=torch.uint8), torch.ones(n, device=device, dtype=torch.uint8)

    return Case("copy", make, torch.Tensor.copy_, 2 * n)


# ---- measuring


def copies_of(case: Case, l2_bytes: int) -> int:
    """How many sets of tensors are used in turn: three times the cache, and at least three."""
    return max(3, min(64, math.ceil(3 * l2_bytes / case.bytes)))


def seconds(case: Case, device: torch.device, duration: float) -> float:
    """Seconds a call, from the fastest replay of a graph within `duration`: long enough for clocks to rise."""
    first = case.make(device)
    count = copies_of(case, torch.cuda.get_device_properties(device).L2_cache_size)
    inputs = [first, *(tuple(t.clone() for t in first) for _ in range(count - 1))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        case.call(*first)
    torch.cuda.synchronize()
    graph, results = torch.cuda.CUDAGraph(), []
    with torch.no_grad(), torch.cuda.graph(graph):
        results += [case.call(*tensors) for tensors in inputs]
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    best, until = math.inf, time.perf_counter() + duration
    while time.perf_counter() < until or best == math.inf:
        graph.replay()  # so that the launch of the next one is not waited for
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3 / count)
    return best


def host_microseconds(call: Callable[[], Any], batch: int = 100, batches: int = 60) -> float:
    """What a call costs the host: the fastest batch, the device drained between batches."""
    best = math.inf
    with torch.inference_mode():
        for _ in range(batches):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(batch):
                call()
            best = min(best, time.perf_counter() - start)
    return best / batch * 1e6


def host_times(device: torch.device) -> dict[str, float]:
    x = torch.randn(1, 64, device=device, dtype=torch.bfloat16)
    found = {}
    for name, nested in (("Linear4bit 64x64", False), ("Linear4bit 64x64 nested", True)):
        layer = bnb.nn.Linear4bit(
            64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=nested
        )
        layer = layer.to(torch.bfloat16).to(device).eval()
        found[name] = host_microseconds(lambda layer=layer: layer(x))
    plain = torch.nn.Linear(64, 64, bias=False, device=device, dtype=torch.bfloat16)
    found["nn.Linear 64x64"] = host_microseconds(lambda: plain(x))
    return found


def worker(pattern: str, duration: float, with_limits: bool) -> None:
    """Measures the package of this process: one line of JSON a case."""
    device = torch.device("cuda", 0)

    def emit(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    emit(info={"bitsandbytes": bnb.__version__, "torch": torch.__version__, "path": str(Path(bnb.__file__).parent)})
    cases = all_cases()
    for own, name in (("int8_linear", "int8_linear bf16"), ("optimizer_step", "optimizer_step")):
        if not hasattr(ops, own):
            cases = [c for c in cases if not c.name.startswith(name)]
    if with_limits:
        cases.insert(0, copy_case())
    for case in cases:
        ours = not case.name.startswith(("torch", "copy"))
        if (ours or with_limits) and (not ours or re.search(pattern, case.name)):
            try:
                emit(name=case.name, seconds=seconds(case, device, duration))
            except RuntimeError as error:  # the other cases count all the same
                emit(name=case.name, error=str(error).splitlines()[0])
            torch.cuda.empty_cache()
    emit(host=host_times(device))


def measure(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """Runs a worker to its end."""
    found: dict[str, Any] = {"seconds": {}, "errors": {}}
    command = [sys.executable, "-m", "bench.gpu", "--worker", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout or ():
            line = json.loads(text)
            if "name" in line:
                report.progress(line["name"])
                key, value = ("seconds", line["seconds"]) if "seconds" in line else ("errors", line["error"])
                found[key][line["name"]] = value
            else:
                found |= line
    report.progress("")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return found


# ---- the report


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of every case: time, rate, share and whether it is reached, the reference's time and the ratio."""
    ours, reference = result["project"]["seconds"], result.get("reference", {"seconds": {}})["seconds"]
    copy = result["cases"]["copy"]["bytes"] / ours["copy"] / 1e9
    lines = []
    for name, case in result["cases"].items():
        if name not in ours:
            if name in result["project"]["errors"]:
                lines.append((name, f"failed: {result['project']['errors'][name]}", *[""] * 6))
            continue
        rate = case["bytes"] / ours[name] / 1e9
        base = copy * 1e9 / case["bytes"] if case["of"] == "copy" else 1 / ours[case["of"]]
        share = 1 / ours[name] / base
        matmul = (
            ours.get(re.sub(r"(?:gemm_4bit|int8_linear)(.*?)( nested)?$", r"torch.matmul\1", name))
            if case["flops"]
            else None
        )
        lines.append(
            (
                name,
                f"{ours[name] * 1e6:.1f}",
                f"{rate:.0f}" if not case["flops"] else f"{rate:.0f}, {case['flops'] / ours[name] / 1e12:.3g} TFLOP/s",
                f"{share:.0%} of {case['of'].split()[0]}",
                "" if case["reach"] is None else f"{case['reach']:.0%}: {'yes' if share >= case['reach'] else 'NO'}",
                f"{matmul / ours[name]:.2f}" if matmul and not name.startswith("torch") else "",
                f"{reference[name] * 1e6:.1f}" if name in reference else "",
                f"{reference[name] / ours[name]:.2f}" if name in reference else "",
            )
        )
    return lines


TITLES = ("case", "us", "GB/s", "share", "to reach", "torch.matmul / ours", "reference us", "reference / ours")


def flatness(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Time of small batches over that of one row, to stay within 1.3 up to 48."""
    ours = result["project"]["seconds"]
    lines = []
    for n, k in SHAPES:
        times = [ours.get(f"gemm_4bit bf16 {n}x{k} M={m}") for m in BATCHES if m <= 64]
        if all(times):
            worst = max(t / times[0] for m, t in zip(BATCHES, times, strict=False) if m <= 48)
            lines.append(
                (f"{n}x{k}", *(f"{t / times[0]:.2f}" for t in times), f"{worst:.2f}: {'yes' if worst <= 1.3 else 'NO'}")
            )
    return lines


def markdown(result: dict[str, Any]) -> str:
    machine, host = result["machine"], result["project"]["host"]
    copy = result["cases"]["copy"]["bytes"] / result["project"]["seconds"]["copy"] / 1e9
    parts = [
        f"# {machine['gpu']}",
        f"{machine['date']}, commit {machine['commit']}{', quick' if result['quick'] else ''}. {machine['sms']} "
        f"multiprocessors, {machine['l2_bytes'] >> 20} MiB of second-level cache, driver {machine['driver']}, torch "
        f"{result['project']['info']['torch']}. Copy bandwidth, read and written: {copy:.0f} GB/s.",
        "From CUDA graphs, tensors rotated through more than the cache, fastest replay. GB/s counts what must move.",
        report.table(TITLES, rows(result)),
    ]
    if flat := flatness(result):
        titles = ("gemm_4bit, time over that of M=1", *(f"M={m}" for m in BATCHES if m <= 64), "M <= 48 within 1.3")
        parts.append(report.table(titles, flat))
    titles = ("host time of a call", "us", "to reach")
    host_rows = []
    for name, us in host.items():
        met = f"{HOST_LIMIT_US:g}: {'yes' if us <= HOST_LIMIT_US else 'NO'}" if name.startswith("Linear4bit") else ""
        host_rows.append((name, f"{us:.1f}", met))
    parts.append(report.table(titles, host_rows))
    if "reference" not in result:
        parts.append("The released package was not there to compare with.")
    return "\n\n".join(parts) + "\n"


def output(*command: str) -> str:
    """What a program prints, "unknown" if it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "python": platform.python_version(),
        "commit": output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument(
        "filter", nargs="?", default="", help="regular expression: only cases whose name it is found in"
    )
    parser.add_argument("--quick", action="store_true", help="less time a case; for orientation")
    parser.add_argument("--reference", type=Path, help="folder that holds the released package, to compare with")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="where JSON and table go")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--limits", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu: torch finds no CUDA GPU")
    if args.worker:
        return worker(args.filter, 0.03 if args.quick else 0.2, args.limits)

    begin = time.monotonic()
    cases = [copy_case(), *all_cases()]
    result: dict[str, Any] = {
        "machine": machine(),
        "filter": args.filter,
        "quick": args.quick,
        "cases": {c.name: {"bytes": c.bytes, "flops": c.flops, "of": c.of, "reach": c.reach} for c in cases},
    }
    options = [args.filter, *["--quick"] * args.quick]
    result["project"] = measure(dict(os.environ), *options, "--limits")
    if args.reference:
        path = os.pathsep.join([str(args.reference.resolve()), os.environ.get("PYTHONPATH", "")])
        result["reference"] = measure({**os.environ, "PYTHONPATH": path}, *options)
    result["seconds_in_all"] = time.monotonic() - begin
    name = re.sub(r"[^a-z0-9]+", "-", f"{result['machine']['gpu']} {args.filter} {'quick' * args.quick}".lower())
    args.results.mkdir(parents=True, exist_ok=True)
    table = markdown(result)
    print(table)
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", table)):
        path = args.results / (name.strip("-") + suffix)
        path.write_text(text)
        print(f"wrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
