"""Quantize a real language model to int8 and NF4 with unmodified transformers, and compare both with the bf16 original.

Run it with ``./dev demo``. Each model lives in a process of its own, so that load time and memory are its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import real_model

MODES = {"bf16": "bf16", "int8": "int8", "nf4": "NF4"}
STEPS = {
    "load": "loading",
    "prefill": "reading a prompt of 1024 tokens",
    "decode": "writing 64 tokens",
    "perplexity": "measuring perplexity on 4096 tokens of real text",
    "sample": "answering a question",
    "rss": "done",
}
ROWS = (
    ("mb", "model MB", "{:,.1f}"),
    ("load", "load time s", "{:,.2f}"),
    ("perplexity", "perplexity", "{:,.2f}"),
    ("decode", "decode tokens/s", "{:,.1f}"),
    ("prefill", "prefill tokens/s", "{:,.0f}"),
    ("rss", "peak memory MB", "{:,.0f}"),
)


class Progress:
    """One line that is rewritten on a terminal; a line each elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()

    def show(self, message: str) -> None:
        print(f"\r\033[K{message}" if self.terminal else message, end="" if self.terminal else "\n", flush=True)

    def clear(self) -> None:
        if self.terminal:
            print("\r\033[K", end="", flush=True)


def measure(mode: str, progress: Progress) -> dict[str, Any]:
    """Runs bench.real_model on `mode` and gathers the figures as they come."""
    names, begin = list(STEPS), time.perf_counter()
    figures: dict[str, Any] = {}
    command = [sys.executable, "-m", "bench.real_model", mode, *(step for step in STEPS if step in real_model.STEPS)]
    folder = Path(real_model.__file__).parent.parent
    progress.show(f"{MODES[mode]}: {STEPS['load']}")
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            figures |= json.loads(line)
            following = names[names.index(next(k for k in names if k in json.loads(line))) + 1 :]
            if following and following[0] != "rss":
                progress.show(f"{MODES[mode]}: {STEPS[following[0]]}  ({time.perf_counter() - begin:.0f} s)")
    progress.clear()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return figures


def main() -> None:
    progress = Progress()
    begin = time.perf_counter()
    if not real_model.is_cached():
        progress.show(f"first run: converting SmolLM2-135M-Instruct to bf16 safetensors in {real_model.cache_dir()}")
        real_model.model_path()
        progress.clear()
    result = {mode: measure(mode, progress) for mode in MODES}

    print("\nSmolLM2-135M-Instruct, as loaded by transformers' from_pretrained\n")
    print(f"{'':18}" + "".join(f"{title:>12}" for title in MODES.values()))
    for key, title, form in ROWS:
        print(f"{title:18}" + "".join(f"{form.format(result[mode][key]):>12}" for mode in MODES))
    print(f"\n> {real_model.PROMPT}")
    for mode, title in MODES.items():
        print(f"\n{title}:")
        print(textwrap.fill(result[mode]["sample"], 100, initial_indent="  ", subsequent_indent="  "))
    print(f"\n{time.perf_counter() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
