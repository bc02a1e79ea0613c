"""The CUDA library where there is no GPU: when it is loaded, and what is said where it is of no use.

A torch without CUDA is told that it has CUDA where that is the case to test. Kernels are called as the dispatcher would
call them for a CUDA tensor, on CPU tensors.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from process import run_python
from test_import import PACKAGE, package_copy

LIBRARY = "libbitsandbytes_cuda.so"
CODE = """
import sys, warnings, torch
torch.version.cuda = {cuda}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bitsandbytes as bnb
for w in caught:
    print("warning:", w.message)
print("backend:", bnb.cextension.BNB_BACKEND, bnb.functional.lib.compiled_with_cuda)
print("initialized:", torch.cuda.is_initialized())
x = torch.randn(2, 64)
packed, state = bnb.functional.quantize_4bit(x, compress_statistics=True)
print("cpu:", bnb.functional.dequantize_4bit(packed, state).shape == x.shape)
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
u8, f32, absmax, code = torch.uint8, torch.float32, torch.ones(2), bnb.functional.create_dynamic_map()
codes, code4 = torch.zeros(2, 64, dtype=u8), bnb.functional.get_4bit_type("nf4", device="cpu")
adam = (0.9, 0.999, 0.0, 0.0, 1e-8)
for name, args in {{
    "quantize_4bit": (x, 64, "nf4", u8),
    "dequantize_4bit": (packed, absmax, 64, "nf4", [2, 64], f32),
    "dequantize_4bit.out": (packed, absmax, 64, "nf4", [2, 64], f32, x),
    "quantize_blockwise": (x, code, 64),
    "dequantize_blockwise": (codes, absmax, code, 64, f32),
    "dequantize_blockwise.out": (codes, absmax, code, 64, f32, x),
    "gemv_4bit": (x, packed, [2, 64], absmax, code4, 64),
    "gemv_4bit.out": (x, packed, [2, 64], absmax, code4, 64, torch.empty(2, 2)),
    "gemm_4bit": (x, packed, [2, 64], absmax, 64, "nf4", None, None, None, None),
    "int8_vectorwise_quant": (x, 6.0),
    "int8_linear": (x, codes.to(torch.int8), absmax, None, 6.0),
    "optimizer_update_32bit": ("lion", x, x.clone(), x.clone(), None, None, 0.0, 0.0, *adam, 0.0, 1, 1e-3, 1.0, False),
    "optimizer_update_8bit_blockwise": (
        "lion", x, x.clone(), codes, None, *adam, 1, 1e-3, code, None, absmax[:1], None, 0.0, 1.0, False
    ),
}}.items():
    try:
        torch.library.get_kernel("bitsandbytes::" + name, "CUDA").call_boxed(CPU, *args)
        print(name, "ran")
    except (RuntimeError, ValueError) as e:
        print(name, type(e).__name__, str(e).splitlines()[0])
"""


def run_package(folder: Path, library: bytes | None, cuda: str | None) -> tuple[dict[str, str], list[str], list[str]]:
    """What a package with this CUDA library says: facts, warnings, and how each operator ended on CUDA."""
    package_copy(folder, (PACKAGE / "libbitsandbytes_cpu.so").read_bytes())
    if library is not None:
        (folder / "bitsandbytes" / LIBRARY).write_bytes(library)
    run = run_python(CODE.format(cuda=repr(cuda)), PYTHONPATH=str(folder))
    assert run.returncode == 0 and not run.stderr, run.stderr
    lines = run.stdout.splitlines()
    facts = dict(line.split(": ", 1) for line in lines if re.match(r"(backend|initialized|cpu): ", line))
    warned = [line for line in lines if line.startswith("warning: ")]
    calls = [line for line in lines if re.match(r"(de)?(quantize|gem|int8|optimizer)", line)]
    assert facts["cpu"] == "True" and facts["initialized"] == "False" and len(calls) == 13
    return facts, warned, calls


def built() -> bytes:
    path = PACKAGE / LIBRARY
    if not path.is_file():
        pytest.skip("the package was built without CUDA (COMPUTE_BACKEND=cuda)")
    return path.read_bytes()


def test_a_torch_without_cuda_leaves_the_library_alone(tmp_path: Path) -> None:
    """Even one that cannot be loaded. CUDA then is a device like any other."""
    facts, warned, calls = run_package(tmp_path, b"not a library\n", cuda=None)
    assert facts["backend"] == "CPU False" and not warned
    assert all(call.endswith("ran") for call in calls), calls


def test_without_the_library_only_use_on_cuda_raises(tmp_path: Path) -> None:
    """A machine may have a torch with CUDA and no GPU, so that importing says nothing; nothing runs in a slower way."""
    facts, warned, calls = run_package(tmp_path, None, cuda="13.0")
    assert facts["backend"] == "CPU False" and not warned
    for call in calls:
        assert re.search(rf" RuntimeError bitsandbytes cannot run on CUDA .*{LIBRARY}.*COMPUTE_BACKEND=cuda", call), (
            call
        )


@pytest.mark.parametrize("library", [b"", b"not a library\n", b"\x7fELF" + bytes(range(256)) * 40])
def test_an_unusable_library_is_named_once(tmp_path: Path, library: bytes) -> None:
    facts, warned, calls = run_package(tmp_path, library, cuda="13.0")
    assert facts["backend"] == "CPU False" and len(warned) == 1 and LIBRARY in warned[0]
    assert all(" RuntimeError bitsandbytes cannot run on CUDA" in call and LIBRARY in call for call in calls), calls


def test_the_library_loads_without_a_driver_and_names_devices(tmp_path: Path) -> None:
    facts, warned, calls = run_package(tmp_path, built(), cuda="13.0")
    assert facts["backend"] == "CUDA True" and not warned
    for call in calls:
        name = call.split()[0].removesuffix(".out")
        first = "p" if name.startswith("optimizer") else "A"
        assert call.endswith(f"ValueError {name}: {first} is on cpu, expected cuda"), call


def test_the_library_needs_nothing_of_cuda(tmp_path: Path) -> None:
    """The runtime is linked statically, cuBLASLt is looked for when it is needed, torch's CUDA half likewise."""
    (tmp_path / LIBRARY).write_bytes(built())
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf")
    text = subprocess.run([readelf, "-d", tmp_path / LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", text)
    assert "libtorch_cpu.so" in needed and not [n for n in needed if "cuda" in n or "cublas" in n], needed
