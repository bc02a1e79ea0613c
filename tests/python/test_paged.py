"""Paged memory where there is no GPU: what is said, and what needs none."""

from __future__ import annotations

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.cextension import BNB_BACKEND


@pytest.mark.skipif(BNB_BACKEND == "CUDA", reason="there is a library for CUDA")
def test_without_cuda_it_is_refused_in_one_sentence() -> None:
    for call in (lambda: F.get_paged(3, 4), lambda: F.get_paged(2, dtype=torch.uint8, device=torch.device("cpu"))):
        with pytest.raises(RuntimeError, match=r"^get_paged: paged memory needs CUDA, and this torch has no CUDA$"):
            call()


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"get_paged: shape is \(3, -1\), expected sizes of 0 or more"):
        F.get_paged(3, -1)
    with pytest.raises(
        ValueError, match="prefetch_tensor: A is a tensor of torch's own memory, expected one from get_"
    ):
        F.prefetch_tensor(torch.ones(3))
    with pytest.raises(TypeError, match=r"prefetch_tensor: A is list, expected a torch\.Tensor"):
        F.prefetch_tensor([1.0])


def test_managers_have_one_instance() -> None:
    for manager in (F.GlobalPageManager, F.CUBLAS_Context):
        assert manager.get_instance() is manager.get_instance()
        with pytest.raises(RuntimeError, match=r"Call get_instance\(\) instead"):
            manager()
    assert F.GlobalPageManager.get_instance() is not F.CUBLAS_Context.get_instance()
    F.GlobalPageManager.get_instance().prefetch_all()


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion", "AdEMAMix"])
def test_on_the_cpu_paged_optimizers_are_the_plain_ones(name: str) -> None:
    start = torch.randn(400, 300)
    plain, paged = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    for p, optimizer in ((plain, f"{name}"), (paged, f"Paged{name}")):
        own = getattr(bnb.optim, optimizer)([p])
        for t in range(3):
            torch.manual_seed(t)
            p.grad = torch.randn_like(p)
            own.step()
        own.prefetch_state(p)
        assert not any(getattr(value, "is_paged", False) for value in own.state[p].values())
    assert torch.equal(plain, paged)
