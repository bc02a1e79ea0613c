"""Finds and loads the native library, which registers the CPU kernels with torch."""

import os
import struct
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

from ._ops import SCHEMAS

PACKAGE_DIR = Path(__file__).parent
LIBRARY_NAME = "libbitsandbytes_cpu.so"

BNB_BACKEND = "CPU"
HIP_ENVIRONMENT = False
ROCM_GPU_ARCH = "unknown"
ROCM_WARP_SIZE_64 = False


class BNBNativeLibrary:
    """The loaded library; its kernels are reached through torch.ops.bitsandbytes."""

    compiled_with_cuda = False

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


def library_path() -> Path:
    """BNB_CPU_LIBRARY, or the library beside this file."""
    return Path(os.environ.get("BNB_CPU_LIBRARY") or PACKAGE_DIR / LIBRARY_NAME)


def get_native_library() -> BNBNativeLibrary | ErrorHandlerMockBNBNativeLibrary:
    """The loaded library, if it has a CPU kernel for every operator; else, after a warning, one that only raises."""
    path = library_path()
    reason = "there is no such file"
    if path.is_file():
        try:
            _check_complete(path)
            library = BNBNativeLibrary(path)
            if not (missing := without_kernel()):
                return library
            reason = f"it has no kernel for {', '.join(missing)}"
        except OSError as error:
            reason = str(error)
    message = (
        f"bitsandbytes cannot run on the CPU because its native library {path} is not usable ({reason}); "
        "reinstalling bitsandbytes for this platform and version of torch may help."
    )
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


def without_kernel() -> list[str]:
    """Operators that have no CPU kernel."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return [name for name in SCHEMAS if not has_kernel(f"bitsandbytes::{name}", "CPU")]


lib = get_native_library()
