"""Small helpers for callers that hand tensors to native code."""

import ctypes as ct
from collections.abc import Iterable

import torch


def is_on_gpu(tensors: Iterable[torch.Tensor | None]) -> bool:
    """True if all tensors are on one device; None and tensors with `is_paged` count for any device.

    Raises:
        RuntimeError: tensors on different devices, which are listed.
    """
    placed = [t for t in tensors if t is not None and not getattr(t, "is_paged", False)]
    if len({t.device for t in placed}) > 1:
        found = ", ".join(f"{tuple(t.shape)} on {t.device}" for t in placed)
        raise RuntimeError(f"is_on_gpu: tensors are {found}, expected one device for all")
    return True


def get_ptr(A: torch.Tensor | None) -> ct.c_void_p | None:
    """Address of the first element of a tensor, for calls through ctypes; None for None."""
    return None if A is None else ct.c_void_p(A.data_ptr())


def has_avx512bf16() -> bool:
    """Whether this CPU multiplies bf16 in AVX-512 registers."""
    return torch.cpu._is_avx512_bf16_supported()
