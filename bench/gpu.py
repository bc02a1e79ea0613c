"""./dev gpu's benchmark: operators on a CUDA GPU, against copying, torch.matmul and perhaps the released package.

Each case runs from a CUDA graph that calls the operator for several copies of its tensors in turn, results included, so
that nothing is found in the second-level cache; the fastest replay counts. Both packages are called through the
operators that they have in common, each in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import bitsandbytes as bnb
from bench import gpu_cases, report

ROOT = Path(__file__).resolve().parent.parent
ops = torch.ops.bitsandbytes

HOST_LIMIT_US = 8.0


# ---- measuring


def copies_of(case: gpu_cases.Case, l2_bytes: int) -> int:
    """How many sets of tensors are used in turn: three times the cache, and at least three."""
    return max(3, min(64, math.ceil(3 * l2_bytes / case.bytes)))


def seconds(case: gpu_cases.Case, device: torch.device, duration: float) -> float:
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


def host_times(device: torch.device) -> Iterator[tuple[str, float]]:
    x = torch.randn(1, 64, device=device, dtype=torch.bfloat16)
    for name, nested in (("Linear4bit 64x64", False), ("Linear4bit 64x64 nested", True)):
        layer = bnb.nn.Linear4bit(
            64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=nested
        )
        layer = layer.to(torch.bfloat16).to(device).eval()
        yield name, host_microseconds(lambda layer=layer: layer(x))
    plain = torch.nn.Linear(64, 64, bias=False, device=device, dtype=torch.bfloat16)
    yield "nn.Linear 64x64", host_microseconds(lambda: plain(x))


def worker(pattern: str, duration: float, with_limits: bool) -> None:
    """Measures the package of this process: one line of JSON a case."""
    device = torch.device("cuda", 0)

    def emit(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    emit(info={"bitsandbytes": bnb.__version__, "torch": torch.__version__, "path": str(Path(bnb.__file__).parent)})
    cases = gpu_cases.all_cases()
    for own, name in (("int8_linear", "int8_linear bf16"), ("optimizer_step", "optimizer_step")):
        if not hasattr(ops, own):
            cases = [c for c in cases if not c.name.startswith(name)]
    for case in cases:
        ours = not case.name.startswith(("torch", "copy"))
        if (ours or with_limits) and (not ours or re.search(pattern, case.name)):
            try:
                emit(name=case.name, seconds=seconds(case, device, duration))
            except RuntimeError as error:  # the other cases count all the same
                emit(name=case.name, error=str(error).splitlines()[0])
            torch.cuda.empty_cache()
    for name, us in host_times(device):
        emit(host={name: us})


def nothing() -> dict[str, Any]:
    """What a worker has found at first."""
    return {"seconds": {}, "errors": {}, "host": {}, "info": {}}


def measure(found: dict[str, Any], keep: Callable[[], Any], environment: dict[str, str], *arguments: str) -> None:
    """Runs a worker to its end. `found` grows line by line, and is kept after each."""
    command = [sys.executable, "-m", "bench.gpu", "--worker", *arguments]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout or ():
            if not text.endswith("\n"):  # it died while it wrote
                break
            line = json.loads(text)
            if "name" in line:
                report.progress(line["name"])
                key, value = ("seconds", line["seconds"]) if "seconds" in line else ("errors", line["error"])
                found[key][line["name"]] = value
            else:
                for part, value in line.items():
                    found[part] |= value
            keep()
    report.progress("")
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")


# ---- the report


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """Of every case so far: time, rate, share and whether it is reached, the reference's time and the ratio."""
    ours, reference = result["project"]["seconds"], result.get("reference", {"seconds": {}})["seconds"]
    lines = []
    for name, case in result["cases"].items():
        if name not in ours:
            if name in result["project"]["errors"]:
                lines.append((name, f"failed: {result['project']['errors'][name]}", *[""] * 6))
            continue
        rate = case["bytes"] / ours[name] / 1e9
        of = ours.get(case["of"])  # not there yet, or failed
        if of and case["of"] == "copy":
            of *= case["bytes"] / result["cases"]["copy"]["bytes"]
        share = of / ours[name] if of else None
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
                "" if share is None else f"{share:.0%} of {case['of'].split()[0]}",
                ""
                if None in (case["reach"], share)
                else f"{case['reach']:.0%}: {'yes' if share >= case['reach'] else 'NO'}",
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
    for n, k in gpu_cases.SHAPES:
        times = [ours.get(f"gemm_4bit bf16 {n}x{k} M={m}") for m in gpu_cases.BATCHES if m <= 64]
        if all(times):
            worst = max(t / times[0] for m, t in zip(gpu_cases.BATCHES, times, strict=False) if m <= 48)
            lines.append(
                (f"{n}x{k}", *(f"{t / times[0]:.2f}" for t in times), f"{worst:.2f}: {'yes' if worst <= 1.3 else 'NO'}")
            )
    return lines


