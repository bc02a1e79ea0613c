"""One package in a process of its own, told what to run line by line: JSON requests on stdin, JSON answers on stdout.

do=info                             versions of the package and what it runs on
do=open  case=name                  prepares the data of a case
do=round case=name threads=n seconds=s   {"best": seconds of the fastest call, "calls": how many}
do=close                            drops the data of all open cases
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from typing import Any

import numpy
import torch

import bitsandbytes
from bench.cases import BY_NAME, Call

BATCH_SECONDS = 2e-4  # short calls are timed in batches of this length, for the clock costs as much as they do
MIN_BATCHES = 2


def info() -> dict[str, Any]:
    return {
        "bitsandbytes": importlib.metadata.version("bitsandbytes"),
        "path": os.path.dirname(bitsandbytes.__file__),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def batch_size(call: Call) -> int:
    size = 1
    while True:
        start = time.perf_counter()
        for _ in range(size):
            call()
        if time.perf_counter() - start > BATCH_SECONDS or size >= 1024:
            return size
        size *= 2


def run_round(call: Call, size: int, seconds: float) -> dict[str, float]:
    """The fastest batch, per call, within `seconds` (and at least MIN_BATCHES)."""
    call()  # back into the cache, threads awake
    best, batches, end = float("inf"), 0, time.perf_counter() + seconds
    while batches < MIN_BATCHES or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(size):
            call()
        best = min(best, time.perf_counter() - start)
        batches += 1
    return {"best": best / size, "calls": batches * size}


def main() -> None:
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a package prints goes to stderr
    opened: dict[str, Call] = {}
    sizes: dict[tuple[str, int], int] = {}
    for line in requests:
        request = json.loads(line)
        answer: dict[str, Any] = {}
        match request["do"]:
            case "info":
                answer = info()
            case "open":
                opened[request["case"]] = BY_NAME[request["case"]].make()
            case "round":
                name, threads = request["case"], request["threads"]
                torch.set_num_threads(threads)
                with torch.inference_mode(BY_NAME[name].inference):
                    if (name, threads) not in sizes:
                        opened[name]()
                        sizes[name, threads] = batch_size(opened[name])
                    answer = run_round(opened[name], sizes[name, threads], request["seconds"])
            case "close":
                opened.clear()
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
