"""Prints the folder of the torch to build with, or nothing."""

import importlib.util
import sysconfig
from pathlib import Path


def torch_folder() -> Path | None:
    """A torch from 2.10 that can be imported, or one that is installed but that pip hides from an isolated build."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or () if spec else ())]
    folders += [Path(sysconfig.get_path(name), "torch") for name in ("purelib", "platlib")]
    headers = Path("include", "torch", "csrc", "stable", "library.h")
    return next((folder for folder in folders if (folder / headers).is_file()), None)


if __name__ == "__main__":
    print(torch_folder() or "", end="")
