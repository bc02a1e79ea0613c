"""States of parameters on the CPU in memory-mapped files, so that there may be more of them than memory."""

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


class MappedFile:
    """A file without a name, in memory: gone with the last tensor in it, also after a crash."""

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
        self.size, self.used = size, 0

    def has(self, size: int) -> bool:
        return self.used + size <= self.size

    def zeros(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        n = math.prod(shape)
        flat: Any = torch.frombuffer(self.memory, dtype=dtype, count=n, offset=self.used)
        self.used += -(-n * dtype.itemsize // _PAGE) * _PAGE
        x = flat.as_strided(shape, stride)
        _FILES[x] = self
        return x

    def release(self) -> None:
        """Lets the memory go until it is needed again. The file keeps what is in it."""
        if hasattr(mmap, "MADV_DONTNEED"):
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
