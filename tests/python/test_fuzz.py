"""Wrong calls: none ends the process, hangs, takes much memory, writes to its inputs or contradicts its fake.

BNB_FUZZ_CALLS calls (3,000 by default; 20,000 before a release) of BNB_FUZZ_SEED.
To see call N: python tests/python/fuzz_worker.py SEED N N+1 --show
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz_calls import targets
from test_ops import registered

import bitsandbytes as bnb
import bitsandbytes.functional as F

ops = torch.ops.bitsandbytes
WORKER = Path(__file__).parent / "fuzz_worker.py"
CALLS = int(os.environ.get("BNB_FUZZ_CALLS", "3000"))
SEED = int(os.environ.get("BNB_FUZZ_SEED", "1"))


def run_calls(
    seed: int, begin: int, end: int, folder: Path, prologue: str = "", most: int = 20
) -> tuple[list[str], dict[str, int]]:
    """Failures, about `most`, and counts of outcomes. If a worker dies, its call has failed; another goes on."""
    failures, counts = [], {}
    progress = folder / "progress"
    code = f"import sys; sys.path.insert(0, {str(WORKER.parent)!r})\n{prologue}\nimport fuzz_worker; fuzz_worker.main()"
    while begin < end and len(failures) < most:
        progress.write_text(f"{begin:20}")
        arguments = [sys.executable, "-c", code, str(seed), str(begin), str(end), "--progress", str(progress)]
        run = subprocess.run(arguments, capture_output=True, text=True, timeout=3600, check=False)
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        failures += [
            f"call {line['index']}: {line['problem']}\n    {line['call']}" for line in lines if "problem" in line
        ]
        for line in lines:
            for key, value in line.get("summary", {}).items():
                counts[key] = counts.get(key, 0) + value
        if run.returncode == 0:
            break
        last = int(progress.read_text())
        cause = (
            signal.Signals(-run.returncode).name
            if run.returncode < 0
            else f"exit status {run.returncode}\n{run.stderr[-1000:]}"
        )
        failures.append(f"call {last}: the process ended: {cause} (python {WORKER} {seed} {last} {last + 1} --show)")
        begin = last + 1
    return failures, counts


def test_wrong_calls(tmp_path: Path) -> None:
    failures, counts = run_calls(SEED, 0, CALLS, tmp_path)
    print(f"{CALLS} calls, seed {SEED}: {counts}")
    assert not failures, "\n".join(failures)
    assert sum(counts.values()) == CALLS
    assert counts["returned"] > CALLS // 20, "right calls must be among them, and succeed"
    assert counts["named"] > 2 * counts["unnamed"], "messages name the wrong argument"


def test_targets_are_discovered() -> None:
    names = {t.name for t in targets()}
    assert set(registered()) <= names
    assert {"functional.quantize_4bit", "functional.matmul_4bit", "functional.create_dynamic_map"} <= names


BAD_OPERATOR = """
import bitsandbytes, ctypes, torch
torch.library.define("bitsandbytes::bad", "(Tensor A) -> Tensor")
@torch.library.impl("bitsandbytes::bad", "CPU")
def bad(A):
    {body}
    return A.clone()
