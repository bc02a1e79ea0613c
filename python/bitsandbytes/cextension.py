"""Finds and loads the native libraries, one for each kind of device.

Loading registers their kernels with torch. Their C functions, which have the names and arguments of the released
package's, are reached as `lib.name` and `lib["name"]`.
"""

import ctypes as ct
import logging
import os
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from ._ops import CPU_SCHEMAS, SCHEMAS
from .consts import DYNAMIC_LIBRARY_SUFFIX as DYNAMIC_LIBRARY_SUFFIX
from .consts import PACKAGE_DIR
from .cuda_specs import CUDASpecs
from .cuda_specs import get_cuda_specs as get_cuda_specs
from .cuda_specs import get_cuda_version_tuple as get_cuda_version_tuple
from .cuda_specs import get_rocm_gpu_arch as get_rocm_gpu_arch

logger = logging.getLogger(__name__)

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
        """BNB_<KEY>_LIBRARY, or the library beside this file; for CUDA that of BNB_CUDA_VERSION, if there is one."""
        if named := os.environ.get(f"BNB_{self.key}_LIBRARY"):
            return Path(named)
        version = os.environ.get("BNB_CUDA_VERSION", "") if self.key == "CUDA" else ""
        names = [f"libbitsandbytes_{self.device_type}{suffix}.so" for suffix in (version, "")]
        # An editable installation keeps the libraries in another folder of the package than the Python files.
        folders = sys.modules[__name__.rpartition(".")[0]].__path__
        paths = [Path(folder, name) for name in names for folder in folders]
        return next((path for path in paths if path.is_file()), PACKAGE_DIR / names[-1])

    def missing(self) -> list[str]:
        """Operators that have no kernel for this kind of device."""
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        names = [*SCHEMAS, *CPU_SCHEMAS] if self.device_type == "cpu" else SCHEMAS
        return [name for name in names if not has_kernel(f"bitsandbytes::{name}", self.key)]


CPU = Native("cpu", "the CPU", "reinstalling bitsandbytes for this platform and version of torch may help")
CUDA = Native("cuda", "CUDA devices", "building bitsandbytes with COMPUTE_BACKEND=cuda gives it one")


# ---- C functions

_LETTERS: dict[str, Any] = {
    "P": ct.c_void_p,
    "?": ct.c_bool,
    "B": ct.c_uint8,
    "i": ct.c_int32,
    "I": ct.c_uint32,
    "q": ct.c_int64,
    "Q": ct.c_size_t,
    "f": ct.c_float,
}


class NativeFunctions(ct.CDLL):
    """A native library for ctypes. Its functions know their arguments, and raise RuntimeError for an error.

    What it lacks is looked for in `others`.
    """

    def __init__(self, path: Path, *others: ct.CDLL) -> None:
        super().__init__(str(path))
        self.others = others
        self._signature = ct.CFUNCTYPE(ct.c_char_p, ct.c_char_p)(("bnb_signature", self))
        self._last_error = ct.CFUNCTYPE(ct.c_char_p)(("bnb_last_error", self))

    def __getitem__(self, name: Any) -> Any:
        try:
            function = super().__getitem__(name)
        except AttributeError:
            for other in self.others:
                if hasattr(other, name):
                    return getattr(other, name)
            raise
        if signature := self._signature(name.encode()):
            result, *arguments = signature.decode()
            function.restype, function.argtypes = _LETTERS[result], [_LETTERS[a] for a in arguments]
            if result != "?":
                function.errcheck = self._check_result
        return function

    def text(self, name: str) -> str:
        """What a function without arguments that gives text says."""
        result = ct.CFUNCTYPE(ct.c_char_p)((name, self))()
        if result is None:
            raise RuntimeError((self._last_error() or b"").decode(errors="replace"))
        return result.decode()

    def _check_result(self, result: Any, function: Any, arguments: Any) -> Any:
        # Callers may have set restype to None.
        if (result is None or bool(result) == (function.restype is ct.c_int32)) and (message := self._last_error()):
            raise RuntimeError(f"{function.__name__}: {message.decode(errors='replace')}")
        return result


class BNBNativeLibrary:
    """The C functions of the native libraries. One that is not there raises RuntimeError when it is called."""

    _lib: ct.CDLL
    compiled_with_cuda = False

    def __init__(self, lib: ct.CDLL) -> None:
        self._lib = lib

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_lib":
            raise AttributeError(name)
        function = getattr(self._lib, name, None)
        if function is None:
            function = self._missing(name)
        setattr(self, name, function)
        return function

    def __getitem__(self, item: str) -> Any:
        return getattr(self, item)

    def _missing(self, name: str) -> Callable[..., NoReturn]:
        return _raiser(f"Method '{name}' not available in CPU-only version of bitsandbytes: {_why_no_cuda()}.")


class CudaBNBNativeLibrary(BNBNativeLibrary):
    """Those of the CUDA library, and of the CPU's."""

    compiled_with_cuda = True

    def _missing(self, name: str) -> Callable[..., NoReturn]:
        return _raiser(f"Method '{name}' not available: the native libraries of bitsandbytes have no such function.")


