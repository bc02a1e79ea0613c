"""A fresh interpreter, for what is decided once in a process: import, the native library, the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

QUANTIZE_ONE = "import torch, bitsandbytes.functional as F; F.quantize_4bit(torch.ones(64))"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `code`, which may import the package under test and the modules of this folder; PYTHONPATH is put in front."""
    path = [environment.pop("PYTHONPATH", ""), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
