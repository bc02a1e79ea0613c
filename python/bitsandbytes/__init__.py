"""k-bit quantization for PyTorch: 4-bit and int8 layers and 8-bit block-wise quantization on one C++ core."""

import importlib.metadata
import re
from pathlib import Path

from . import functional, nn, optim, research, utils
from .autograd._functions import MatmulLtState, matmul, matmul_4bit
from .backends.cpu import ops as cpu_ops
from .backends.cuda import ops as cuda_ops
from .backends.default import ops as default_ops
from .nn import modules
from .optim import adam

__all__ = [
    "MatmulLtState",
    "adam",
    "cpu_ops",
    "cuda_ops",
    "default_ops",
    "features",
    "functional",
    "matmul",
    "matmul_4bit",
    "modules",
    "nn",
    "optim",
    "research",
    "supported_torch_devices",
    "utils",
]

# What other projects look at to see that a GPU is not needed, and on which devices they may run.
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}
# What pdoc leaves out.
__pdoc__ = {"libbitsandbytes": False, "optim.optimizer.Optimizer8bit": False, "optim.optimizer.MockArgs": False}


def _version() -> str:
    try:
        return importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        # Not installed but on the path. In a source tree: what the installed one would be made from.
        header = Path(__file__).parents[2] / "include" / "bnb" / "version.h"
        text = header.read_text() if header.is_file() else ""
        found = re.search(r'^#define BNB_VERSION "(.+?)"', text, re.MULTILINE)
        return found[1] if found else "0+unknown"


def _import_backends() -> None:
    """Loads what other packages register for the group bitsandbytes.backends: functions that register kernels."""
    for entry_point in importlib.metadata.entry_points(group="bitsandbytes.backends"):
        try:
            entry_point.load()()
        except Exception as error:
            raise RuntimeError(f"bitsandbytes: failed to load backend {entry_point.name}: {error}") from error


__version__ = _version()
_import_backends()
