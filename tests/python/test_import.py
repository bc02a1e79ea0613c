"""import bitsandbytes: what it costs and touches, and what happens without a usable native library."""

from __future__ import annotations

import re
import shutil
import struct
from pathlib import Path

import pytest
import torch
from process import QUANTIZE_ONE, run_python

import bitsandbytes
from bitsandbytes.cextension import _check_complete

PACKAGE = Path(bitsandbytes.__file__).parent


def test_import_touches_no_network_and_no_heavy_module() -> None:
    code = """
import socket, sys, time
def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
before, start = set(sys.modules), time.perf_counter()
import bitsandbytes
seconds, new = time.perf_counter() - start, set(sys.modules) - before
print(f"{seconds:.3f}", *sorted({name.partition(".")[0] for name in new}))
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    seconds, *modules = run.stdout.split()
    print(f"import bitsandbytes: {seconds} s beyond torch, new top-level modules: {' '.join(modules)}")
    heavy = {
        "scipy",
        "transformers",
        "peft",
        "accelerate",
        "safetensors",
        "triton",
        "pandas",
        "requests",
        "urllib3",
        "httpx",
    }
    assert "bitsandbytes" in modules and not heavy & set(modules)
    assert not run.stderr.strip(), "importing prints nothing"


def test_import_does_not_compile_or_start_processes() -> None:
    code = """
import os, subprocess, sys, threading
import torch
def refuse(*args, **kwargs):
    raise AssertionError("a process was started")
subprocess.Popen.__init__ = os.system = os.fork = refuse
threads = threading.active_count()
import bitsandbytes
assert threading.active_count() == threads
assert "torch._inductor" not in sys.modules and "torch._dynamo" not in sys.modules, "compiler modules cost a second"
"""
    dynamo_comes_with_torch = run_python("import sys, torch; sys.exit('torch._dynamo' in sys.modules)").returncode
    assert not dynamo_comes_with_torch
    run = run_python(code)
    assert run.returncode == 0, run.stderr


# ---- without a usable library


def package_copy(folder: Path, library: bytes | None) -> Path:
    """The package with another native library, or none."""
    copy = folder / "bitsandbytes"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if library is not None:
        (copy / "libbitsandbytes_cpu.so").write_bytes(library)
    return folder


def broken() -> dict[str, bytes | None]:
    library = (PACKAGE / "libbitsandbytes_cpu.so").read_bytes()
    return {
        "missing": None,
        "empty": b"",
        "garbage": b"\x7fELF" + bytes(range(256)) * 40,
        "truncated": library[: len(library) // 2],
        "a text": b"not a library\n",
        "truncated without sections": without_sections(library)[: end_of_segments(library) // 2],
    }


def without_sections(library: bytes) -> bytes:
    """As a strip of section headers leaves it: what is loaded is described by segments alone."""
    (sections,) = struct.unpack_from("<Q", library, 40)
    header = bytearray(library[:64])
    struct.pack_into("<Q", header, 40, 0)
    struct.pack_into("<HHH", header, 58, 64, 0, 0)
    return bytes(header) + library[64:sections]


def end_of_segments(library: bytes) -> int:
    (table,), (size, count) = struct.unpack_from("<Q", library, 32), struct.unpack_from("<HH", library, 54)
    segments = [struct.unpack_from("<IIQQQQ", library, table + i * size) for i in range(count)]
    return max(offset + in_file for kind, _, offset, _, _, in_file in segments if kind == 1)


def test_a_file_without_section_headers_is_complete_if_its_segments_are(tmp_path: Path) -> None:
    library = without_sections((PACKAGE / "libbitsandbytes_cpu.so").read_bytes())
    path, end = tmp_path / "lib.so", end_of_segments(library)
    path.write_bytes(library[:end])
    _check_complete(path)
    run = run_python(QUANTIZE_ONE, BNB_CPU_LIBRARY=str(path))
    assert run.returncode == 0 and not run.stderr
    for cut in (end - 1, end // 2, 4096, 100, 64):  # inside the last segment, an earlier one, the table of segments
        path.write_bytes(library[:cut])
        with pytest.raises(OSError, match=rf"it ends at byte {cut} of \d+"):
            _check_complete(path)


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    library = (PACKAGE / "libbitsandbytes_cpu.so").read_bytes()
    for at, value, reason in (
        (32, b"\xff" * 8, "it ends at byte"),  # the table of segments lies far past the end
        (56, b"\0\0", "it has nothing to load"),  # no segments
        (54, b"\x08\0", "it has nothing to load"),  # segments of 8 bytes
        (4, b"\x01", "it is not a shared library"),  # of 32 bits
    ):
        path.write_bytes(library[:at] + value + library[at + len(value) :])
        with pytest.raises(OSError, match=reason):
            _check_complete(path)


@pytest.fixture(params=["missing", "empty", "garbage", "truncated", "a text", "truncated without sections"])
def broken_package(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return package_copy(tmp_path, broken()[request.param])


USES = {
    "quantize_4bit": "F.quantize_4bit(torch.ones(64))",
    "quantize_blockwise": "F.quantize_blockwise(torch.ones(64))",
    "dequantize_4bit": "torch.ops.bitsandbytes.dequantize_4bit("
    "torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1), 64, 'nf4', [64], torch.float32)",
    "dequantize_blockwise": "F.dequantize_blockwise(torch.zeros(64, dtype=torch.uint8), absmax=torch.ones(1))",
    "gemm_4bit": "torch.ops.bitsandbytes.gemm_4bit(torch.ones(1, 64), "
    "torch.zeros(32, 1, dtype=torch.uint8), [1, 64], torch.ones(1), 64, 'nf4')",
    "Linear4bit": "bitsandbytes.nn.Linear4bit(64, 64).to('cpu')",
}


def test_without_library_import_warns_and_use_raises(broken_package: Path) -> None:
    """One sentence each, naming the file; nothing runs in a slower way."""
    code = f"""
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import bitsandbytes
import torch, bitsandbytes.functional as F
print(bitsandbytes.__file__)
print(*[str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)], sep="@@")
for use in {list(USES.values())!r}:
    try:
        eval(use)
        print("it ran")
    except RuntimeError as e:
        print(str(e).splitlines()[0])
