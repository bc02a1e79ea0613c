"""Paged memory and states in it on a CUDA GPU.

./dev gpu runs these last and in a process of their own: a GPU that pages is slow, and one that hangs takes what comes
after it along. Without a GPU they are skipped, as test_cuda is. What needs none is in test_paged.py.
"""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import reference as ref
import torch
from test_cuda import GPU, layer
from test_cuda_optim import check_captured_steps

import bitsandbytes as bnb
import bitsandbytes.functional as F


def test_paged_tensors() -> None:
    before = len(F.GlobalPageManager.get_instance().paged_tensors)
    for dtype in (*ref.FLOATS, torch.uint8):
        x = F.get_paged(300, 70, dtype=dtype, device=GPU)
        assert (x.shape, x.dtype, x.device, x.is_contiguous()) == ((300, 70), dtype, GPU, True)
        assert x.is_paged and x.page_deviceid == 0 and not x.any()
        x += 3
        F.prefetch_tensor(x, to_cpu=True)
        F.prefetch_tensor(x)
        assert (x.cpu() == 3).all()
    F.GlobalPageManager.get_instance().prefetch_all(to_cpu=True)
    assert F.get_paged(0, 4, device=GPU).shape == (0, 4)
    view = x[5:7]
    del x
    gc.collect()
    assert len(F.GlobalPageManager.get_instance().paged_tensors) == before and (view == 3).all()


def test_paged_memory_is_given_back() -> None:
    """Eight times 256 MiB, all of it written on the GPU and so in its memory: one of them is there at a time."""
    left = []
    for _ in range(8):
        x = F.get_paged(1 << 26, device=GPU)
        x[-1] = 1
        torch.cuda.synchronize()
        del x
        left.append(torch.cuda.mem_get_info(GPU)[0])
    assert left[0] - left[-1] < 512 << 20


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "Lion8bit", "AdEMAMix8bit"])
def test_paged_states_have_the_bytes_of_others(name: str) -> None:
    p = torch.randn(400, 300, device=GPU)
    plain, paged = torch.nn.Parameter(p.clone()), torch.nn.Parameter(p.clone())
    optimizers = getattr(bnb.optim, name)([plain]), getattr(bnb.optim, f"Paged{name}")([paged])
    for t in range(5):
        for x, optimizer in zip((plain, paged), optimizers, strict=True):
            torch.manual_seed(t)
            x.grad = torch.randn_like(x)
            optimizer.step()
    mine, other = (o.state[x] for o, x in zip(optimizers, (plain, paged), strict=True))
    assert other["state1"].is_paged and not hasattr(mine["state1"], "is_paged")
    assert torch.equal(plain, paged) and torch.equal(mine["state1"], other["state1"])
    saved = copy.deepcopy(optimizers[1].state_dict())
    optimizers[1].load_state_dict(saved)
    assert optimizers[1].state[paged]["state1"].is_paged
    assert torch.equal(optimizers[1].state[paged]["state1"], mine["state1"])


def test_a_captured_step_with_paged_states() -> None:
    check_captured_steps("PagedAdamW", width=2000)  # more than the 100,000 elements from which states are paged


def test_memory_is_freed_while_another_thread_captures() -> None:
    """A finalizer runs whenever Python wants; it must not end the capture that goes on."""
    linear, x = layer(64, 64, torch.bfloat16, nested=False), torch.randn(2, 64, device=GPU, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = linear(x)
        paged = [F.get_paged(1 << 12, device=GPU) for _ in range(2)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            free = threading.Thread(target=paged.clear)
            free.start()
            free.join()
            y = linear(x)
        graph.replay()
    assert not paged and torch.equal(y, expected)
