"""Small helpers for callers that hand tensors to native code."""

import contextlib
import ctypes as ct
from collections.abc import Callable, Iterable

import torch

from .. import _checks as check


def _get_tensor_stream(tensor: torch.Tensor) -> ct.c_void_p:
    """Address of the current stream of the tensor's GPU, or of the current GPU for a tensor on the CPU.

    Raises:
        RuntimeError: there is no GPU.
    """
    check.tensor("_get_tensor_stream", "tensor", tensor)
    if not torch.cuda.is_available():
        raise RuntimeError(f"_get_tensor_stream: tensor is on {tensor.device} and there is no CUDA GPU, expected one")
    index = torch.cuda.current_device() if tensor.device.index is None else tensor.device.index
    return ct.c_void_p(torch.cuda.current_stream(index).cuda_stream)


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


def _cuda_device_of(a: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the GPU of a tensor the current one."""
    return torch.cuda.device_of(a)


def has_avx512bf16() -> bool:
    """Whether this CPU multiplies bf16 in AVX-512 registers."""
    return torch.cpu._is_avx512_bf16_supported()


_ELEMENTWISE: dict[tuple[str, torch.dtype], Callable[..., object]] = {
    ("fill", torch.float32): lambda A, B, value: A.fill_(value),
    ("fill", torch.uint8): lambda A, B, value: A.fill_(value),
    ("arange", torch.float32): lambda A, B, value: A.copy_(torch.arange(A.numel(), device=A.device).view(A.shape)),
    ("_mul", torch.float32): lambda A, B, value: A.mul_(B),
}


@torch.no_grad()
def elementwise_func(
    func_name: str, A: torch.Tensor, B: torch.Tensor | None, value: float, prefetch: bool = True
) -> None:
    """Changes A in place: "fill" with the value (fp32, uint8), "arange" with 0, 1, 2, .., "_mul" times B (fp32).

    Returns after a GPU has done it if A or B is paged. `prefetch` is accepted for compatibility.

    Raises:
        NotImplementedError: another name, or another dtype of A.
    """
    function = _ELEMENTWISE.get((func_name, A.dtype))
    if function is None:
        raise NotImplementedError(f"Function not implemented: {func_name} of {A.dtype}")
    function(A, B, value)
    if getattr(A, "is_paged", False) or getattr(B, "is_paged", False):
        torch.cuda.synchronize()


def fill(A: torch.Tensor, value: float, device: torch.device | None = None, prefetch: bool = True) -> None:
    """elementwise_func("fill"): makes all elements of A the value."""
    elementwise_func("fill", A, None, value)


def _mul(A: torch.Tensor, B: torch.Tensor, device: torch.device | None = None) -> None:
    """elementwise_func("_mul"): A *= B."""
    elementwise_func("_mul", A, B, 0)
