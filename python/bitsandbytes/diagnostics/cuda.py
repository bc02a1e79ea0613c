"""The GPU half of the diagnostics: what torch found, which library serves it, which CUDA runtimes lie around."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..cextension import CUDA, HIP_ENVIRONMENT
from ..cuda_specs import CUDASpecs
from .utils import print_dedented

CUDART_PATH_PREFERRED_ENVVARS = ("CONDA_PREFIX", "LD_LIBRARY_PATH")
# Hold paths, but never one of a library.
CUDART_PATH_IGNORED_ENVVARS = {
    *("DBUS_SESSION_BUS_ADDRESS", "GOOGLE_VM_CONFIG_LOCK_FILE", "HOME", "LESSCLOSE", "LESSOPEN", "MAIL", "OLDPWD"),
    *("PATH", "PWD", "SHELL", "SSH_AUTH_SOCK", "SSH_TTY", "TMUX", "XDG_DATA_DIRS", "XDG_GREETER_DATA_DIR"),
    *("XDG_RUNTIME_DIR", "_"),
}
CUDA_RUNTIME_LIB_PATTERNS = (
    ("libamdhip64.so*", "amdhip64*.dll") if HIP_ENVIRONMENT else ("libcudart*.so*", "cudart64*.dll", "nvcuda*.dll")
)


def find_cuda_libraries_in_path_list(paths_list_candidate: str) -> Iterator[Path]:
    """CUDA (ROCm) runtimes in the folders of a list such as LD_LIBRARY_PATH; what cannot be read is skipped."""
    for folder in paths_list_candidate.split(os.pathsep):
        if os.sep not in folder:
            continue
        for pattern in CUDA_RUNTIME_LIB_PATTERNS:
            try:
                found = [p for p in Path(folder).glob(pattern) if p.is_file() and not p.is_symlink()]
            except (OSError, ValueError):  # no rights, a name that no file can have
                continue
            yield from found


def is_relevant_candidate_env_var(env_var: str, value: str) -> bool:
    """Whether an environment variable may name folders of libraries."""
    if env_var in CUDART_PATH_PREFERRED_ENVVARS:
        return True
    ignored = env_var in CUDART_PATH_IGNORED_ENVVARS or "CONDA" in env_var or "BASH_FUNC" in env_var
    return os.sep in value and "\n" not in value and not ignored


def get_potentially_lib_path_containing_env_vars() -> dict[str, str]:
    """The environment variables that may name folders of libraries."""
    return {name: value for name, value in os.environ.items() if is_relevant_candidate_env_var(name, value)}


def find_cudart_libraries() -> Iterator[Path]:
    """CUDA (ROCm) runtimes that environment variables lead to: CONDA_PREFIX and LD_LIBRARY_PATH first."""
    candidates = get_potentially_lib_path_containing_env_vars()
    preferred = [name for name in CUDART_PATH_PREFERRED_ENVVARS if name in candidates]
    for name in (*preferred, *(n for n in candidates if n not in preferred)):
        yield from find_cuda_libraries_in_path_list(candidates[name])


def print_diagnostics(cuda_specs: CUDASpecs) -> None:
    """What torch found on the GPU side, and what is wrong with it."""
    title = "ROCM" if HIP_ENVIRONMENT else "CUDA"
    print(
        f"PyTorch settings found: {title}_VERSION={cuda_specs.cuda_version_string}, "
        f"Highest Compute Capability: {cuda_specs.highest_compute_capability}."
    )
    if not CUDA.path.exists():
        print(f"No compatible {title} library found (tried: {CUDA.path.name}): {CUDA.advice}.")
    if not cuda_specs.has_imma:
        print("WARNING: Compute capability < 7.5 detected! The kernels of this package need 7.5.")


def print_runtime_diagnostics() -> None:
    """The CUDA (ROCm) runtimes that environment variables lead to. None is needed: ours is linked statically."""
    title, version = ("ROCm", torch.version.hip) if HIP_ENVIRONMENT else ("CUDA", torch.version.cuda)
    found = list(find_cudart_libraries())
    if not found:
        print(f"{title} SETUP: no {title} runtime files in any environmental path; none is needed.")
    elif len(found) > 1:
        print_dedented(
            f"""
            Found duplicate {title} runtime files (see below). bitsandbytes uses none of them: its own runtime is
            linked statically, and torch brings that of {title} {version}.
            """
        )
    for path in found:
        print(f"* Found {title} runtime at: {path}")
