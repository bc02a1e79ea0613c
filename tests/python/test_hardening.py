"""How the native libraries were linked: what protects them, and nothing of the folder they were built in."""

from __future__ import annotations

import os
import platform
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bitsandbytes import cextension

PROJECT = Path(__file__).parents[2]
LIBRARIES = [native.path for native in (cextension.CPU, cextension.CUDA) if native.path.is_file()]

DYNAMIC, STACK, RELRO, PROPERTIES = 2, 0x6474E551, 0x6474E552, 0x6474E553  # types of segments
NEEDED, STRING_TABLE, STRING_BYTES, RPATH, TEXT_RELOCATIONS, RUNPATH, FLAGS, FLAGS_1 = (
    1,
    5,
    10,
    15,
    22,
    29,
    30,
    0x6FFFFFFB,
)
X86 = platform.machine() in ("x86_64", "AMD64")


class Elf:
    """Program headers and the dynamic section of a 64-bit little-endian shared library."""

    def __init__(self, path: Path) -> None:
        self.data = path.read_bytes()
        assert self.data[:6] == b"\x7fELF\x02\x01"
        (at,) = struct.unpack_from("<Q", self.data, 32)
        size, count = struct.unpack_from("<HH", self.data, 54)
        names = ("type", "flags", "offset", "address", "physical", "bytes", "memory", "align")
        self.segments = [
            dict(zip(names, struct.unpack_from("<IIQQQQQQ", self.data, at + i * size), strict=True))
            for i in range(count)
        ]
        (dynamic,) = self.of_type(DYNAMIC)
        content = self.content(dynamic)
        self.dynamic = [struct.unpack_from("<qQ", content, i) for i in range(0, len(content), 16)]
        strings = self.file_offset(self.value(STRING_TABLE))
        self.strings = self.data[strings : strings + self.value(STRING_BYTES)]

    def of_type(self, kind: int) -> list[dict[str, int]]:
        return [s for s in self.segments if s["type"] == kind]

    def content(self, segment: dict[str, int]) -> bytes:
        return self.data[segment["offset"] : segment["offset"] + segment["bytes"]]

    def value(self, tag: int) -> int:
        return next((value for t, value in self.dynamic if t == tag), 0)

    def has(self, tag: int) -> bool:
        return any(t == tag for t, _ in self.dynamic)

    def file_offset(self, address: int) -> int:
        load = next(s for s in self.of_type(1) if s["address"] <= address < s["address"] + s["bytes"])
        return address - load["address"] + load["offset"]

    def needed(self) -> set[str]:
        return {self.strings[v : self.strings.index(b"\0", v)].decode() for t, v in self.dynamic if t == NEEDED}


@pytest.fixture(scope="module", params=LIBRARIES, ids=lambda p: p.name)
def elf(request: pytest.FixtureRequest) -> Elf:
    return Elf(request.param)


def test_a_library_is_there() -> None:
    assert LIBRARIES


def test_relocations_are_done_at_load_and_read_only_after(elf: Elf) -> None:
    assert elf.of_type(RELRO)
    assert elf.value(FLAGS) & 8 or elf.value(FLAGS_1) & 1, "no BIND_NOW"
    assert not elf.has(TEXT_RELOCATIONS) and not elf.value(FLAGS) & 4


def test_no_memory_is_writable_and_executable(elf: Elf) -> None:
    (stack,) = elf.of_type(STACK)
    assert not stack["flags"] & 1
    assert not [s for s in elf.of_type(1) if s["flags"] & 3 == 3]


def test_no_search_path(elf: Elf) -> None:
    assert not elf.has(RPATH) and not elf.has(RUNPATH)
    known = r"libtorch_cpu\.so|lib(stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so\.\d+|ld-linux.*"
    assert all(re.fullmatch(known, name) for name in elf.needed()), elf.needed()


def test_stack_protector(elf: Elf) -> None:
    assert b"\0__stack_chk_fail\0" in elf.strings


@pytest.mark.skipif(not X86, reason="control-flow enforcement is of x86")
def test_control_flow_enforcement(elf: Elf) -> None:
    landing_pads = sum(elf.content(s).count(b"\xf3\x0f\x1e\xfa") for s in elf.of_type(1) if s["flags"] & 1)
    assert landing_pads > 100, "without -fcf-protection"
    if b"cudart" not in elf.data:  # which is linked into the library for CUDA and has no mark
        (properties,) = elf.of_type(PROPERTIES)
        found = re.search(rb"\x02\x00\x00\xc0\x04\x00\x00\x00(.)", elf.content(properties), re.DOTALL)
        assert found and found[1][0] & 2, "no mark for shadow stacks"


def test_no_path_of_the_build(elf: Elf) -> None:
    for folder in {str(PROJECT), str(Path(torch.__file__).parent), str(Path.home()), sys.prefix}:
        assert folder == "/" or folder.encode() not in elf.data, folder
    sources = re.findall(rb"[\x20-\x7e]+\.(?:h|hpp|c|cpp|cu|cuh)\b", elf.data)
    assert sources and not [s for s in sources if s.startswith(b"/")], sources


@pytest.mark.slow
def test_builds_in_two_folders_are_equal(tmp_path: Path) -> None:
    """Two wheels of one commit: the same bytes, wherever and whenever they are built."""
    wheels = []
    for name in ("a", "b/deeper"):
        source = tmp_path / name
        keep = shutil.ignore_patterns("build", ".*", "*.so", "__pycache__", "dist")
        shutil.copytree(PROJECT, source, ignore=keep)
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "--wheel-dir",
            "dist",
            ".",
        ]
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "CCACHE_DISABLE": "1"}
        subprocess.run(command, cwd=source, env=environment, check=True, capture_output=True)
        (wheel,) = (source / "dist").glob("*.whl")
        wheels.append((wheel.name, wheel.read_bytes()))
    assert wheels[0] == wheels[1]
