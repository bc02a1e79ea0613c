"""Compiles every CUDA kernel for GPUs and tells the registers each takes. Fails on a spill, on a kernel with static
shared memory (the emulator cannot check it) and on a warning.

    cuda_registers.py 80 90a                 these architectures
    cuda_registers.py --table FILE [arch]    all that a release is built for, or those given; writes a Markdown table
    cuda_registers.py 90a --only quantize    one file of src/cuda

Uses nvcc from $NVCC or PATH. Compiles only: no GPU is needed."""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
RELEASED = ["75", "80", "86", "89", "90a", "100", "120"]  # as in src/cuda/CMakeLists.txt
FLAGS = ["-std=c++20", "-fmad=false", "--expt-relaxed-constexpr", "-Werror=all-warnings", "-Iinclude", "-Isrc"]
JOBS = int(os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or os.cpu_count() or 1)
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for 'sm_\w+'"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


def compile_one(nvcc: str, source: pathlib.Path, arch: str) -> list[dict]:
    command = [nvcc, *FLAGS, "-Xptxas=-v", f"-arch=sm_{arch}", "-cubin", "-o", os.devnull, str(source)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    kernels = [m.groupdict() for m in ENTRY.finditer(result.stdout + result.stderr)]
    more = {"arch": arch, "file": source.name}
    return [{**k, **more, "shared": re.search(r"(\d+) bytes smem", k["rest"])} for k in kernels]


def readable(names: list[str]) -> dict[str, str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    short = re.compile(
        r"\(anonymous namespace\)::|bnb::(cuda::)?(dev::)?|^void |\((int|unsigned int|long|bool|DType)\)"
    )
    result = {}
    for name, line in zip(names, text.splitlines(), strict=True):
        line = short.sub("", line)
        depth, end = 0, len(line)
        for i, c in enumerate(line):  # up to the list of arguments
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0:
                end = i
                break
        result[name] = line[:end].strip().replace("> >", ">>")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arch", nargs="*", default=RELEASED)
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--only", default="*", help="a file of src/cuda, without its suffix; may have wildcards")
    options = parser.parse_args()
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:
        sys.exit("no nvcc: set NVCC or PATH")

    sources = sorted((ROOT / "src/cuda").rglob(f"{options.only}.cu"))
    sources = [source for source in sources if "BNB_KERNEL" in source.read_text()]
    jobs = [(nvcc, source.relative_to(ROOT), arch) for source in sources for arch in options.arch]
    with concurrent.futures.ThreadPoolExecutor(JOBS) as pool:
        kernels = [k for found in pool.map(lambda job: compile_one(*job), jobs) for k in found]
    if not kernels:
        sys.exit("no kernel found in nvcc's output")

    names = readable([k["name"] for k in kernels])
    table: dict[tuple[str, str], dict[str, str]] = {}
    wrong = []
    spilled = sum(int(k["stores"]) + int(k["loads"]) for k in kernels)
    for k in kernels:
        kernel = names[k["name"]]
        table.setdefault((k["file"], kernel), {})[k["arch"]] = k["registers"]
        if int(k["stores"]) + int(k["loads"]):
            wrong.append(f"{k['file']}: {kernel} spills {k['stores']} + {k['loads']} bytes on sm_{k['arch']}")
        if k["shared"]:
            wrong.append(f"{k['file']}: {kernel} has {k['shared'][1]} bytes of static shared memory on sm_{k['arch']}")
    if options.table:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        version = re.search(r"release ([\d.]+)", told)
        lines = [
            "# Registers of the CUDA kernels",
            "",
            f"Registers of a thread by architecture, as ptxas of CUDA {version[1] if version else '?'} allots them.",
            f"{len(table)} kernels, {spilled} bytes spilled.",
            "Made by `./dev registers`, which fails if a kernel spills. No shared memory is static.",
            "",
            "| File | Kernel | " + " | ".join(f"sm_{arch}" for arch in options.arch) + " |",
            "|---|---|" + "---:|" * len(options.arch),
        ]
        for (file, kernel), by in sorted(table.items()):
            lines.append(f"| {file} | `{kernel}` | " + " | ".join(by.get(arch, "") for arch in options.arch) + " |")
        options.table.write_text("\n".join(lines) + "\n")
    print(f"{len(table)} kernels for sm_{', sm_'.join(options.arch)}: {len(wrong)} faults")
    if wrong:
        sys.exit("\n".join(wrong))


main()
