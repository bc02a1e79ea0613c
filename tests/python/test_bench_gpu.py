"""The GPU benchmark's cases and report, without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import gpu, gpu_cases

CPU = torch.device("cpu")
CASES = {c.name: c for c in gpu_cases.all_cases()}


def result(**slower: float) -> dict[str, Any]:
    """As if every case ran at 1 TB/s, but for those given, which take that many times as long."""
    times = {name: c.bytes / 1e12 * slower.get(name, 1) for name, c in CASES.items()}
    return {
        "machine": {"gpu": "Some GPU", "date": "now", "commit": "abc", "sms": 1, "l2_bytes": 1 << 20, "driver": "1"},
        "cases": {n: {"bytes": c.bytes, "flops": c.flops, "of": c.of, "reach": c.reach} for n, c in CASES.items()},
        "project": {"seconds": times, "errors": {}, "host": {"Linear4bit": 9.0}, "info": {"torch": "2"}},
        "quick": False,
        "finished": True,
    }


def test_every_case_runs_and_moves_what_it_says() -> None:
    cases = [
        gpu_cases.copy_case(1 << 10),
        *gpu_cases.block_cases(1 << 12),
        *gpu_cases.product_cases(((64, 512),), (1, 3)),
    ]
    cases += gpu_cases.int8_cases(((64, 512),), (1, 3, 512), 32)
    for case in cases:
        tensors = case.make(CPU)
        out = case.call(*tensors)
        moved = {t.data_ptr(): t.numel() * t.element_size() for t in tensors if t.numel() not in (1, 256)}
        results = out if isinstance(out, tuple) else (out,)
        moved |= {t.data_ptr(): t.numel() * t.element_size() for t in results if t is not None}
        assert sum(moved.values()) == case.bytes, case.name
    assert len({case.name for case in cases}) == len(cases)


def test_optimizer_cases_change_what_they_say() -> None:
    """g, p, then codes, absmax and map or a plain state: all but g and maps are read and written."""
    for case in gpu_cases.optimizer_cases(1 << 13, 5):
        tensors = case.make(CPU)
        before = [t.clone() for t in tensors]
        case.call(*tensors)
        bytes_of = [t.numel() * t.element_size() for t in tensors]
        changed = [not torch.equal(t, b) for t, b in zip(tensors, before, strict=True)]
        maps = [t.numel() == 256 and t.dtype == torch.float32 and len(t) > 0 and t[-1] == 1 for t in tensors]
        gradients = [i for i, (c, m) in enumerate(zip(changed, maps, strict=True)) if not c and not m]
        assert len(gradients) == (5 if "5 tensors" in case.name else 1), case.name
        moved = sum(2 * b for b, c in zip(bytes_of, changed, strict=True) if c) + sum(bytes_of[i] for i in gradients)
        assert moved == case.bytes, case.name


def test_cases_are_those_of_the_table() -> None:
    for n, k in gpu_cases.SHAPES:
        for m in gpu_cases.BATCHES:
            assert CASES[f"gemm_4bit bf16 {n}x{k} M={m}"].flops == 2 * m * n * k
    for case in CASES.values():
        assert case.of == "copy" or case.of in CASES


def test_rows_state_share_and_whether_it_is_reached() -> None:
    found = {row[0]: row for row in gpu.rows(result(**{"quantize_4bit nf4 bf16": 2}))}
    assert found["quantize_4bit nf4 bf16"][2:5] == ("500", "50% of copy", "85%: NO")
    assert found["dequantize_4bit nf4 bf16"][2:5] == ("1000", "100% of copy", "88%: yes")
    large = found["gemm_4bit bf16 4096x4096 M=512"]
    assert large[3].endswith("of torch.matmul") and large[4] == "85%: yes" and float(large[5]) > 1


def test_small_batches_are_held_against_one_row() -> None:
    (first, *_) = gpu.flatness(result(**{"gemm_4bit bf16 4096x4096 M=48": 1.5}))
    assert first[0] == "4096x4096" and first[1] == "1.00" and first[-1].endswith("NO")


def test_the_report_names_what_failed_and_what_was_not_there() -> None:
    given = result()
    del given["project"]["seconds"]["quantize_4bit nf4 bf16"]
    given["project"]["errors"]["quantize_4bit nf4 bf16"] = "no kernel"
    text = gpu.markdown(given)
    assert "| quantize_4bit nf4 bf16 | failed: no kernel |" in text
    assert "| Linear4bit | 9.0 | 8: NO |" in text and "released package was not there" in text


def test_tensors_are_rotated_through_more_than_the_cache() -> None:
    for case in CASES.values():
        count = gpu.copies_of(case, 60 << 20)
        assert count >= 3 and (count == 64 or count * case.bytes >= 3 * (60 << 20))


def test_what_matters_most_is_measured_first() -> None:
    names = list(CASES)
    assert names[:3] == ["copy", "torch.matmul bf16 4096x14336 M=1", "gemm_4bit bf16 4096x14336 M=1"]
    first = {start: min(i for i, n in enumerate(names) if n.startswith(start)) for start in ("quantize", "dequantize")}
    products = [i for i, n in enumerate(names) if n.startswith("gemm_4bit bf16") and n.endswith((" M=8", " M=512"))]
    assert len(products) == 8 and max(products) < first["quantize"] < first["dequantize"]
    assert first["dequantize"] < names.index("adam 8-bit bf16") < names.index("gemm_4bit bf16 4096x4096 M=2")
    plain = [gpu_cases.copy_case(), *gpu_cases.block_cases(), *gpu_cases.product_cases(), *gpu_cases.int8_cases()]
    assert sorted(names) == sorted(c.name for c in (*plain, *gpu_cases.optimizer_cases()))


def test_a_report_can_be_written_after_each_case() -> None:
    given = result()
    times, given["project"] = given["project"]["seconds"], gpu.nothing()
    given["finished"] = False
    for name, seconds in ((None, 0.0), *times.items()):
        if name is not None:
            given["project"]["seconds"][name] = seconds
        text = gpu.markdown(given)
        assert name is None or f"| {name} | {seconds * 1e6:.1f} |" in text
        assert "Not all cases" in text
    failed = result()
    del failed["project"]["seconds"]["copy"]
    failed["project"]["errors"]["copy"] = "no memory"
    assert "not measured" in gpu.markdown(failed)


INTERRUPTED = """
import sys, torch
torch.cuda.is_available = lambda: True
from bench import gpu
sys.executable, sys.argv[1:] = sys.argv[1], ["--results", sys.argv[2]]
gpu.machine = lambda: dict(gpu="Some GPU", date="now", commit="abc", sms=1, l2_bytes=1 << 20, driver="1")
gpu.main()
"""
WORKER = r"""#!/bin/sh
echo '{"info": {"torch": "2"}}'
echo '{"name": "copy", "seconds": 0.001}'
echo '{"name": "quantize_4bit nf4 bf16", "seconds": 0.001}'
printf '{"name": "dequan'
exec sleep 60
"""


def test_a_time_out_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    """As `timeout -s INT` ends it: with status 1, and with files of all cases that had ended."""
    worker, path = tmp_path / "worker", tmp_path / "some-gpu.json"
    worker.write_text(WORKER)
    worker.chmod(0o755)
    command = [sys.executable, "-c", INTERRUPTED, str(worker), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(gpu.ROOT), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        until = time.monotonic() + 120
        while not (path.exists() and "quantize_4bit nf4 bf16" in json.loads(path.read_text())["project"]["seconds"]):
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    found = json.loads(path.read_text())
    assert list(found["project"]["seconds"]) == ["copy", "quantize_4bit nf4 bf16"] and not found["finished"]
    table = path.with_suffix(".md").read_text()
    assert "| quantize_4bit nf4 bf16 | 1000.0 |" in table and table in printed
    assert not list(tmp_path.glob("*.part"))


def test_failures_of_a_run_that_is_cut_short_are_in_a_file(tmp_path: Path) -> None:
    """What `./dev gpu` runs with `-p report_failures` dies here without a word after its first failure."""
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_a(): pass\ndef test_b(): assert 6 * 7 == 41\ndef test_c(): os._exit(3)\n"
    )
    failures = tmp_path / "failures.log"
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "BNB_FAILURES": str(failures)}
    options = ["-p", "no:cacheprovider", "-p", "report_failures", "--rootdir", str(tmp_path), "-c", os.devnull]
    command = [sys.executable, "-m", "pytest", *options, "-q", str(tmp_path)]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode == 3
    text = failures.read_text()
    assert (
        text.startswith("==== test_it.py::test_b, call\n") and "assert (6 * 7) == 41" in text and "test_a" not in text
    )