"""
    run = run_python(code, PYTHONPATH=str(broken_package))
    assert run.returncode == 0, run.stderr
    where, warning, *errors = run.stdout.splitlines()
    assert where.startswith(str(broken_package))
    assert re.search(r"^bitsandbytes .*libbitsandbytes_cpu\.so.*\.$", warning) and "@@" not in warning
    assert len(errors) == len(USES)
    for use, error in zip(USES, errors, strict=True):
        assert "libbitsandbytes_cpu.so" in error, (use, error)


def test_library_of_something_else_is_refused(tmp_path: Path) -> None:
    """A library that loads but has no kernels (here: one of torch's own)."""
    other = Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so"
    run = run_python(QUANTIZE_ONE, PYTHONPATH=str(package_copy(tmp_path, other.read_bytes())))
    assert run.returncode == 1
    assert "RuntimeWarning: bitsandbytes" in run.stderr and "kernel" in run.stderr.splitlines()[-1]


# ---- the instruction set


@pytest.mark.parametrize("name", ["none-such", "AVX2", " ", "avx2,scalar"])
def test_wrong_isa_is_named(name: str) -> None:
    run = run_python(QUANTIZE_ONE, BNB_FORCE_ISA=name)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert re.match(
        rf'RuntimeError: BNB_FORCE_ISA: "{re.escape(name)}" cannot run here, expected one of .*scalar', last
    ), last


# ---- names that other projects look at


def test_top_level_names() -> None:
    assert bitsandbytes.features == {"multi_backend"}
    assert bitsandbytes.supported_torch_devices == {"cpu", "cuda", "xpu", "hpu", "npu", "mps"}
    assert re.match(r"0\.50\.2\+cpp\.\d+", bitsandbytes.__version__)
    for name in ("matmul_4bit", "modules", "nn", "functional", "utils"):
        assert hasattr(bitsandbytes, name), name


def test_entry_points_are_loaded(tmp_path: Path) -> None:
    """A package that registers for the group bitsandbytes.backends is called on import. If it fails, it is named."""
    source = (
        "def register():\n    print('registered')\n    if 'FAIL' in __import__('os').environ: raise KeyError('oh')\n"
    )
    (tmp_path / "their_backend.py").write_text(source)
    info = tmp_path / "their_backend-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bitsandbytes.backends]\ntheirs = their_backend:register\n")
    run = run_python("import bitsandbytes", PYTHONPATH=str(tmp_path))
    assert run.returncode == 0 and run.stdout.strip() == "registered", run.stderr
    run = run_python("import bitsandbytes", PYTHONPATH=str(tmp_path), FAIL="1")
    assert run.returncode == 1 and "KeyError: 'oh'\n" in run.stderr
    assert run.stderr.splitlines()[-1] == "RuntimeError: bitsandbytes: failed to load backend theirs: 'oh'"


def test_a_library_in_another_folder_of_the_package_is_found(tmp_path, monkeypatch):
    """As in an editable installation."""
    for name in ("BNB_CUDA_LIBRARY", "BNB_CUDA_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(bitsandbytes, "__path__", [*bitsandbytes.__path__, str(tmp_path)])
    library = tmp_path / "libbitsandbytes_cuda.so"
    assert bitsandbytes.cextension.CUDA.path != library
    library.touch()
    assert bitsandbytes.cextension.CUDA.path == library
