"""Fine-tune a real language model with 8-bit and with 32-bit optimizers, on the same batches, and compare.

SmolLM2-135M-Instruct (all of its 134.5M parameters, fp32, with products in bf16 through autocast) reads the Python
language reference, a new piece of it at each step. Writes training.md, a table, training.svg, the loss curves, and
training.json, the losses; after each training, with those that are in the folder already.

    .venv/bin/python examples/train.py [--steps 200] [--rules AdamW Lion] [--out FOLDER]      after ./dev test
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

import bitsandbytes as bnb
from bench import real_model
from bench.run import machine

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results"
BATCH, LENGTH = 1, 64  # sequences of so many tokens a step
WARMUP = 10  # steps to the full learning rate, from where it falls linearly to a tenth
FINAL = 20  # steps whose mean is the final loss
MB = 1e6
RULES: dict[str, dict[str, Any]] = {  # Lion's steps have the size of the rate in every element: a fifth of Adam's
    "AdamW": {"lr": 5e-5, "weight_decay": 0.01},
    "AdEMAMix": {"lr": 5e-5, "weight_decay": 0.01, "alpha": 5.0},
    "Lion": {"lr": 1e-5, "weight_decay": 0.05},
}
BITS = (32, 8)


@dataclass
class Run:
    """What one training gave."""

    rule: str
    bits: int
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)  # of the optimizer alone
    whole_ms: list[float] = field(default_factory=list)
    state_mb: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.rule}{self.bits}bit"

    @property
    def final(self) -> float:
        return statistics.fmean(self.losses[-FINAL:])


def batches(steps: int) -> Tensor:
    """[steps, BATCH, LENGTH] tokens of the language reference that ships with Python, in a fixed random order."""
    from pydoc_data.topics import topics

    prose = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    ids = real_model.tokenizer()(prose, return_tensors="pt", verbose=False).input_ids[0]
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    if len(rows) < steps * BATCH:
        raise SystemExit(f"--steps is {steps}, expected at most {len(rows) // BATCH}: there is no more text")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[order[: steps * BATCH]].view(steps, BATCH, LENGTH)


def rate(step: int, steps: int) -> float:
    """Share of the learning rate at a step."""
    return min((step + 1) / WARMUP, 1 - 0.9 * step / steps)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of all states, with their scales; tensors that parameters share count once."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def train(rule: str, bits: int, data: Tensor) -> Run:
    """From the original model on; tells how it goes every 20 steps."""
    run, steps = Run(rule, bits), len(data)
    model = real_model.load().float().train()
    options = RULES[rule] | ({"t_alpha": steps, "t_beta3": steps} if rule == "AdEMAMix" else {})
    optimizer = getattr(bnb.optim, run.name)(model.parameters(), **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    for ids in data:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        schedule.step()
        optimizer.zero_grad()
        run.losses.append(loss.item())
        run.step_ms.append((end - middle) * 1e3)
        run.whole_ms.append((time.perf_counter() - start) * 1e3)
        if len(run.losses) % FINAL == 0 or len(run.losses) == steps:
            print(f"{run.name} step {len(run.losses)}: loss {run.final:.4f}, {run.whole_ms[-1]:.0f} ms", flush=True)
    run.state_mb = state_bytes(optimizer) / MB
    return run


# ---- what is written


def table(runs: Sequence[Run]) -> str:
    wide = {run.rule: run for run in runs if run.bits == 32}
    lines = [
        "| Optimizer | first loss | final loss | / 32-bit | state MB | optimizer ms | whole step ms |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        first = statistics.fmean(run.losses[:FINAL])
        ratio = f"{run.final / wide[run.rule].final:.4f}" if run.rule in wide else ""
        lines.append(
            f"| {run.name} | {first:.4f} | {run.final:.4f} | {ratio} | {run.state_mb:.1f} | {min(run.step_ms):.1f}"
            f" | {min(run.whole_ms):.0f} |"
        )
    return "\n".join(lines)


def settings() -> str:
    """What the environment says about threads and the allocator."""
    found = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(("MALLOC_", "OMP_"))]
    return ", ".join(found) or "no settings of threads or the allocator"


def report(runs: Sequence[Run]) -> str:
    rules = dict.fromkeys(run.rule for run in runs)
    options = "\n".join(f"- {rule}: " + ", ".join(f"{k} {v}" for k, v in RULES[rule].items()) for rule in rules)
    return f"""# Fine-tuning SmolLM2-135M-Instruct with 8-bit and 32-bit optimizers

