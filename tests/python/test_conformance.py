"""The published vectors, against this package and the released one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "conformance" / "check_vectors.py"


@pytest.mark.parametrize("which", ["this", "released"])
def test_vectors(which: str, request: pytest.FixtureRequest) -> None:
    command, env = [sys.executable, str(SCRIPT)], dict(os.environ)
    if which == "released":
        command = [request.getfixturevalue("reference_python"), str(SCRIPT), "--released"]
        env.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 16 and all(line.endswith(": ok") for line in lines), (
        done.stdout + done.stderr
    )
