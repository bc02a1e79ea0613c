"""Tensors in memory that a GPU shares with the CPU page by page, so that there may be more of it than the GPU has."""

import ctypes as ct
import functools
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks as check
from ..cextension import CUDA, CudaBNBNativeLibrary, cuda_lib, lib

FIRST_CUDA_DEVICE = torch.device("cuda", 0)


def _operators(op: str) -> Any:
    """The operators of the CUDA library, if it is there."""
    if isinstance(cuda_lib, CudaBNBNativeLibrary):
        return torch.ops.bitsandbytes
    reason = "this torch has no CUDA" if cuda_lib is None else f"{CUDA.path} is not usable"
    raise RuntimeError(f"{op}: paged memory needs CUDA, and {reason}")


class _Managed:
    """Managed memory, freed when the last tensor that shows it is gone. For torch.as_tensor it is bytes on a device."""

    def __init__(self, bytes_: int, device: int) -> None:
        operators = _operators("get_paged")
        address = operators.managed_allocate(bytes_, device)
        weakref.finalize(self, operators.managed_free, address).atexit = False  # the process gives it back
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (bytes_,), "typestr": "|u1", "version": 2}


def paged_strided(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """get_paged with these strides, which leave no gaps."""
    op = "get_paged"
    operators = _operators(op)
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"{op}: device is {device}, expected a CUDA device")
    index = torch.cuda.current_device() if device.index is None else device.index
    size = torch.Size(shape).numel() * dtype.itemsize
    if size:
        memory: Any = _Managed(size, index)
        flat = torch.as_tensor(memory, device=torch.device("cuda", index)).view(dtype)
        operators.managed_prefetch(flat, False)
        paged: Any = flat.zero_().as_strided(shape, stride)
    else:
        paged = torch.empty(tuple(shape), dtype=dtype, device=torch.device("cuda", index))
    paged.is_paged, paged.page_deviceid = True, index
    GlobalPageManager.get_instance().add(paged)
    return paged


def get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device = FIRST_CUDA_DEVICE) -> Tensor:
    """A tensor of zeros on a GPU whose pages wait in the memory of the CPU while the GPU has no room for them.

    It has the attributes `is_paged` and `page_deviceid`. Its memory is given back with the last tensor that shows it.

    Raises:
        RuntimeError: there is no CUDA, or no library for it.
        ValueError: a negative size, or a device that is no GPU.
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"get_paged: shape is {shape}, expected sizes of 0 or more")
    return paged_strided(shape, torch.empty(shape, device="meta").stride(), dtype, device)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def prefetch_tensor(A: Tensor, to_cpu: bool = False) -> None:
    """Starts moving the pages of a paged tensor to its GPU, or to the CPU, beside what the current stream does.

    Raises:
        ValueError, TypeError: A is no paged tensor.
    """
    op = "prefetch_tensor"
    check.tensor(op, "A", A)
    if not getattr(A, "is_paged", False):
        raise ValueError(f"{op}: A is a tensor of torch's own memory, expected one from get_paged")
    with torch.cuda.stream(_side_stream(A.get_device())):
        _operators(op).managed_prefetch(A, to_cpu)


class _Single:
    """A class with one instance, which get_instance() makes."""

    _instance: ClassVar[Any] = None

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    def initialize(self) -> None:
        """Sets the instance up."""

    @classmethod
    def get_instance(cls) -> Any:
        if cls._instance is None:
            instance = cls.__new__(cls)
            instance.initialize()
            cls._instance = instance
        return cls._instance


class GlobalPageManager(_Single):
    """Knows the paged tensors that are alive."""

    def initialize(self) -> None:
        self._references: list[weakref.ref[Tensor]] = []

    def add(self, tensor: Tensor) -> None:
        self._references = [r for r in self._references if r() is not None]
        self._references.append(weakref.ref(tensor))

    @property
    def paged_tensors(self) -> list[Tensor]:
        """Those alive, oldest first."""
        return [t for t in (r() for r in self._references) if t is not None]

    def prefetch_all(self, to_cpu: bool = False) -> None:
        """prefetch_tensor for all of them, the newest first."""
        for tensor in reversed(self.paged_tensors):
            prefetch_tensor(tensor, to_cpu)


class CUBLAS_Context(_Single):
    """Handles of cuBLAS, as torch has them."""

    def get_context(self, device: torch.device) -> ct.c_void_p:
        """That of a CUDA device and its current stream."""
        with torch.cuda.device(device):
            return ct.c_void_p(torch.cuda.current_blas_handle())


class Cusparse_Context(_Single):
    """A handle for the C functions that take one; they need none."""

    def initialize(self) -> None:
        self.context = ct.c_void_p(lib.get_cusparse())
