"""The build backend: scikit-build-core, which asks for a torch to build with only where none is installed.

The build takes headers and the name of a library from torch, of any version from 2.10. For that alone an isolated
build would download the newest one, with gigabytes of CUDA, though one is there already.
"""

import os
from typing import Any

from find_torch import torch_folder
from scikit_build_core import build as _build
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def _torch() -> list[str]:
    if os.environ.get("BNB_SKIP_CMAKE", "0").lower() not in ("", "0", "false", "off"):
        raise SystemExit(
            "BNB_SKIP_CMAKE is set, but this build always runs CMake; to use libraries that are built already, set "
            "BNB_CPU_LIBRARY and BNB_CUDA_LIBRARY where the package runs"
        )
    return [] if torch_folder() else ["torch>=2.10"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _build.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _build.get_requires_for_build_editable(config_settings) + _torch()
