"""bitsandbytes.functional.lib: each C function of the released package, called as its clients do."""

from __future__ import annotations

import copy
import ctypes as ct
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from c_symbol_cases import DYNAMIC, case_of, ptr, values
from c_symbol_clients import nested_weight
from process import run_python

import bitsandbytes.functional as F
from bitsandbytes import cextension
from bitsandbytes.cextension import (
    BNBNativeLibrary,
    CudaBNBNativeLibrary,
    ErrorHandlerMockBNBNativeLibrary,
    NativeFunctions,
)
from bitsandbytes.cuda_specs import CUDASpecs

ROOT = Path(__file__).parents[2]
GOLDEN = [line.split() for line in (ROOT / "tests/golden/c_symbols.txt").read_text().splitlines() if line[0] != "#"]
NAMES: dict[str, list[str]] = {kind: [name for k, name in GOLDEN if k == kind] for kind in ("cpu", "cuda")}


@cache
def library(kind: str) -> Any:
    """Of the CUDA library the emulated one, which the C++ tests build."""
    if kind == "cpu":
        return cextension.cpu_lib
    built = ROOT / "build/release/tests/cuda_on_host/libbnb_cuda_symbols_on_host.so"
    path = Path(os.environ.get("BNB_CUDA_SYMBOLS_ON_HOST", built))
    return CudaBNBNativeLibrary(NativeFunctions(path, cextension.cpu_lib._lib)) if path.is_file() else None


def library_or_skip(kind: str) -> Any:
    return library(kind) or pytest.skip("the C++ tests were not built (BNB_BUILD_TESTS)")


@pytest.mark.parametrize(("kind", "name"), GOLDEN)
def test_function_as_the_operator(kind: str, name: str) -> None:
    case_of(name)(library_or_skip(kind), name)


def test_clients_dequantize_and_multiply_a_nested_weight() -> None:
    nested_weight(library_or_skip("cuda"), "cpu")


