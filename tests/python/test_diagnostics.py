"""python -m bitsandbytes, and the modules behind it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitsandbytes import cuda_specs
from bitsandbytes.diagnostics import checks, cuda, main

COMMAND = (sys.executable, "-W", "ignore", "-m", "bitsandbytes")


def run(*args: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *args], env=env, capture_output=True, text=True, timeout=240, check=False)


@pytest.fixture
def env() -> dict[str, str]:
    import os

    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def test_json_tells_what_is_used_and_that_it_works(env):
    done = run("--json", env={**env, "BNB_FORCE_ISA": "scalar"})
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["ok"]
    assert facts["torch"]["version"] == torch.__version__
    assert facts["cpu"]["kernels"] == "scalar"
    assert "scalar" in facts["cpu"]["kernels_that_run_here"]
    assert facts["settings"]["BNB_FORCE_ISA"] == "scalar"
    assert facts["checks"] == {"cpu": dict.fromkeys(checks.CHECKS, "")}
    cpu = next(library for library in facts["libraries"] if library["device"] == "cpu")
    assert cpu["loaded"]
    assert Path(cpu["path"]).is_file()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"BNB_CPU_LIBRARY": "/nowhere/lib.so"}, "/nowhere/lib.so"),
        ({"BNB_FORCE_ISA": "mmx"}, 'BNB_FORCE_ISA: "mmx" cannot run here'),
    ],
)
def test_what_does_not_work_is_told_and_ends_with_status_1(env, setting, said):
    done = run(env=env | setting)
    assert done.returncode == 1
    assert said in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"FAILURE: {len(checks.CHECKS)} checks failed (cpu: ")


def test_settings_in_no_encoding_are_shown(env):
    done = run(env=env | {"PYTHONIOENCODING": "ascii", "BNB_ANYTHING": "\u00fc"})
    assert done.returncode == 0 and "BNB_ANYTHING=\\" in done.stdout


def test_unknown_arguments_end_with_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["--jsno"])
    assert ended.value.code == 2
    assert "--jsno" in capsys.readouterr().err


def test_a_wrong_result_fails_its_check(monkeypatch):
    right = checks.F.dequantize_blockwise
    monkeypatch.setattr(checks.F, "dequantize_blockwise", lambda *args: right(*args) * 1.05)
    results = checks.self_check("cpu")
    wrong = results.pop("8-bit blockwise quantization")
    assert wrong.startswith("ArithmeticError: the error of 8-bit blocks is 0.0")
    assert not any(results.values())


def test_sanity_check_names_what_failed(monkeypatch):
    main.sanity_check()
    monkeypatch.setattr(main, "self_check", lambda device: {"int8 product": "no", "4-bit product": ""})
    with pytest.raises(RuntimeError, match=r"cpu.*int8 product.*no"):
        main.sanity_check()


def test_get_package_version():
    assert main.get_package_version("torch") == torch.__version__
    assert main.get_package_version("no-such-package") == "not found"


def test_runtimes_are_found_where_the_environment_leads(tmp_path, monkeypatch):
    for name in list(cuda.get_potentially_lib_path_containing_env_vars()):
        monkeypatch.delenv(name)
    (tmp_path / "conda").mkdir()
    (tmp_path / "other").mkdir()
    real = tmp_path / "conda" / "libcudart.so.13.0"
    real.write_bytes(b"")
    (tmp_path / "conda" / "libcudart.so").symlink_to(real)
    second = tmp_path / "other" / "libcudart.so.12"
    second.write_bytes(b"")
    monkeypatch.setenv("SOME_TOOL", f"{tmp_path / 'other'}:/no/such/folder:relative")
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    monkeypatch.setenv("PWD", str(tmp_path / "other"))
    assert list(cuda.find_cudart_libraries()) == [real, second]


@pytest.fixture
def two_gpus(monkeypatch):
    cuda_specs.get_cuda_version_tuple.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(9, 0), (7, 0)][i])
    yield
    cuda_specs.get_cuda_version_tuple.cache_clear()


@pytest.mark.usefixtures("two_gpus")
def test_cuda_specs():
    specs = cuda_specs.get_cuda_specs()
    assert specs == cuda_specs.CUDASpecs((9, 0), "130", (13, 0))
    assert specs.has_imma
    assert not cuda_specs.CUDASpecs((7, 0), "130", (13, 0)).has_imma
    assert cuda_specs.get_compute_capabilities() == [(7, 0), (9, 0)]


def test_cuda_specs_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda_specs.get_cuda_specs() is None


@pytest.mark.parametrize(
    ("printed", "override", "arch"),
    [
        ("Name:   gfx1100", "gfx90a", "gfx1100"),
        ("nothing", "1100", "gfx1100"),
        ("nothing", "gfx90a", "gfx90a"),
        ("nothing", "gfx11-00", "unknown"),
        (None, "", "unknown"),
    ],
)
def test_rocm_gpu_arch(monkeypatch, printed, override, arch):
    def rocminfo(*args, **kwargs):
        if printed is None:
            raise FileNotFoundError("rocminfo")
        return SimpleNamespace(stdout=printed)

    monkeypatch.setattr(torch.version, "hip", "7.0.2")
    monkeypatch.setattr(cuda_specs.subprocess, "run", rocminfo)
    monkeypatch.setenv("BNB_ROCM_GPU_ARCH", override)
    assert cuda_specs.get_rocm_gpu_arch() == arch