class ErrorHandlerMockBNBNativeLibrary(BNBNativeLibrary):
    """Stands for a library that could not be loaded: a call of any function raises one sentence that says why."""

    def __init__(self, error_msg: str) -> None:
        self.error_msg = self.formatted_error = error_msg
        self._lib: Any = self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _raiser(f"{self.error_msg} lib.{name}() was called.")

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def fail(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(self.error_msg)


def _raiser(message: str) -> Callable[..., NoReturn]:
    def throw_on_call(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(message)

    return throw_on_call


def _why_no_cuda() -> str:
    return "this torch has no CUDA" if cuda_lib is None else getattr(cuda_lib, "error_msg", "").rstrip(".")


# ---- loading


def load(native: Native, *others: ct.CDLL) -> BNBNativeLibrary:
    """The loaded library, if it has a kernel for every operator, else one that only raises.

    Warns in the latter case, unless it is the library of a GPU that is not there: then there may be no GPU either.
    """
    path = native.path
    reason = "there is no such file"
    if found := path.is_file():
        try:
            _check_complete(path)
            torch.ops.load_library(path)
            if not (missing := native.missing()):
                functions = NativeFunctions(path, *others)
                return CudaBNBNativeLibrary(functions) if native is CUDA else BNBNativeLibrary(functions)
            reason = f"it has no kernel for {', '.join(missing)}"
        except (OSError, AttributeError) as error:
            reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
    message = (
        f"bitsandbytes cannot run on {native.title} because its native library {path} is not usable ({reason}); "
        f"{native.advice}."
    )
    if found or native is CPU:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return ErrorHandlerMockBNBNativeLibrary(message)


def _check_complete(path: Path) -> None:
    """Refuses a file that ends before its segments or its tables do: mapping it would kill the process."""
    with path.open("rb") as file:
        header = file.read(64)
        size = file.seek(0, os.SEEK_END)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            raise OSError("it is not a shared library")
        segments, sections = struct.unpack_from("<QQ", header, 32)
        segment_size, segment_count, section_size, section_count = struct.unpack_from("<HHHH", header, 54)
        end = max(segments + segment_size * segment_count, sections + section_size * section_count)
        file.seek(min(segments, size))
        table = file.read(segment_size * segment_count) if segment_size >= 56 else b""
    loaded = 0
    for at in range(0, len(table) - 55, segment_size or 1):
        kind, _, offset, _, _, in_file = struct.unpack_from("<IIQQQQ", table, at)
        if kind == 1:  # PT_LOAD
            loaded, end = loaded + 1, max(end, offset + in_file)
    if end > size:
        raise OSError(f"it ends at byte {size} of {end}")
    if not loaded:
        raise OSError("it has nothing to load")


def get_cuda_bnb_library_path(cuda_specs: CUDASpecs) -> Path:
    """The library for GPUs: BNB_CUDA_LIBRARY, or libbitsandbytes_cuda<version>.so if BNB_CUDA_VERSION names a version
    (BNB_ROCM_VERSION with ROCm: libbitsandbytes_rocm<version>.so), or the one that is made for all versions of CUDA,
    whatever the CUDASpecs are.

    Raises:
        RuntimeError: the variable is not a number.
    """
    kind = "rocm" if torch.version.hip else "cuda"
    variable = f"BNB_{kind.upper()}_VERSION"
    version = os.environ.get(variable)
    if version is None:
        return CUDA.path
    if not version.isdigit():
        raise RuntimeError(f"{variable}={version!r}: value must be digits only (e.g. '124' for 12.4).")
    path = PACKAGE_DIR / f"libbitsandbytes_{kind}{version}.so"
    logger.warning(
        f"WARNING: {variable}={version} environment variable detected; loading {path.name}.\n"
        f"If this was unintended, clear the variable and retry: unset {variable}\n"
    )
    return path


def get_native_library() -> BNBNativeLibrary:
    """The C functions of all libraries that could be loaded."""
    return cpu_lib if cuda_lib is None or isinstance(cuda_lib, ErrorHandlerMockBNBNativeLibrary) else cuda_lib


def instruction_sets() -> tuple[str, list[str]]:
    """The instruction set whose kernels run on the CPU, and all that could, best first.

    Raises:
        RuntimeError: there is no library, or BNB_FORCE_ISA names none of them.
    """
    functions = cpu_lib._lib
    if not isinstance(functions, NativeFunctions):
        return functions.fail()
    return functions.text("bnb_active_isa"), functions.text("bnb_supported_isas").split()


def _warn_of_versions() -> None:
    """Says what has become of the variables by which releases choose one of their libraries."""
    version = os.environ.get("BNB_CUDA_VERSION")
    if version is not None and CUDA.path.name == f"libbitsandbytes_cuda{version}.so" != "libbitsandbytes_cuda.so":
        logger.warning(f"BNB_CUDA_VERSION={version}: {CUDA.path.name} is used. To go back, unset BNB_CUDA_VERSION.")
        version = None
    given = {"BNB_CUDA_VERSION": version, "BNB_ROCM_VERSION": os.environ.get("BNB_ROCM_VERSION")}
    if named := [f"{name}={value}" for name, value in given.items() if value is not None]:
        logger.warning(
            f"{' and '.join(named)}: no effect. This bitsandbytes has one native library for all versions of CUDA and "
            f"none for ROCm. To use another one, set BNB_CUDA_LIBRARY=/path/to/libbitsandbytes_cuda.so instead."
        )


_warn_of_versions()
cpu_lib = load(CPU)
# Loading it neither needs a driver nor looks for a GPU.
cuda_lib = load(CUDA, cpu_lib._lib) if torch.version.cuda else None
lib = get_native_library()
BNB_BACKEND = "CUDA" if lib.compiled_with_cuda else "CPU"
