"""./dev bench: the project and the released package, interleaved, case by case, from the table in bench/cases.py.

Both run in long-lived processes of their own. For each case they take turns, and the best of all turns counts, so that
noise of the machine hits both alike. The limits of the machine are measured in the same run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import cases, report
from bench.cases import Case

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Side:
    """One package: how to start it, and its worker once started."""

    title: str
    python: str
    env: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), **self.env}

    def ask(self, **request: Any) -> dict[str, Any]:
        if self.process is None:
            command = [self.python, "-m", "bench.worker"]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                command, env=self.environment(), cwd=ROOT, stdin=pipe, stdout=pipe, text=True
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker of {self.title} died with status {self.process.wait()} at {request}")
        return json.loads(line)

    def run(self, *arguments: str) -> str:
        command = [self.python, *arguments]
        done = subprocess.run(command, env=self.environment(), cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.title}: {' '.join(command)} failed\n{done.stderr}")
        return done.stdout

    def stop(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()


@dataclass(frozen=True)
class Effort:
    rounds: int
    single_rounds: int
    seconds: float
    models: int
    imports: int


FULL = Effort(rounds=10, single_rounds=4, seconds=0.15, models=3, imports=7)
QUICK = Effort(rounds=3, single_rounds=2, seconds=0.05, models=1, imports=3)


def best_of_turns(runs: list[tuple[Side, str]], threads: int, rounds: int, seconds: float) -> list[float]:
    """Seconds of the fastest call of each run; they take turns, and who begins changes from round to round."""
    best = [float("inf")] * len(runs)
    for r in range(rounds):
        order = range(len(runs)) if r % 2 == 0 else reversed(range(len(runs)))
        for i in order:
            side, name = runs[i]
            best[i] = min(best[i], side.ask(do="round", case=name, threads=threads, seconds=seconds)["best"])
            time.sleep(0.002)  # lets the threads of the other process go to sleep
    return best


def measure(case: Case, ours: Side, reference: Side, cores: int, effort: Effort, isa: str | None) -> dict[str, Any]:
    runs = [(ours, case.versus), (ours, case.name)] if case.versus else [(ours, case.name), (reference, case.name)]
    for side, name in runs:
        side.ask(do="open", case=name)
    times = {cores: best_of_turns(runs, cores, effort.rounds, effort.seconds)}
    if cores > 1:
        times[1] = best_of_turns(runs, 1, effort.single_rounds, effort.seconds)
    for side in (ours, reference):
        side.ask(do="close")
    reach = case.reach if isa is None or case.versus else cases.ISA_REACH.get(case.family) if isa == "avx2" else None
    return {
        "name": case.name,
        "versus": case.versus,
        "bound": case.bound,
        "bytes": case.bytes,
        "flops": case.flops,
        "reach": reach,
        "seconds": {str(threads): {"ours": t[0], "reference": t[1]} for threads, t in times.items()},
        "ratio": {str(threads): t[1] / t[0] for threads, t in times.items()},
    }


def measure_import(ours: Side, reference: Side, effort: Effort) -> dict[str, Any]:
    seconds = {"ours": float("inf"), "reference": float("inf")}
    for _ in range(effort.imports):
        for key, side in (("ours", ours), ("reference", reference)):
            seconds[key] = min(seconds[key], float(side.run("-c", cases.IMPORT_CODE)))
    return {"seconds": seconds, "limit_s": cases.IMPORT_LIMIT_S}


def measure_model(mode: str, ours: Side, reference: Side, effort: Effort) -> dict[str, Any]:
    """Best of the runs for each figure; each run is a fresh process."""
    steps = [f.key for f in cases.MODEL_FIGURES if f.key not in ("load", "mb", "rss")]
    found: dict[str, dict[str, float]] = {"ours": {}, "reference": {}}
    for _ in range(effort.models):
        for key, side in (("ours", ours), ("reference", reference)):
            figures: dict[str, float] = {}
            for line in side.run("-m", "bench.real_model", mode, *steps).splitlines():
                figures |= json.loads(line)
            for f in cases.MODEL_FIGURES:
                better = max if f.more_is_better else min
                found[key][f.key] = better(found[key].get(f.key, figures[f.key]), figures[f.key])
    return {"name": f"model {mode}", "mode": mode, "figures": found}


def machine() -> dict[str, Any]:
    text = Path("/proc/cpuinfo").read_text()

    def entry(key: str) -> str:
        found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
        return found[1] if found else ""

    flags = set(entry("flags").split())
    wanted = (
        "avx2",
        "fma",
        "avx_vnni",
        "avx512f",
        "avx512bw",
        "avx512_vbmi",
        "avx512vbmi",
        "avx512_vnni",
        "avx512_bf16",
        "amx_bf16",
        "amx_int8",
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "cpu": f"{entry('model name')} (family {entry('cpu family')}, model {entry('model')})",
        "isa": [flag for flag in wanted if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def measure_limits(program: str, cores: int, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the machine can do: the best of now and of what is known from before."""
    counts = map(str, sorted({1, cores}))
    found = json.loads(subprocess.run([program, *counts], stdout=subprocess.PIPE, check=True).stdout)
    for threads, figures in (known or {"threads": {}})["threads"].items():
        for key, value in figures.items():
            found["threads"][threads][key] = max(value, found["threads"][threads][key])
    return found


