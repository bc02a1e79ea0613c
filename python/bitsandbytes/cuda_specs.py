"""What torch knows of the GPUs and of the CUDA or ROCm that it was built with."""

import logging
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from functools import cache

import torch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CUDASpecs:
    """The best GPU and the toolkit of torch.

    Attributes:
        highest_compute_capability: (major, minor) of the best GPU.
        cuda_version_string: version of CUDA or ROCm without its dot, as in "130".
        cuda_version_tuple: the same as (major, minor).
    """

    highest_compute_capability: tuple[int, int]
    cuda_version_string: str
    cuda_version_tuple: tuple[int, int]

    @property
    def has_imma(self) -> bool:
        """Whether the GPU multiplies int8 in tensor cores."""
        return bool(torch.version.hip) or self.highest_compute_capability >= (7, 5)


def get_compute_capabilities() -> list[tuple[int, int]]:
    """Of all visible GPUs, ascending."""
    return sorted(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))


@cache
def get_cuda_version_tuple() -> tuple[int, int] | None:
    """Version of CUDA or ROCm that torch was built with; None without either."""
    found = re.match(r"(\d+)\.(\d+)", torch.version.cuda or torch.version.hip or "")
    return (int(found[1]), int(found[2])) if found else None


def get_cuda_version_string() -> str | None:
    """The same without a dot: "130" for 13.0."""
    version = get_cuda_version_tuple()
    return None if version is None else "{}{}".format(*version)


def get_cuda_specs() -> CUDASpecs | None:
    """None without a GPU that torch can use."""
    version, text = get_cuda_version_tuple(), get_cuda_version_string()
    if version is None or text is None or not torch.cuda.is_available():
        return None
    try:
        capabilities = get_compute_capabilities()
    except RuntimeError:  # a driver that does not answer
        return None
    return CUDASpecs(capabilities[-1], text, version) if capabilities else None


def get_rocm_gpu_arch() -> str:
    """Architecture of the first AMD GPU, such as "gfx90a".

    What rocminfo (hipinfo on Windows) prints, else BNB_ROCM_GPU_ARCH, else "unknown"; "unknown" without ROCm.
    """
    if not torch.version.hip:
        return "unknown"
    tool, label = ("hipinfo.exe", "gcnArchName") if platform.system() == "Windows" else ("rocminfo", "Name")
    try:
        printed = subprocess.run([tool], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        printed = ""
        _log.error("Could not detect ROCm GPU architecture: %s", error)
    if found := re.search(label + r":\s+(gfx[a-zA-Z\d]+)", printed):
        return found[1]
    override = os.environ.get("BNB_ROCM_GPU_ARCH", "").strip()
    if override and (named := re.fullmatch(r"(?:gfx)?([a-zA-Z\d]+)", override)):
        _log.info(
            "%s names no GPU: BNB_ROCM_GPU_ARCH=%s counts. Install %s if possible.", tool, override, tool.split(".")[0]
        )
        return f"gfx{named[1]}"
    if override:
        _log.warning("Ignoring invalid BNB_ROCM_GPU_ARCH value %r, expected one such as gfx90a", override)
    return "unknown"