@pytest.mark.parametrize("kind", NAMES)
def test_exports_are_those_of_the_releases(kind: str) -> None:
    nm = shutil.which("nm") or pytest.skip("no nm")
    path = library_or_skip(kind)._lib._name
    text = subprocess.run([nm, "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[2] for line in text.splitlines() if line.split()[1] == "T"} - {"_init", "_fini"}
    assert {"bnb_signature", "bnb_last_error"} <= exported
    assert {name for name in exported if not name.startswith("bnb_")} == set(NAMES[kind])


# As release 0.50.2 tells ctypes (backends/cuda/ops.py).
_P, _I, _F = ct.c_void_p, ct.c_int32, ct.c_float
RELEASED = {
    "cdequantize_blockwise_bf16_nf4": [_P] * 4 + [_I, _I, _P],
    "cdequantize_blockwise_fp32": [_P] * 4 + [_I, _I, _P],
    "cgemm_4bit_bf16": [_P] * 8 + [_I] * 5 + [_P],
    "cgemm_4bit_inference_naive_fp16": [_I] * 3 + [_P] * 5 + [_I] * 4 + [_P],
    "cigemmlt_32": [_P] + [_I] * 3 + [_P] * 4 + [_I] * 3 + [_P],
    "cdequant_mm_int32_fp16": [_P] * 5 + [_I, _I, _P],
    "cint8_vector_quant": [_P] * 3 + [_F, _I, _I, _P],
    "cquantize_blockwise_fp16_fp4": [_P] * 4 + [_I, _I],
}


@pytest.mark.parametrize("name", RELEASED)
def test_arguments_are_those_of_the_release(name: str) -> None:
    assert library_or_skip("cuda")[name].argtypes == RELEASED[name]


NOTHING: dict[Any, Any] = {ct.c_void_p: None, ct.c_bool: False, ct.c_float: 1.0}
HARMLESS = {"get_context", "get_cusparse", "has_avx512f_cpu", "has_avx512bf16_cpu"}


@pytest.mark.parametrize("size", [64, -64, 3])
@pytest.mark.parametrize("kind", NAMES)
def test_null_pointers_and_bad_sizes_are_errors(kind: str, size: int) -> None:
    """No function ends the process; an error names what is wrong."""
    for name in NAMES[kind]:
        function = library_or_skip(kind)[name]
        arguments = [NOTHING[t] if t in NOTHING else size % 256 if t is ct.c_uint8 else size for t in function.argtypes]
        if name in HARMLESS:
            function(*arguments)
        elif name == "cprefetch":
            with pytest.raises(RuntimeError, match=r"^cprefetch: current device: 64, expected 0"):
                function(None, 0, 64)
        elif size == 64 or not re.match(r"c(fill|arange|_mul|quantize$|get_managed)|c\w+_static_8bit|cbatched", name):
            with pytest.raises(RuntimeError, match=rf"^{name}: \w+: .* is .*, expected "):
                function(*arguments)
                if name == "cget_managed_ptr":
                    raise RuntimeError(f"{name}: allocate_managed: bytes is fine, expected ")


def test_an_error_is_told_once_and_to_its_thread() -> None:
    lib = library("cpu")
    quantize = lib.cquantize_blockwise_cpu_fp32
    x, codes, absmax = values(64), torch.zeros(64, dtype=torch.uint8), torch.zeros(1)
    arguments = ptr(DYNAMIC), ptr(x), ptr(absmax), ptr(codes)
    with pytest.raises(RuntimeError, match="code is 0 elements, expected at least 256"):
        quantize(None, *arguments[1:], 64, 64)
    quantize(*arguments, 64, 64)
    assert absmax == x.abs().max()
    raw = ct.CDLL(lib._lib._name)  # what a program sees that loads the library by itself
    raw.bnb_last_error.restype = ct.c_char_p
    assert raw.cquantize_blockwise_cpu_fp32(*arguments, ct.c_longlong(-1), ct.c_longlong(64)) == 1
    assert b"blocksize is -1, expected" in raw.bnb_last_error()
    assert raw.cquantize_blockwise_cpu_fp32(*arguments, ct.c_longlong(64), ct.c_longlong(64)) == 0
    assert raw.bnb_last_error() == b""
    assert raw.bnb_signature(b"none such") == 0


def test_an_error_is_raised_where_the_caller_has_set_the_result_to_none() -> None:
    """As the released Python files do for functions without a result."""
    raw = NativeFunctions(Path(cextension.cpu_lib._lib._name))
    raw.cdequantize_blockwise_cpu_fp32.restype = None
    with pytest.raises(RuntimeError, match="blocksize is -7"):
        raw.cdequantize_blockwise_cpu_fp32(None, None, None, None, -7, 64)


# ---- lib.name, lib["name"], lib._lib


def test_ways_to_a_function() -> None:
    lib = F.lib
    assert isinstance(lib, BNBNativeLibrary) and lib is cextension.lib and lib.compiled_with_cuda in (False, True)
    name = "cquantize_blockwise_cpu_fp32"
    assert getattr(lib, name) is lib[name] is getattr(lib._lib, name)
    assert copy.copy(lib)[name] is lib[name]


@pytest.mark.skipif(F.lib.compiled_with_cuda, reason="the CUDA library is there")
def test_a_function_that_is_not_there_raises_when_it_is_called() -> None:
    """unsloth and axolotl fetch functions of CUDA when they are imported, wherever they are."""
    for name in (*NAMES["cuda"], "cgemv_4bit_inference_bf16", "none_such"):
        function = F.lib[name]
        assert function is getattr(F.lib, name)
        with pytest.raises(RuntimeError, match=rf"'{name}' not available in CPU-only version.*no CUDA"):
            function(None, 1)


def test_the_cuda_library_has_the_functions_of_the_cpu_too() -> None:
    lib = library_or_skip("cuda")
    assert lib.compiled_with_cuda and lib.has_avx512f_cpu() == F.lib.has_avx512f_cpu()
    assert lib._lib.cquantize_blockwise_cpu_fp32.argtypes[4] is ct.c_int64
    with pytest.raises(RuntimeError, match="'none_such' not available: the native libraries"):
        lib.none_such()


def test_without_a_library_a_call_says_why() -> None:
    mock = ErrorHandlerMockBNBNativeLibrary("It is broken.")
    assert isinstance(mock, BNBNativeLibrary) and not mock.compiled_with_cuda
    for function in (mock.cigemm, mock["cigemm"], mock._lib.cigemm):
        with pytest.raises(RuntimeError, match=r"^It is broken\. lib\.cigemm\(\) was called\.$"):
            function(1, 2)
    with pytest.raises(AttributeError):
        mock.__wrapped__  # noqa: B018


# ---- variables that choose a version

SPECS = CUDASpecs((9, 0), "130", (13, 0))


@pytest.mark.parametrize(("hip", "kind"), [(None, "cuda"), ("6.4", "rocm")])
def test_path_of_the_library_for_gpus(monkeypatch: pytest.MonkeyPatch, caplog: Any, hip: str | None, kind: str) -> None:
    variable = f"BNB_{kind.upper()}_VERSION"
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.delenv("BNB_CUDA_VERSION", raising=False)
    monkeypatch.delenv("BNB_CUDA_LIBRARY", raising=False)
    assert cextension.get_cuda_bnb_library_path(SPECS).name == "libbitsandbytes_cuda.so" and not caplog.text
    monkeypatch.setenv(variable, "124")
    assert cextension.get_cuda_bnb_library_path(SPECS).name == f"libbitsandbytes_{kind}124.so"
    assert variable in caplog.text
    monkeypatch.setenv(variable, "12.4")
    with pytest.raises(RuntimeError, match=f"{variable}='12.4': value must be digits only"):
        cextension.get_cuda_bnb_library_path(SPECS)


def test_a_version_without_a_library_is_answered_once() -> None:
    code = "import bitsandbytes; print(bitsandbytes.cextension.CUDA.path.name)"
    run = run_python(code, BNB_CUDA_VERSION="124", BNB_ROCM_VERSION="64")
    assert run.stdout.strip() == "libbitsandbytes_cuda.so", run.stderr
    expected = r"^BNB_CUDA_VERSION=124 and BNB_ROCM_VERSION=64: no effect\..* set BNB_CUDA_LIBRARY=\S+ instead\.$"
    assert re.match(expected, run.stderr.strip()), run.stderr


def test_a_version_with_a_library_is_honoured(tmp_path: Path) -> None:
    from test_import import PACKAGE, package_copy

    package_copy(tmp_path, (PACKAGE / "libbitsandbytes_cpu.so").read_bytes())
    (tmp_path / "bitsandbytes" / "libbitsandbytes_cuda124.so").write_bytes(b"")
    run = run_python(
        "import bitsandbytes; print(bitsandbytes.cextension.CUDA.path.name)",
        PYTHONPATH=str(tmp_path),
        BNB_CUDA_VERSION="124",
    )
    assert run.stdout.strip() == "libbitsandbytes_cuda124.so", run.stderr
    assert run.stderr.strip() == (
        "BNB_CUDA_VERSION=124: libbitsandbytes_cuda124.so is used. To go back, unset BNB_CUDA_VERSION."
    )
