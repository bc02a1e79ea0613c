"""States of parameters on the CPU in memory-mapped files, so that there may be more of them than memory."""

import ctypes
import errno
import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_FILE_SIZE = 1 << 28  # of files for several states
_PAGE = mmap.PAGESIZE
_FILES: Any = WeakTensorKeyDictionary()  # of tensors
_ALIVE: Any = weakref.WeakSet()  # all files
_MAP_FIXED = 0x10
_NEVER = 1 << 62


class _Steps:
    """How many steps with states in its files a process has taken, in memory that its children share."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, _PAGE)

    @property
    def value(self) -> int:
        return int.from_bytes(self.memory[:8], "little")

    def count(self) -> None:
        self.memory[:8] = (self.value + 1).to_bytes(8, "little")


_STEPS = _Steps()


def _libc() -> Any:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    return library


def _part_all() -> None:
    global _STEPS
    _STEPS = _Steps()  # of this process
    for file in list(_ALIVE):
        file.part_from_parent()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_part_all)


class MappedFile:
    """A file without a name, in memory: gone with the last tensor in it, also after a crash.

    A forked process has the same memory as its parent until one of them writes: nothing that a child writes reaches
    its parent. With its first step a child takes a copy, in memory, which is refused if the parent has stepped since.
    """

    def __init__(self, directory: str, size: int) -> None:
        with tempfile.TemporaryFile(dir=directory) as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError as error:
                what = f"keep_states_in_files: directory {directory} has no room for a file of {size} bytes"
                raise OSError(
                    error.errno or errno.ENOSPC, f"{what} ({error.strerror}), expected one that has"
                ) from error
            self.memory = mmap.mmap(file.fileno(), size)
            self.descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        self.size, self.used = size, 0
        self.steps, self.forked_at = _STEPS, -1  # of the parent; below 0 in the process that made the file
        self.copied = False
        _ALIVE.add(self)

    def has(self, size: int) -> bool:
        return self.forked_at < 0 and self.used + size <= self.size

    def part_from_parent(self) -> None:
        """In a forked child: maps the file again, in the same place, for this process alone."""
        if self.forked_at >= 0:
            return  # a child's child copies what the child has
        memory = (ctypes.c_char * self.size).from_buffer(self.memory)
        flags = mmap.MAP_PRIVATE | _MAP_FIXED
        place = _libc().mmap(
            ctypes.addressof(memory), self.size, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.descriptor, 0
        )
        self.forked_at = self.steps.value if place == ctypes.addressof(memory) else _NEVER

    def begin_step(self) -> None:
        """To be called before the states in the file are stepped.

        Raises:
            RuntimeError: this is a forked child, and its parent has stepped since.
        """
        if self.forked_at < 0:
            self.steps.count()
        if self.forked_at < 0 or self.copied:
            return
        if self.forked_at == self.steps.value:
            torch.frombuffer(self.memory, dtype=torch.uint8)[::_PAGE].add_(0)  # written, so copied
            self.copied = self.forked_at == self.steps.value
        if not self.copied:
            raise RuntimeError(
                "optimizer step: states in files are those of the process that this one was forked from, which has "
                "stepped since, expected a step before that, or states loaded with load_state_dict"
            )

    def zeros(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        n = math.prod(shape)
        flat: Any = torch.frombuffer(self.memory, dtype=dtype, count=n, offset=self.used)
        self.used += -(-n * dtype.itemsize // _PAGE) * _PAGE
        x = flat.as_strided(shape, stride)
        _FILES[x] = self
        return x

    def release(self) -> None:
        """Lets the memory go until it is needed again. The file keeps what is in it."""
        if hasattr(mmap, "MADV_DONTNEED") and self.forked_at < 0:
            self.memory.madvise(mmap.MADV_DONTNEED)


class FileStates:
    """Gives states memory up to a limit, and then files."""

    def __init__(self, limit: int, directory: str) -> None:
        self.limit, self.directory, self.in_memory = limit, directory, 0
        self.file: MappedFile | None = None  # the last

    def zeros(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size == 0 or self.in_memory + size <= self.limit:
            x = torch.empty_strided(shape, stride, dtype=dtype).zero_()
            self.in_memory += size
            weakref.finalize(x, self._freed, size).atexit = False
            return x
        if self.file is None or not self.file.has(size):
            pages = -(-max(size, min(self.limit, _FILE_SIZE)) // _PAGE)
            self.file = MappedFile(self.directory, pages * _PAGE)
        return self.file.zeros(shape, stride, dtype)

    def _freed(self, size: int) -> None:
        self.in_memory -= size


def files_of(state: dict[str, Any]) -> list[MappedFile]:
    """The files in which a parameter's states are."""
    found = (_FILES.get(state[key]) for key in ("state1", "state2") if key in state)
    return [x for x in found if x is not None]
