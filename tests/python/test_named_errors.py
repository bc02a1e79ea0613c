"""None for a tensor and memory that cannot be had: the message names the operation and the argument."""

from __future__ import annotations

import random
from typing import Any

import pytest
from fuzz_calls import right_arguments, targets
from process import run_python

from bitsandbytes._ops import CPU_SCHEMAS

# Those of the CPU alone have one tensor; without it torch sees no device, and finds no kernel.
OPERATORS = [t for t in targets() if t.overload is not None and t.name.rpartition("::")[2] not in CPU_SCHEMAS]


def required_tensors(target: Any) -> list[str]:
    return [name for name, type_name in target.parameters.items() if type_name == "Tensor"]


@pytest.mark.parametrize("target", OPERATORS, ids=lambda t: t.name.removeprefix("bitsandbytes::"))
def test_none_for_a_tensor(target: Any) -> None:
    op = target.name.removeprefix("bitsandbytes::").partition(".")[0]
    for argument in required_tensors(target):
        arguments = right_arguments(target, random.Random(1))
        with pytest.raises(ValueError, match=f"^{op}: {argument} is None, expected a Tensor$"):
            target.call(**{**arguments, argument: None})
    if required_tensors(target):  # no tensor at all, which no device is to be seen from
        nothing = {
            k: None if t.endswith(("Tensor", "Optional[Tensor]")) else arguments[k]
            for k, t in target.parameters.items()
        }
        with pytest.raises(ValueError, match=f"^{op}: {required_tensors(target)[0]} is None, expected a Tensor$"):
            target.call(**nothing)


OUT_OF_MEMORY = """
import re, resource, torch, bitsandbytes.functional as F
ops, one = torch.ops.bitsandbytes, lambda *shape, dtype=torch.float32: torch.ones(1, dtype=dtype).expand(*shape)
u8, i8, f32, bf16 = torch.uint8, torch.int8, torch.float32, torch.bfloat16
n = 1 << 28
rows = (n // 64, 64)
x, q, p, s = torch.ones(4, 64), torch.zeros(n // 2, dtype=u8), torch.ones(n // 8), torch.ones(1)
many, wide, weight = torch.ones(n // 64), torch.ones(512, 1 << 16, dtype=bf16), torch.ones(1, 1 << 16, dtype=i8)
bytes_, scales, y = one(1 << 25, 1, dtype=u8), torch.ones(1 << 20), torch.empty(1 << 26, dtype=bf16)
code = F.create_dynamic_map()
torch.set_num_threads(1)
CALLS = {
    "quantize_4bit: .* contiguous copy of A ": lambda: ops.quantize_4bit(one(*rows), 64, "nf4", u8),
    "quantize_4bit: .* contiguous copy of A .*bfloat16$": lambda: F.quantize_4bit(one(*rows, dtype=bf16)),
    "quantize_blockwise: .* contiguous copy of A ": lambda: ops.quantize_blockwise(one(n), code, 256),
    "dequantize_4bit: .* contiguous copy of A .*uint8$":
        lambda: ops.dequantize_4bit.out(bytes_, scales, 64, "nf4", [1 << 26], bf16, y),
    "dequantize_4bit: .* a result of shape ": lambda: ops.dequantize_4bit(q, many, 64, "nf4", [n], f32),
    "gemm_4bit: .* contiguous copy of A ": lambda: ops.gemm_4bit(one(*rows), q, [1, 64], s, 64, "nf4"),
    "gemm_4bit: .* contiguous copy of B ":
        lambda: ops.gemm_4bit(torch.ones(1, 1 << 13), bytes_, [1 << 13, 1 << 13], scales, 64, "nf4"),
    "gemm_4bit: .* contiguous copy of bias ":
        lambda: ops.gemm_4bit(torch.ones(1, 32), q, [n // 32, 32], many, 64, "nf4", one(n // 32)),
    "int8_vectorwise_quant: .* contiguous copy of A ": lambda: F.int8_vectorwise_quant(one(*rows, dtype=bf16)),
    "int8_linear_matmul: .* contiguous copy of B ": lambda: ops.int8_linear_matmul(x.to(i8), one(*rows, dtype=i8)),
    "int8_linear: .* contiguous copy of CB ": lambda: ops.int8_linear(x, one(*rows, dtype=i8), many, None, 0.0),
    "optimizer_update_32bit: .* contiguous copy of g ":
        lambda: ops.optimizer_update_32bit("lion", one(n // 8), p, p, None, None, *[0.] * 8, 1, 0., 1.),
    "linear_int8: [0-9]+ bytes of scratch memory could not be ": lambda: ops.int8_linear(wide, weight, s, None, 0.0),
}
size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
resource.setrlimit(resource.RLIMIT_AS, (size + (16 << 20), resource.RLIM_INFINITY))
for pattern, call in CALLS.items():
    try:
        call()
        print("returned:", pattern)
    except RuntimeError as error:
        if not re.search("^" + pattern, str(error)) or "/" in str(error):
            print("wrong:", pattern, "->", error)
    except BaseException as error:
        print("wrong:", pattern, "->", type(error), error)
print("done")
"""


def test_out_of_memory_names_operation_and_argument() -> None:
    """The memory of copies, results and scratch; a RuntimeError, as torch's own for the CPU."""
    run = run_python(OUT_OF_MEMORY)
    assert run.returncode == 0 and run.stdout == "done\n", run.stdout + run.stderr[-2000:]
