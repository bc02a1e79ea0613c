"""A fresh interpreter, for what is decided once in a process: import, the native library, the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

QUANTIZE_ONE = "import torch, bitsandbytes.functional as F; F.quantize_4bit(torch.ones(64))"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code`, which may import the package under test and the modules of this folder. PYTHONPATH goes in front."""
    path = [environment.pop("PYTHONPATH", ""), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_reference(python: str, code: str, *arguments: str) -> str:
    """Runs `code` with the released package, and returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    check = "import bitsandbytes, sys; assert bitsandbytes.__version__ == '0.50.2', bitsandbytes.__version__\n"
    run = subprocess.run(
        [python, "-c", check + code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
