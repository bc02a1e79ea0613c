"""python -m bitsandbytes [--json]: versions, processor, libraries, GPUs, and whether each device computes rightly."""

import argparse
import importlib.metadata as importlib_metadata
import io
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .. import cextension as native
from ..cuda_specs import get_cuda_specs
from .checks import self_check
from .cuda import print_diagnostics, print_runtime_diagnostics
from .utils import print_header

_RELATED_PACKAGES = (
    *("accelerate", "diffusers", "numpy", "peft", "pip", "safetensors", "sentence-transformers", "transformers"),
    *("triton", "trl", "vllm"),
)
# What the instruction sets of the CPU library are made of, as Linux names it.
_CPU_FLAGS = (
    *("avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
    *("avx512_vbmi", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "amx_int8"),
)


def get_package_version(name: str) -> str:
    """Of an installed package, or "not found"."""
    try:
        return importlib_metadata.version(name)
    except importlib_metadata.PackageNotFoundError:
        return "not found"


def _cpu() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().partition("\n\n")[0].splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", "").split()
    try:
        active, supported = native.instruction_sets()
    except RuntimeError as error:
        active, supported = str(error), []
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
        "kernels": active,
        "kernels_that_run_here": supported,
    }


def _libraries() -> list[dict[str, Any]]:
    """Of each kind of device: where its library is looked for, and what came of it."""
    found = []
    for kind, lib in ((native.CPU, native.cpu_lib), (native.CUDA, native.cuda_lib)):
        reason = "not looked for: this torch has no CUDA" if lib is None else ""
        if isinstance(lib, native.ErrorHandlerMockBNBNativeLibrary):
            reason = lib.error_msg
        found.append({"device": kind.device_type, "path": str(kind.path), "loaded": not reason, "reason": reason})
    return found


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {
            "device": f"cuda:{i}",
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "memory_mb": p.total_memory >> 20,
        }
        for i, p in enumerate(properties)
    ]


def _devices() -> list[str]:
    """The devices that torch can use here; "cuda" stands for AMD GPUs too."""
    kinds = {"cuda": torch.cuda, "xpu": getattr(torch, "xpu", None), "mps": getattr(torch, "mps", None)}
    return ["cpu", *(name for name, kind in kinds.items() if kind is not None and kind.is_available())]


def collect() -> dict[str, Any]:
    """All that is shown, as JSON takes it. `ok`: every device that torch can use computes rightly."""
    checks = {device: self_check(device) for device in _devices()}
    failed = [f"{device}: {name}" for device, results in checks.items() for name, error in results.items() if error]
    libc = "-".join(part for part in platform.libc_ver() if part)
    return {
        "bitsandbytes": __version__,
        "ok": not failed,
        "failed": failed,
        "platform": platform.platform(),
        "libc": libc or None,
        "python": platform.python_version(),
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "xpu": getattr(torch.version, "xpu", None),
        },
        "packages": {name: get_package_version(name) for name in _RELATED_PACKAGES},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "libraries": _libraries(),
        "settings": {name: value for name, value in sorted(os.environ.items()) if name.startswith("BNB_")},
        "checks": checks,
    }


def show_environment() -> None:
    """Prints versions and the platform."""
    _show_environment(collect())


def _show_environment(facts: dict[str, Any]) -> None:
    print(f"Platform: {facts['platform']}")
    if facts["libc"]:
        print(f"  libc: {facts['libc']}")
    print(f"Python: {facts['python']}")
    print(f"PyTorch: {facts['torch']['version']}")
    for title, key in (("CUDA", "cuda"), ("HIP", "hip"), ("XPU", "xpu")):
        print(f"  {title}: {facts['torch'][key] or 'N/A'}")
    print("Related packages:")
    for name, version in facts["packages"].items():
        print(f"  {name}: {version}")


def _show(facts: dict[str, Any]) -> None:
    print_header(f"bitsandbytes v{facts['bitsandbytes']}")
    _show_environment(facts)
    cpu = facts["cpu"]
    print(f"CPU: {cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads of torch")
    print(f"  features: {' '.join(cpu['flags']) or 'none that the kernels use'}")
    print(f"  kernels in use: {cpu['kernels']} (run here: {', '.join(cpu['kernels_that_run_here']) or 'none'})")
    for gpu in facts["gpus"]:
        print(f"{gpu['device']}: {gpu['name']}, capability {gpu['capability']}, {gpu['memory_mb']} MB")
    if specs := get_cuda_specs():
        print_diagnostics(specs)
        print_runtime_diagnostics()
    print("Libraries:")
    for library in facts["libraries"]:
        print(f"  {library['path']}: {'loaded' if library['loaded'] else library['reason']}")
    for name, value in facts["settings"].items():
        print(f"{name}={value}")
    print_header("self-check")
    for device, results in facts["checks"].items():
        for name, error in results.items():
            print(f"{device}: {name}: {error or 'ok'}")
    print_header("")
    if facts["ok"]:
        print(f"SUCCESS! bitsandbytes computes rightly on {', '.join(facts['checks'])}.")
    else:
        print(f"FAILURE: {len(facts['failed'])} checks failed ({', '.join(facts['failed'])}); see above for why.")


def sanity_check() -> None:
    """Raises RuntimeError if a device that torch can use fails its self-check."""
    failed = {device: {k: v for k, v in self_check(device).items() if v} for device in _devices()}
    if any(failed.values()):
        raise RuntimeError(f"sanity_check: {failed}")


def main(argv: list[str] | None = None) -> None:
    """Prints the diagnostics; ends with exit status 1 if a check failed, 2 for unknown arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m bitsandbytes", description="Shows what is installed here and checks whether it works."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    given = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and settings may be in no encoding
    facts = collect()
    if given.json:
        print(json.dumps(facts, indent=2))
    else:
        _show(facts)
    if not facts["ok"]:
        sys.exit(1)
