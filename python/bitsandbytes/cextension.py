"""Finds and loads the native libraries, one for each kind of device, which register their kernels with torch."""

import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ._ops import SCHEMAS

PACKAGE_DIR = Path(__file__).parent

HIP_ENVIRONMENT = False
ROCM_GPU_ARCH = "unknown"
ROCM_WARP_SIZE_64 = False


@dataclass(frozen=True)
class Native:
    """A kind of device that has a native library."""

    device_type: str  # of torch
    title: str
    advice: str

    @property
    def key(self) -> str:
        """Its dispatch key."""
        return self.device_type.upper()

    @property
    def path(self) -> Path:
        """BNB_<KEY>_LIBRARY, or the library beside this file."""
        named = os.environ.get(f"BNB_{self.key}_LIBRARY")
        return Path(named) if named else PACKAGE_DIR / f"libbitsandbytes_{self.device_type}.so"

    def missing(self) -> list[str]:
        """Operators that have no kernel for this kind of device."""
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        return [name for name in SCHEMAS if not has_kernel(f"bitsandbytes::{name}", self.key)]


CPU = Native("cpu", "the CPU", "reinstalling bitsandbytes for this platform and version of torch may help")
CUDA = Native("cuda", "CUDA devices", "building bitsandbytes with COMPUTE_BACKEND=cuda gives it one")


class BNBNativeLibrary:
    """The loaded library; its kernels are reached through torch.ops.bitsandbytes."""

    compiled_with_cuda = False  # or with another library beside it that is

    def __init__(self, path: Path) -> None:
        self.path = path
        torch.ops.load_library(path)


class ErrorHandlerMockBNBNativeLibrary:
    """Stands for a library that could not be loaded: any use raises one sentence that says why."""

    compiled_with_cuda = False

    def __init__(self, error_msg: str) -> None:
        self.error_msg = error_msg

    def fail(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(self.error_msg)

    def __getattr__(self, name: str) -> NoReturn:
        raise RuntimeError(self.error_msg)


def get_native_library(native: Native) -> BNBNativeLibrary | ErrorHandlerMockBNBNativeLibrary:
    """The loaded library, if it has a kernel for every operator, else one that only raises.

    Warns in the latter case, unless it is the library of a GPU that is not there: then there may be no GPU either.
    """
    path = native.path
    reason = "there is no such file"
    if found := path.is_file():
        try:
            _check_complete(path)
            library = BNBNativeLibrary(path)
            if not (missing := native.missing()):
                return library
            reason = f"it has no kernel for {', '.join(missing)}"
        except OSError as error:
            reason = str(error)
    message = (
        f"bitsandbytes cannot run on {native.title} because its native library {path} is not usable ({reason}); "
        f"{native.advice}."
    )
    if found or native is CPU:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return ErrorHandlerMockBNBNativeLibrary(message)


def _check_complete(path: Path) -> None:
    """Refuses a file that ends before its section headers do: mapping it would kill the process."""
    with path.open("rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        raise OSError("it is not a shared library")
    (sections,) = struct.unpack_from("<Q", header, 40)
    entry, count = struct.unpack_from("<HH", header, 58)
    if sections + entry * count > size:
        raise OSError(f"it ends at byte {size} of {sections + entry * count}")


lib = get_native_library(CPU)
# Loading it neither needs a driver nor looks for a GPU.
cuda_lib = get_native_library(CUDA) if torch.version.cuda else None
lib.compiled_with_cuda = isinstance(cuda_lib, BNBNativeLibrary)
BNB_BACKEND = "CUDA" if lib.compiled_with_cuda else "CPU"
