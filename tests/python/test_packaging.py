"""The build backend: what an installation from source downloads."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bitsandbytes

PROJECT = Path(__file__).parents[2]
BACKEND = PROJECT / "python" / "packaging"


@pytest.fixture
def backend(monkeypatch):
    pytest.importorskip("scikit_build_core")
    monkeypatch.syspath_prepend(BACKEND)
    monkeypatch.chdir(PROJECT)
    monkeypatch.delenv("BNB_SKIP_CMAKE", raising=False)
    return importlib.import_module("backend")


@pytest.mark.parametrize("shown", [True, False])
def test_the_installed_torch_is_found_also_when_it_cannot_be_imported(shown):
    """As in pip's isolated builds, which take site-packages out of sys.path."""
    hide = "sys.path[:] = [p for p in sys.path if 'site-packages' not in p]"
    run = f"runpy.run_path({str(BACKEND / 'find_torch.py')!r}, run_name='__main__')"
    script = f"import runpy, sys; {'pass' if shown else hide}; {run}"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert Path(found) == Path(torch.__file__).parent


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_torch_is_asked_for_only_where_there_is_none(backend, monkeypatch, kind):
    requires = getattr(backend, f"get_requires_for_build_{kind}")
    assert not any(name.startswith("torch") for name in requires())
    monkeypatch.setattr(backend, "torch_folder", lambda: None)
    assert "torch>=2.10" in requires()


def test_there_is_one_version(backend, tmp_path):
    """That of the header, in its parts too, is the package's, here and in a wheel."""
    header = dict(re.findall(r'#define BNB_VERSION(\w*) "?([^"\n]+)', (PROJECT / "include/bnb/version.h").read_text()))
    parts = ".".join(header[f"_{part}"] for part in ("MAJOR", "MINOR", "PATCH"))
    assert header[""].startswith(f"{parts}+cpp.") and parts == "0.50.2"
    assert bitsandbytes.__version__ == header[""]
    folder = backend.prepare_metadata_for_build_wheel(str(tmp_path))
    assert f"\nVersion: {header['']}\n" in (tmp_path / folder / "METADATA").read_text()


def test_a_build_without_cmake_is_refused_with_what_to_set_instead(backend, monkeypatch):
    monkeypatch.setenv("BNB_SKIP_CMAKE", "1")
    with pytest.raises(SystemExit, match="BNB_CPU_LIBRARY"):
        backend.get_requires_for_build_wheel()
    monkeypatch.setenv("BNB_SKIP_CMAKE", "0")
    backend.get_requires_for_build_wheel()