torch.library.register_fake("bitsandbytes::bad")(lambda A: A.new_empty(A.shape))
"""
BAD_BODIES = {
    "reads behind the end": ("ctypes.string_at(A.data_ptr(), A.numel() * 4 + 1)", "SIGSEGV|SIGBUS"),
    "kills the process": ("import os; os.abort()", "SIGABRT"),
    "returns another shape": ("return torch.zeros(3, 3, 3, 3)", "the fake says"),
    "raises an accident": ("raise SystemError('internal')", "SystemError"),
    "writes its input": ("A.add_(1)", "A was changed"),
}


@pytest.mark.parametrize("body", BAD_BODIES)
def test_the_fuzzer_finds(body: str, tmp_path: Path) -> None:
    """An operator that is wrong in this way is found within 120 calls."""
    code, found = BAD_BODIES[body]
    failures, _ = run_calls(SEED, 0, 120, tmp_path, BAD_OPERATOR.format(body=code), most=1)
    assert failures and re.search(found, failures[0]), failures


# ---- every message names the operator, the argument, what was given and what is allowed


def w() -> torch.Tensor:
    return torch.ones(2, 64)


def packed() -> torch.Tensor:
    return torch.zeros(64, 1, dtype=torch.uint8)


def code8() -> torch.Tensor:
    return F.create_dynamic_map()


U8, F32 = torch.uint8, torch.float32
MESSAGES: list[tuple[str, str, Any]] = [
    ("A", "float64", lambda: ops.quantize_4bit(w().double(), 64, "nf4", U8)),
    ("A", "int", lambda: ops.quantize_4bit(w().int(), 64, "nf4", U8)),
    ("blocksize", "33", lambda: ops.quantize_4bit(w(), 33, "nf4", U8)),
    ("blocksize", "0", lambda: ops.quantize_4bit(w(), 0, "nf4", U8)),
    ("blocksize", "-64", lambda: ops.quantize_4bit(w(), -64, "nf4", U8)),
    ("blocksize", str(2**40), lambda: ops.quantize_4bit(w(), 2**40, "nf4", U8)),
    ("blocksize", "-8192", lambda: ops.quantize_blockwise(w(), code8(), -8192)),
    ("quant_type", "int4", lambda: ops.quantize_4bit(w(), 64, "int4", U8)),
    ("quant_type", "NF4", lambda: ops.dequantize_4bit(packed(), torch.ones(2), 64, "NF4", [2, 64], F32)),
    ("quant_storage", "bool", lambda: ops.quantize_4bit(w(), 64, "nf4", torch.bool)),
    ("absmax", "1", lambda: ops.dequantize_4bit(packed(), torch.ones(1), 64, "nf4", [2, 64], F32)),
    ("absmax", "float64", lambda: ops.dequantize_4bit(packed(), torch.ones(2).double(), 64, "nf4", [2, 64], F32)),
    ("A", "64", lambda: ops.dequantize_4bit(packed(), torch.ones(4), 64, "nf4", [4, 64], F32)),
    ("shape", "-1", lambda: ops.dequantize_4bit(packed(), torch.ones(2), 64, "nf4", [-1, 64], F32)),
    ("shape", str(2**62), lambda: ops.dequantize_4bit(packed(), torch.ones(2), 64, "nf4", [2**62, 8], F32)),
    ("dtype", "float64", lambda: ops.dequantize_4bit(packed(), torch.ones(2), 64, "nf4", [2, 64], torch.float64)),
    ("out", "", lambda: ops.dequantize_4bit.out(packed(), torch.ones(2), 64, "nf4", [2, 64], F32, torch.empty(3, 64))),
    ("out", "", lambda: ops.dequantize_4bit.out(packed(), torch.ones(2), 64, "nf4", [2, 64], F32, w().half())),
    ("code", "255", lambda: ops.quantize_blockwise(w(), code8()[1:], 64)),
    ("code", "", lambda: ops.quantize_blockwise(w(), code8().flip(0), 64)),
    ("code", "", lambda: ops.quantize_blockwise(w(), torch.full((256,), float("nan")), 64)),
    ("code", "float16", lambda: ops.quantize_blockwise(w(), code8().half(), 64)),
    ("A", "float32", lambda: ops.dequantize_blockwise(w(), torch.ones(2), code8(), 64, F32)),
    ("absmax", "1", lambda: ops.dequantize_blockwise(w().byte(), torch.ones(1), code8(), 64, F32)),
    ("A", "65", lambda: ops.gemm_4bit(torch.ones(1, 65), packed(), [2, 64], torch.ones(2), 64, "nf4")),
    ("A", "", lambda: ops.gemm_4bit(torch.tensor(1.0), packed(), [2, 64], torch.ones(2), 64, "nf4")),
    ("B", "64", lambda: ops.gemm_4bit(torch.ones(1, 64), packed(), [4, 64], torch.ones(4), 64, "nf4")),
    ("shapeB", "", lambda: ops.gemm_4bit(torch.ones(1, 64), packed(), [2, 64, 1], torch.ones(2), 64, "nf4")),
    ("shapeB", "", lambda: ops.gemm_4bit(torch.ones(1, 8), packed(), [2**62, 8], torch.ones(2), 64, "nf4")),
    ("bias", "3", lambda: ops.gemm_4bit(torch.ones(1, 64), packed(), [2, 64], torch.ones(2), 64, "nf4", torch.ones(3))),
    (
        "bias",
        "int64",
        lambda: ops.gemm_4bit(torch.ones(1, 64), packed(), [2, 64], torch.ones(2), 64, "nf4", torch.ones(2).long()),
    ),
    (
        "absmax_8bit",
        "",
        lambda: ops.gemm_4bit(
            torch.ones(1, 64), packed(), [2, 64], torch.ones(1), 64, "nf4", None, torch.ones(2).byte()
        ),
    ),
    ("code", "", lambda: ops.gemv_4bit(torch.ones(1, 64), packed(), [2, 64], torch.ones(2), torch.ones(16), 64)),
    ("A", "meta", lambda: ops.quantize_blockwise(w(), code8().to("meta"), 64)),
    ("quant_type", "int4", lambda: F.quantize_4bit(w(), quant_type="int4")),
    ("blocksize", "33", lambda: F.quantize_4bit(w(), blocksize=33)),
    ("A", "float64", lambda: F.quantize_4bit(w().double())),
    ("A", "list", lambda: F.quantize_4bit([1.0, 2.0])),
    ("out", "", lambda: F.quantize_4bit(w(), out=torch.empty(3, 1, dtype=U8))),
    ("absmax", "", lambda: F.quantize_4bit(w(), absmax=torch.empty(3))),
    ("quant_state", "", lambda: F.dequantize_4bit(packed())),
    ("absmax", "", lambda: F.dequantize_blockwise(packed())),
    ("code", "17", lambda: F.quantize_blockwise(w(), code=torch.ones(17))),
    ("state", "", lambda: F.gemv_4bit(torch.ones(1, 64), packed())),
    ("typename", "nf5", lambda: F.get_4bit_type("nf5")),
    ("blocksize", "128", lambda: F.get_4bit_type("af4", device="cpu", blocksize=128)),
    ("total_bits", str(2**40), lambda: F.create_dynamic_map(total_bits=2**40)),
    ("quant_type", "int4", lambda: bnb.nn.Linear4bit(64, 64, quant_type="int4")),
    ("quant_state", "", lambda: bnb.matmul_4bit(w(), packed(), None)),
    ("qs_dict", "", lambda: F.QuantState.from_dict({}, torch.device("cpu"))),
]


@pytest.mark.parametrize(("argument", "given", "call"), MESSAGES, ids=[f"{i}-{m[0]}" for i, m in enumerate(MESSAGES)])
def test_message_names_the_argument(argument: str, given: str, call: Any) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)) as raised:
        call()
    message = str(raised.value)
    assert re.search(rf"\b({argument}|code)\b" if given == "meta" else rf"\b{argument}\b", message), message
    assert given in message, message
    assert "\n" not in message.strip() and len(message) < 400, message