def markdown(result: dict[str, Any]) -> str:
    machine, host, seconds = result["machine"], result["project"]["host"], result["project"]["seconds"]
    copy = (
        f"{result['cases']['copy']['bytes'] / seconds['copy'] / 1e9:.0f} GB/s" if "copy" in seconds else "not measured"
    )
    parts = [
        f"# {machine['gpu']}",
        f"{machine['date']}, commit {machine['commit']}{', quick' if result['quick'] else ''}. {machine['sms']} "
        f"multiprocessors, {machine['l2_bytes'] >> 20} MiB of second-level cache, driver {machine['driver']}, torch "
        f"{result['project']['info'].get('torch', '?')}. Copy bandwidth, read and written: {copy}.",
        "From CUDA graphs, tensors rotated through more than the cache, fastest replay. GB/s counts what must move.",
        report.table(TITLES, rows(result)),
    ]
    if flat := flatness(result):
        titles = (
            "gemm_4bit, time over that of M=1",
            *(f"M={m}" for m in gpu_cases.BATCHES if m <= 64),
            "M <= 48 within 1.3",
        )
        parts.append(report.table(titles, flat))
    titles = ("host time of a call", "us", "to reach")
    host_rows = []
    for name, us in host.items():
        met = f"{HOST_LIMIT_US:g}: {'yes' if us <= HOST_LIMIT_US else 'NO'}" if name.startswith("Linear4bit") else ""
        host_rows.append((name, f"{us:.1f}", met))
    parts.append(report.table(titles, host_rows))
    if "reference" not in result:
        parts.append("The released package was not there to compare with.")
    if not result["finished"]:
        parts.append("**Not all cases: the run had not ended when this was written.**")
    return "\n\n".join(parts) + "\n"


def write(result: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Writes all that is known as JSON and as a table. Files from before are replaced at once, never in parts."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for suffix, text in ((".json", json.dumps(result, indent=1) + "\n"), (".md", markdown(result))):
        path = folder / (name + suffix)
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        part.replace(path)
        paths.append(path)
    return paths


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
        with contextlib.suppress(KeyboardInterrupt):  # the one that it works for says so
            worker(args.filter, 0.03 if args.quick else 0.2, args.limits)
        return

    begin = time.monotonic()
    cases = gpu_cases.all_cases()
    result: dict[str, Any] = {
        "machine": machine(),
        "filter": args.filter,
        "quick": args.quick,
        "finished": False,
        "cases": {c.name: {"bytes": c.bytes, "flops": c.flops, "of": c.of, "reach": c.reach} for c in cases},
    }
    options = [args.filter, *["--quick"] * args.quick]
    name = re.sub(r"[^a-z0-9]+", "-", f"{result['machine']['gpu']} {args.filter} {'quick' * args.quick}".lower())
    keep = functools.partial(write, result, args.results, name.strip("-"))
    try:
        result["project"] = nothing()
        measure(result["project"], keep, dict(os.environ), *options, "--limits")
        if args.reference:
            path = os.pathsep.join([str(args.reference.resolve()), os.environ.get("PYTHONPATH", "")])
            result["reference"] = nothing()
            measure(result["reference"], keep, {**os.environ, "PYTHONPATH": path}, *options)
        result["finished"] = True
    except KeyboardInterrupt:  # as by `timeout -s INT`
        raise SystemExit("bench.gpu: interrupted") from None
    finally:
        result["seconds_in_all"] = time.monotonic() - begin
        written = keep()
        print(markdown(result), *(f"wrote {os.path.relpath(path)}" for path in written), sep="\n")


if __name__ == "__main__":
    main()