def chosen(pattern: str, name: str) -> bool:
    return re.search(pattern, name, re.IGNORECASE) is not None


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "filter", nargs="?", default="", help="regular expression: only the cases whose name it is found in"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds; for orientation")
    parser.add_argument(
        "--isa", choices=cases.ISA_ENV, help="compare the project under BNB_FORCE_ISA=ISA with the project as it is"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--project", default=sys.executable, help=argparse.SUPPRESS)
    parser.add_argument("--reference", default=sys.executable, help=argparse.SUPPRESS)
    parser.add_argument("--limits", default="build/release/bnb_limits", help=argparse.SUPPRESS)
    parser.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="where the JSON and the table go"
    )
    args = parser.parse_args()

    picked = [case for case in cases.CASES if chosen(args.filter, case.name)]
    models = [mode for mode in cases.MODEL_MODES if chosen(args.filter, f"model {mode}")]
    with_import = chosen(args.filter, cases.IMPORT_NAME)
    if args.list or not (picked or models or with_import):
        names = [
            *(case.name for case in cases.CASES),
            *(f"model {mode}" for mode in cases.MODEL_MODES),
            cases.IMPORT_NAME,
        ]
        print("\n".join(names))
        raise SystemExit(None if args.list else f"no case matches {args.filter!r}")

    if args.isa:
        ours, reference = (
            Side(args.isa, args.project, {"BNB_FORCE_ISA": args.isa, **cases.ISA_ENV[args.isa]}),
            Side("best isa", args.project),
        )
    else:
        ours, reference = Side("project", args.project), Side("reference", args.reference)
    effort = QUICK if args.quick else FULL
    result: dict[str, Any] = {
        "machine": machine(),
        "titles": [ours.title, reference.title],
        "filter": args.filter,
        "quick": args.quick,
    }
    cores = result["machine"]["cores"]
    print("measuring the limits of the machine", flush=True)
    result["limits"] = measure_limits(args.limits, cores)
    result["packages"] = {side.title: side.ask(do="info") for side in (ours, reference)}
    print(report.header(result), flush=True)

    result["cases"] = []
    begin = time.monotonic()
    if picked:
        print(report.case_line(None, result))
    for number, case in enumerate(picked, 1):
        report.progress(f"[{number}/{len(picked)}] {case.name}  ({time.monotonic() - begin:.0f} s)")
        result["cases"].append(measure(case, ours, reference, cores, effort, args.isa))
        report.progress("")
        print(report.case_line(result["cases"][-1], result), flush=True)
    for side in (ours, reference):
        side.stop()
    result["limits"] = measure_limits(
        args.limits, cores, result["limits"]
    )  # so that one noisy moment does not set them
    if with_import:
        report.progress(cases.IMPORT_NAME)
        result["import"] = measure_import(ours, reference, effort)
        report.progress("")
        print(report.import_line(result["import"]), flush=True)
    if models:  # the conversion must not count towards the memory of the first run
        ours.run("-c", "from bench import real_model; real_model.model_path()")
    result["models"] = []
    for mode in models:
        report.progress(f"the real model in {mode}")
        result["models"].append(measure_model(mode, ours, reference, effort))
        report.progress("")
        print("\n".join(report.model_lines(result["models"][-1])), flush=True)

    result["seconds_in_all"] = time.monotonic() - begin
    for path in report.write(result, args.results, args.isa):
        print(f"wrote {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