`python examples/train.py --steps {len(runs[0].losses)}`, {datetime.date.today()}, {machine()["cpu"]},
threads: {torch.get_num_threads()}, torch {torch.__version__}; {settings()}.

All parameters are trained, in fp32 with bf16 autocast; {BATCH} x {LENGTH} tokens a step, the same for every optimizer,
no piece of the text twice. States of 4096 elements and more have the bits of the class, also those of the embedding.
First and final loss: means of the first and the last {FINAL} steps. Times: of the fastest step. Options:

{options}

{table(runs)}

![Loss curves](training.svg)
"""


def smooth(losses: Sequence[float], width: int = 10) -> list[float]:
    return [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]


def plot(runs: Sequence[Run]) -> str:
    """One panel a rule, one curve for each number of bits: running means of 10 steps."""
    colours = {32: "#1f77b4", 8: "#d62728"}
    width, height, left, top = 300, 220, 50, 30
    rules = list(dict.fromkeys(run.rule for run in runs))
    curves = {run.name: smooth(run.losses) for run in runs}
    low, high = min(map(min, curves.values())), max(map(max, curves.values()))
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(rules) * (width + left) + 20}" height="{height + 70}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for panel, rule in enumerate(rules):
        x0 = left + panel * (width + left)
        out.append(f'<text x="{x0 + width / 2}" y="{top - 10}" text-anchor="middle">{rule}</text>')
        out.append(f'<rect x="{x0}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#888"/>')
        for part in range(5):
            y = top + height * part / 4
            out.append(f'<path d="M{x0} {y}h{width}" stroke="#ddd"/>')
            out.append(f'<text x="{x0 - 6}" y="{y + 4}" text-anchor="end">{high - (high - low) * part / 4:.2f}</text>')
        for number, run in enumerate(run for run in runs if run.rule == rule):
            curve, colour = curves[run.name], colours[run.bits]
            points = " ".join(
                f"{x0 + width * i / (len(curve) - 1):.1f},{top + height * (high - loss) / (high - low):.1f}"
                for i, loss in enumerate(curve)
            )
            dash = ' stroke-dasharray="5 3"' if run.bits == 8 else ""
            out.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
            label = f'x="{x0 + width - 8}" y="{top + 16 + 16 * number}" text-anchor="end" fill="{colour}"'
            out.append(f"<text {label}>{run.bits} bits: {run.final:.3f}</text>")
        steps = f"steps 1 to {len(runs[0].losses)}; loss, mean of 10 steps"
        out.append(f'<text x="{x0 + width / 2}" y="{top + height + 20}" text-anchor="middle">{steps}</text>')
    return "\n".join([*out, "</svg>\n"])


def write(folder: Path, run: Run) -> None:
    """Adds a run to those of as many steps that the folder has, and writes all of them."""
    path = folder / "training.json"
    runs = [Run(**entry) for entry in json.loads(path.read_text())] if path.exists() else []
    runs = [old for old in runs if old.name != run.name and len(old.losses) == len(run.losses)]
    runs = sorted([*runs, run], key=lambda r: (list(RULES).index(r.rule), -r.bits))
    path.write_text(json.dumps([rounded(asdict(r)) for r in runs]) + "\n")
    (folder / "training.md").write_text(report(runs))
    (folder / "training.svg").write_text(plot(runs))


def rounded(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: [round(x, 5) for x in value] if isinstance(value, list) else value for key, value in entry.items()}


def main() -> None:
    import transformers  # after real_model, which keeps it off the network

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.steps < 2:
        parser.error(f"--steps is {given.steps}, expected at least 2")
    transformers.utils.logging.disable_progress_bar()
    data = batches(given.steps)
    given.out.mkdir(parents=True, exist_ok=True)
    for rule in given.rules:
        for bits in BITS:
            write(given.out, train(rule, bits, data))
            gc.collect()  # a model refers to itself
    print(f"\n{(given.out / 'training.md').read_text()}")


if __name__ == "__main__":
    main()
