"""Makes the calls BEGIN to END of a seed in this process, which a wrong kernel may end.

    python fuzz_worker.py SEED BEGIN END [--show]

Writes the number of a call to the file --progress before making it. Prints a line of JSON for each wrong outcome, and a
summary.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import resource
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from fuzz_calls import Call, GuardedMemory, make_call, targets
from reference import raw
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

# Arguments that a call may write to, where they are not those of most.
OUTPUTS = {
    "functional.int8_double_quant": ("col_stats", "row_stats", "out_col", "out_row"),
    "functional.elementwise_func": ("A",),
    "functional.fill": ("A",),
    "functional._mul": ("A",),
}
STEPPED = ("p", "state1", "state2", "absmax1", "absmax2", "unorm", "unorm_vec", "clock")  # by optimizers

MEMORY = 4 << 30  # bytes beyond what the process has at the start
SECONDS = 60  # for one call

# What a wrong argument may raise; AttributeError where no tensor was given at all. Others are accidents of the library,
# and end this process.
EXPECTED = (TypeError, ValueError, RuntimeError, NotImplementedError, MemoryError, OverflowError, AttributeError)
ACCIDENTS = re.compile(r"INTERNAL ASSERT|to unpack|list index|std::|vector::|_M_")


def limit_memory() -> None:
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors_of(v)]
    return []


def shapes(value: Any) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype) for t in tensors_of(value)]


def comparable(t: torch.Tensor) -> bool:
    return t.layout == torch.strided and t.device.type == "cpu" and t.numel() < 1 << 20


def outcome(call: Call) -> tuple[str, str | None]:
    """("returned" or the exception, what is wrong with it)."""
    arguments = call.arguments
    name = call.target.name
    written = STEPPED if "optimizer" in name else OUTPUTS.get(name, ("out", "absmax"))
    inputs = {
        f"{k}{i}": v
        for k, value in arguments.items()
        for i, v in zip([""] if isinstance(value, torch.Tensor) else itertools.count(), tensors_of(value), strict=False)
        if comparable(v) and k not in written
    }
    before = {k: raw(v).copy() for k, v in inputs.items()}
    try:
        result = call.target.call(**arguments)
    except EXPECTED as error:
        if isinstance(error, RecursionError) or ACCIDENTS.search(str(error)):
            return type(error).__name__, f"{type(error).__name__}: {error}"[:300]
        named = len(call.spoilt) == 1 and re.search(rf"\b{call.spoilt[0]}\b", str(error)) is not None
        return ("named" if named else "unnamed") if len(call.spoilt) == 1 else type(error).__name__, None
    for name, t in inputs.items():
        if (raw(t) != before[name]).any():
            return "returned", f"{name} was changed"
    return "returned", wrong_result(call, result)


def wrong_result(call: Call, result: Any) -> str | None:
    """An operator's result must have the shapes and types that its fake gives."""
    if call.target.overload is None:
        return None
    given = [t for v in call.arguments.values() for t in tensors_of(v)]
    if any(v.layout != torch.strided or v.is_meta for v in given):
        return None
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value.detach(), static_shapes=True)
        return [fake(v) for v in value] if isinstance(value, list) else value

    arguments = {k: fake(v) for k, v in call.arguments.items()}
    try:
        with mode:
            expected = call.target.call(**arguments)
    except (ValueError, RuntimeError, TypeError) as error:
        return f"the kernel took what the fake refuses: {error}"[:300]
    if not same_shapes(shapes(result), shapes(expected)):
        return f"returned {shapes(result)}, the fake says {shapes(expected)}"
    return None


def same_shapes(given: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> bool:
    """A size that depends on the data is a symbol to the fake, and may be any."""
    return len(given) == len(expected) and all(
        dtype == wanted
        and len(shape) == len(sizes)
        and all(isinstance(b, torch.SymInt) or a == b for a, b in zip(shape, sizes, strict=True))
        for (shape, dtype), (sizes, wanted) in zip(given, expected, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", type=int)
    parser.add_argument("begin", type=int)
    parser.add_argument("end", type=int)
    parser.add_argument("--progress", type=Path)
    parser.add_argument("--show", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    all_targets, guarded = targets(), GuardedMemory()
    limit_memory()
    counts: collections.Counter[str] = collections.Counter()
    progress = options.progress.open("wb", buffering=0) if options.progress else None
    for index in range(options.begin, options.end):
        if progress:
            progress.seek(0)
            progress.write(b"%20d" % index)
        call = make_call(options.seed, index, all_targets, guarded)
        if options.show:
            print(index, call, flush=True)
        signal.alarm(SECONDS)  # ends the process: a kernel that hangs does not look at Python's handlers
        kind, problem = outcome(call)
        signal.alarm(0)
        counts[kind] += 1
        if options.show:
            print("   ", kind, problem, flush=True)
        if problem:
            print(json.dumps({"index": index, "problem": problem, "call": str(call)[:1500]}), flush=True)
    print(json.dumps({"summary": counts, "targets": len(all_targets)}), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
