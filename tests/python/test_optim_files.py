"""States of optimizers in memory-mapped files: the same bits, no more memory than the limit, nothing left behind."""

import io
import os
from pathlib import Path

import pytest
import torch
from process import run_python

import bitsandbytes as bnb
from bitsandbytes.optim._file_states import files_of

MIB = 1 << 20


def parameters(count: int = 6, size: int = 5000) -> list[torch.nn.Parameter]:
    g = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(size, generator=g)) for _ in range(count)]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int) -> None:
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()


@pytest.mark.parametrize("limit", (0, 25_000, 1 << 40))
@pytest.mark.parametrize("kind", (bnb.optim.AdamW8bit, bnb.optim.AdEMAMix32bit, bnb.optim.Lion8bit))
def test_bits_are_those_of_states_in_memory(kind: type, limit: int, tmp_path: Path) -> None:
    inside, outside = parameters(), parameters()
    reference, optimizer = kind(inside), kind(outside)
    optimizer.keep_states_in_files(limit, str(tmp_path))
    train(reference, inside, 3)
    train(optimizer, outside, 3)
    assert os.listdir(tmp_path) == []  # no names
    assert any(files_of(optimizer.state[p]) for p in outside) == (limit < 1 << 40)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    again = kind(parameters())
    again.keep_states_in_files(limit, str(tmp_path))
    again.load_state_dict(torch.load(saved, weights_only=True))
    for p, q, r in zip(inside, outside, again.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        for key, value in reference.state[p].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(optimizer.state[q][key]))
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again.state[r][key]))


def test_it_is_asked_for_before_the_first_step(tmp_path: Path) -> None:
    params = parameters()
    optimizer = bnb.optim.AdamW8bit(params)
    with pytest.raises(ValueError, match="keep_states_in_files: limit has -1 bytes, expected at least 0"):
        optimizer.keep_states_in_files(-1)
    train(optimizer, params, 1)
    with pytest.raises(RuntimeError, match="there are states in memory, expected a call before the first step"):
        optimizer.keep_states_in_files(0, str(tmp_path))


GROWTH = """
import torch, bitsandbytes as bnb
MIB = 1 << 20
def of(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))
params = [torch.nn.Parameter(torch.ones(MIB)) for _ in range(20)]  # 160 MiB of states
for p in params:
    p.grad = torch.full_like(p, 0.5)
optimizer = bnb.optim.AdamW32bit(params)
optimizer.keep_states_in_files(LIMIT, DIRECTORY)
open("/proc/self/clear_refs", "w").write("5")  # what follows is the most since now
before = of("VmRSS")
for _ in range(3):
    optimizer.step()
print((of("VmHWM") - before) // MIB, sum(p.detach().double().sum().item() for p in params))
"""


def test_memory_stays_at_the_limit_with_five_times_the_states(tmp_path: Path) -> None:
    limit = 32
    grown, sums = [], set()
    for allowed in (limit * MIB, 1 << 40):
        code = GROWTH.replace("DIRECTORY", repr(str(tmp_path))).replace("LIMIT", str(allowed))
        run = run_python(code)
        assert run.returncode == 0, run.stderr
        mib, total = run.stdout.split()
        grown.append(int(mib))
        sums.add(total)
    assert grown[0] < 2.5 * limit < 4.5 * limit < grown[1]  # the limit in memory, and one file of that size mapped
    assert len(sums) == 1


FULL = """
import resource, torch, bitsandbytes as bnb
params = [torch.nn.Parameter(torch.ones(1 << 20)) for _ in range(2)]
optimizer = bnb.optim.AdamW32bit([{"params": [p]} for p in params])
optimizer.keep_states_in_files(8 << 20, DIRECTORY)
for p in params:
    p.grad = torch.ones_like(p)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
try:
    optimizer.step()
except OSError as error:
    print(error)
assert all(bool((p == 1).all()) for p in params)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
optimizer.step()
assert all(bool((p < 1).all()) for p in params)
assert [optimizer.state[p]["step"] for p in params] == [1, 1]
"""


def test_a_full_disk_is_told_before_anything_changes(tmp_path: Path) -> None:
    run = run_python(FULL.replace("DIRECTORY", repr(str(tmp_path))))
    assert run.returncode == 0, run.stderr
    assert f"keep_states_in_files: directory {tmp_path} has no room for a file of 8388608 bytes" in run.stdout


FORKED = """
import os, sys, torch, bitsandbytes as bnb

def parameters():
    torch.manual_seed(1)
    return [torch.nn.Parameter(torch.randn(5000)) for _ in range(4)]

def steps(optimizer, count, first=0):
    for t in range(first, first + count):
        torch.manual_seed(t)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(5000)
        optimizer.step()

def in_child(f):
    child = os.fork()
    if child == 0:
        try:
            f()
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def bytes_of(optimizer):
    return [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]

torch.set_num_threads(1)
reference, optimizer = bnb.optim.AdamW8bit(parameters()), bnb.optim.AdamW8bit(parameters())
optimizer.keep_states_in_files(0, DIRECTORY)
steps(reference, 2), steps(optimizer, 2)
before = bytes_of(optimizer)

def child_steps():  # as its parent would
    steps(reference, 3, 2), steps(optimizer, 3, 2)
    assert all(map(torch.equal, bytes_of(reference), bytes_of(optimizer)))
    assert in_child(lambda: steps(optimizer, 1, 9)) == 0
    assert all(map(torch.equal, bytes_of(reference), bytes_of(optimizer)))

def child_writes():
    for state in optimizer.state.values():
        state["state1"].zero_()

def child_loads():
    optimizer.load_state_dict(optimizer.state_dict())
    steps(optimizer, 2, 7)

for f in (child_steps, child_writes, child_loads):
    assert in_child(f) == 0, f
    assert all(map(torch.equal, before, bytes_of(optimizer))), f

read, write = os.pipe()
child = os.fork()
if child == 0:
    os.read(read, 1)
    try:
        steps(optimizer, 1)
    except RuntimeError as error:
        os._exit(7 if "which has stepped since" in str(error) else 8)
    os._exit(9)
steps(reference, 2, 2), steps(optimizer, 2, 2)
os.write(write, b"x")
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert all(map(torch.equal, bytes_of(reference), bytes_of(optimizer)))
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_forked_child_does_not_change_its_parent(tmp_path: Path) -> None:
    run = run_python(FORKED.replace("DIRECTORY", repr(str(tmp_path))))
    assert run.returncode == 0 and run.stdout == "done\n", run.stderr
