"""The kernels reach their device through device.cuh and ptx.cuh in src/cuda/device alone: no other name of CUDA or HIP,
so that the same files run on the host and build for both. Usage: check_device_names.py src/cuda"""

import pathlib
import re
import sys

ALLOWED = {"device.cuh", "ptx.cuh", "runtime.cpp"}
NAMES = re.compile(
    r"\b(threadIdx|blockIdx|blockDim|gridDim|warpSize|asm|atomic[A-Z]\w*|(cuda|hip|cublas|nv)[A-Z_]\w*"
    r"|__(global|device|host|shared|constant|launch_bounds|grid_constant|forceinline|noinline)__|__CUDA\w*|__HIP\w*|__NVCC\w*"
    r"|__(sync|shfl|ballot|any|all|activemask|threadfence|ldg|ldcs|stcs|cvta|byte_perm|funnelshift|dp4a|trap|nanosleep)\w*"
    r"|__(f|d|u|h|i|float|double|half|int|uint|bfloat16)\w*(2|_r[nzud]|_sat)\w*|__nv_\w*|__half2?)\b|#\s*pragma\s+unroll|<(cuda|hip|cooperative)\w*"
)


def code_of(path: pathlib.Path) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", path.read_text(), flags=re.S)


folder = pathlib.Path(sys.argv[1])
files = sorted(path for path in folder.rglob("*") if path.suffix in {".cu", ".cuh", ".h"} or path.name in ALLOWED)
found = {path.name: sorted({match.group().strip() for match in NAMES.finditer(code_of(path))}) for path in files}
for name in ALLOWED:
    assert found[name], f"{name} names no device: this check has gone blind"
wrong = {name: names for name, names in found.items() if names and name not in ALLOWED}
for name, names in wrong.items():
    print(f"{folder / name}: {', '.join(names)}")
print(f"{len(files) - len(ALLOWED)} files, {len(wrong)} with names of a device")
sys.exit(bool(wrong))
