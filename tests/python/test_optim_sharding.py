"""Sharded optimizers: a run of 4 ranks goes on with 1, 2, 8 or without sharding, and takes the same step bit by bit."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sharding_worker as worker
import torch

import bitsandbytes as bnb
from bitsandbytes.optim._place import Place
from bitsandbytes.optim._sharding import cut

WORKER = Path(__file__).parent / "sharding_worker.py"
FIRST, LATER = 4, (1, 2, 8)
FULLY_SHARDED = [name for name, case in worker.CASES.items() if case.shard in (worker.fsdp2, worker.hybrid)]


def torchrun(ranks: int, *arguments: str) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(WORKER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*run, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each number of ranks made of each case."""
    directory = tmp_path_factory.mktemp("runs")
    torchrun(FIRST, "save", str(directory), *worker.CASES)
    for ranks in LATER:
        torchrun(ranks, "continue", str(directory), *worker.CASES)
    return directory


def leaves(x: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(x, dict):
        for key, value in x.items():
            yield from leaves(value, f"{at}.{key}")
    elif isinstance(x, list | tuple):
        for i, value in enumerate(x):
            yield from leaves(value, f"{at}[{i}]")
    else:
        yield at, x


def is_equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def differences(a: Any, b: Any) -> set[str]:
    a, b = dict(leaves(a)), dict(leaves(b))
    return {key for key in a.keys() | b.keys() if key not in a or key not in b or not is_equal(a[key], b[key])}


@pytest.mark.parametrize("ranks", LATER)
@pytest.mark.parametrize("file", ["{}.pt", "{}-from-whole.pt"], ids=["sharded", "whole"])
@pytest.mark.parametrize("name", worker.CASES)
def test_next_step_is_that_of_4_ranks(runs: Path, name: str, file: str, ranks: int) -> None:
    expected = torch.load(runs / name / f"{FIRST}.pt", weights_only=True)
    assert differences(torch.load(runs / name / file.format(ranks), weights_only=True), expected) == set()
    before = torch.load(runs / name / "whole.pt", weights_only=True)
    assert differences(before, expected) >= {f".model.{key}" for key in before["model"]}


@pytest.mark.parametrize("name", FULLY_SHARDED)
def test_next_step_without_sharding_is_that_of_4_ranks(runs: Path, name: str) -> None:
    case = worker.CASES[name]
    model = worker.make_model(case.dtype, case.outputs)
    optimizer = case.optimize(model)
    worker.load(model, optimizer, torch.load(runs / name / "whole.pt", weights_only=True), None)
    for p, g in zip(model.parameters(), worker.whole_gradients(case).parameters(), strict=True):
        p.grad = g.detach()
    optimizer.step()
    optimizer.zero_grad()
    found = worker.states(model, optimizer)
    assert differences(found, torch.load(runs / name / f"{FIRST}.pt", weights_only=True)) == set()


def test_codes_and_both_kinds_of_blocks_took_part(runs: Path) -> None:
    saved = torch.load(runs / "adamw8bit" / "4.pt", weights_only=True)["optimizer"]["state"]
    states = {name: entry["__bnb_optimizer_quant_state__"] for name, entry in saved.items()}
    assert {name: entry["state1"].dtype for name, entry in states.items()} == {
        **dict.fromkeys(("0.weight", "2.weight", "2.bias", "4.weight"), torch.uint8),
        **dict.fromkeys(("0.bias", "4.bias"), torch.float32),
    }
    assert all(entry["absmax2"].min() > 0 for entry in states.values() if "absmax2" in entry)


def test_what_needs_blocks_or_norms_is_refused_for_columns_and_shards(tmp_path: Path) -> None:
    torchrun(2, "refuse", str(tmp_path))
    found = torch.load(tmp_path / "refused.pt", weights_only=True)
    assert found["columns"].startswith(
        "NotImplementedError: AdamW8bit: a sharded parameter of 2048 elements is not cut"
    )
    assert found["trust"].startswith(
        "NotImplementedError: LAMB8bit: a sharded parameter of 2257 elements has max_unorm"
    )
    assert "has a gradient on some ranks only" in found["one_sided"]
    p = torch.nn.Parameter(torch.ones(64, 64))  # 32 bits need no blocks
    p.grad = torch.ones_like(p)
    optimizer = bnb.optim.AdEMAMix32bit([p])
    optimizer.step()
    assert torch.equal(found["p"], p)
    assert torch.equal(found["state1"], optimizer.state[p]["state1"])


def test_bodies_and_pieces_are_the_part() -> None:
    chosen = random.Random(3)
    for _ in range(300):
        size = chosen.choice((1, 255, 256, 257, 1000, 5000))
        starts = tuple(sorted([0, *(chosen.randrange(size + 1) for _ in range(chosen.randrange(7)))]))
        for rank in range(len(starts)):
            place = Place(size, rank, starts)
            bodies, pieces = cut(0, place, True)
            ranges = sorted([(b.begin, b.end) for b in bodies] + [(x.begin, x.end) for x in pieces])
            assert [i for begin, end in ranges for i in range(begin, end)] == list(range(place.stop - place.start))
            assert all((place.start + b.begin) % 256 == 0 for b in bodies)
            assert all(x.block in place.cut_blocks for x in pieces)
            assert all((place.start + x.begin) // 256 == (place.start + x.end - 1) // 256 == x.block for x in pieces)
