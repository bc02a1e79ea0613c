"""Seeded wrong calls: right ones of which some arguments were spoilt. Call number i of a seed is always the same.

Targets and their arguments are discovered: every operator of torch.ops.bitsandbytes by its schema, every function that
bitsandbytes.functional exports by its signature. Only what makes a right call is told here, by the names of arguments.
"""

from __future__ import annotations

import copy
import ctypes
import inspect
import mmap
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes._ops_fourbit import linear_4bit_layout

DTYPES = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64),
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint16),
]
INTS = [
    0,
    1,
    -1,
    2,
    3,
    31,
    33,
    48,
    63,
    65,
    96,
    100,
    8192,
    2**31,
    2**32 + 64,
    2**40,
    2**62,
    2**63 - 1,
    -(2**63),
    -64,
    2**64,
]
SIZES = [
    [],
    [0],
    [-1],
    [-1, -1],
    [2**62, 8],
    [2**31, 2**31],
    [2**63 - 1, 2],
    [3, 5],
    [7],
    [1, 2, 3, 4],
    [0, 64],
    [64, 0],
]
SIZES += [[2**40, 1], [-(2**62), -8], [1.5], ["a"], [None]]
STRINGS = ["", "NF4", "nf4 ", "int8", "fp8", "nf4\0", "ünf", "x" * 5000, "nf", "fp44"]
OBJECTS = [
    None,
    5,
    1.5,
    "nf4",
    b"nf4",
    [],
    [1, 2],
    {},
    object(),
    torch.float32,
    float("nan"),
    True,
    torch.Size([2, 2]),
    2**70,
]


HELPERS = {
    "get_ptr",
    "is_on_gpu",
    "has_avx512bf16",
    "pack_dict_to_tensor",
    "unpack_tensor_to_dict",
}  # they check nothing


@dataclass
class Target:
    name: str
    call: Callable[..., Any]
    parameters: dict[str, str]  # name -> type as the schema writes it; "" where there is none
    overload: Any = None


def targets() -> list[Target]:
    found = []
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        if name.startswith("bitsandbytes::"):
            op, _, variant = name.removeprefix("bitsandbytes::").partition(".")
            overload = getattr(getattr(torch.ops.bitsandbytes, op), variant or "default")
            parameters = {a.name: str(a.type) for a in overload._schema.arguments}
            # The type is an int to the dispatcher; only its name tells a dtype.
            parameters |= {p: "ScalarType" for p in parameters if p in ("dtype", "quant_storage")}
            found.append(Target(name, overload, parameters, overload))
    functions = {n: getattr(F, n) for n in F.__all__ if inspect.isfunction(getattr(F, n)) and n not in HELPERS}
    functions |= {"matmul": bnb.matmul, "matmul_4bit": bnb.matmul_4bit, "QuantState.from_dict": F.QuantState.from_dict}
    for name, function in sorted(functions.items()):
        found.append(Target(f"functional.{name}", function, dict.fromkeys(inspect.signature(function).parameters, "")))
    return found


# ---- right arguments


def right_arguments(target: Target, rng: random.Random) -> dict[str, Any]:
    """By the names of the parameters; one whose name says nothing takes its default, or a value that suits its type."""
    n, k, m = rng.choice([1, 2, 5, 16, 33]), rng.choice([1, 7, 32, 64, 100]), rng.choice([1, 2, 5, 33])
    dtype, quant_type = rng.choice([torch.float32, torch.float16, torch.bfloat16]), rng.choice(["nf4", "fp4"])
    blocksize, storage = rng.choice([32, 64, 256, 4096]), rng.choice([torch.uint8, torch.bfloat16, torch.float32])
    names = target.parameters
    w = torch.randn(n, k).to(dtype)
    packed, state = F.quantize_4bit(w, blocksize=blocksize, quant_type=quant_type, quant_storage=storage)
    codes, state8 = F.quantize_blockwise(w, blocksize=blocksize)
    code4, code8 = F.get_4bit_type(quant_type, device="cpu"), F.create_dynamic_map()
    known: dict[str, Any] = {
        "blocksize": blocksize, "quant_type": quant_type, "quant_storage": storage, "dtype": dtype,
        "device": "cpu", "typename": quant_type, "name": quant_type, "compress_statistics": rng.random() < 0.5,
        "qs_dict": state.as_dict(packed=rng.random() < 0.5), "shape": [n, k], "shapeB": [n, k],
    }  # fmt: skip
    if "numbers" in names:
        known |= {"name": "dynamic", "numbers": [1.0, 7.0, 8.0], "out": torch.empty(256)}
    if "layout" in names:
        known["layout"] = linear_4bit_layout((n, k), blocksize, quant_type)
    if "shapeB" in names or "state" in names or "B" in names:  # a product
        known |= {
            "A": torch.randn(m, k).to(dtype),
            "B": packed,
            "absmax": state.absmax,
            "code": code4,
            "bias": w[:, 0].clone(),
        }
        known |= {"state": state, "quant_state": state, "out": torch.empty(m, n, dtype=dtype)}
        if rng.random() < 0.5 or names.get("absmax_8bit") == "Tensor":
            offset = state.absmax.mean()
            nested, second = F.quantize_blockwise(state.absmax - offset, blocksize=256)
            known |= {"absmax_8bit": nested, "absmax_code": second.code, "absmax_offset": offset}
            if "absmax_8bit" in names:
                known["absmax"] = second.absmax
            known["state"] = known["quant_state"] = F.quantize_4bit(
                w, blocksize=blocksize, quant_type=quant_type, quant_storage=storage, compress_statistics=True
            )[1]
    elif "blockwise" in target.name:
        dequantize = "dequantize" in target.name
        known |= {"A": codes if dequantize else w, "absmax": state8.absmax, "code": code8, "quant_state": state8}
        known["out"] = torch.empty(
            n, k, dtype=(torch.float32 if ":" not in target.name and rng.random() < 0.5 else dtype)
        )
        if not dequantize:
            known["out"] = torch.empty(n, k, dtype=torch.uint8)
    elif "dequantize" in target.name:
        known |= {"A": packed, "absmax": state.absmax, "quant_state": state, "out": torch.empty(n, k, dtype=dtype)}
    elif "A" in names:
        known |= {"A": w, "absmax": torch.empty_like(state.absmax), "out": torch.empty_like(packed)}
    if "int8" in target.name or target.name.endswith(("igemm", ".matmul")):
        known |= int8_arguments(target, m, n, k, dtype, rng)
    if "optimizer" in target.name:
        known |= optimizer_arguments(target, n * k, dtype, rng)
    arguments = {}
    for name, type_name in names.items():
        optional = type_name.startswith("Optional") or not type_name
        if name in known and not (optional and name not in ("A", "B", "quant_state", "state") and rng.random() < 0.4):
            arguments[name] = known[name]
        elif type_name in GENERIC:
            arguments[name] = GENERIC[type_name](rng)
        elif type_name.startswith("Optional"):
            arguments[name] = None
    return arguments


def int8_arguments(target: Target, m: int, n: int, k: int, dtype: torch.dtype, rng: random.Random) -> dict[str, Any]:
    x = torch.randn(m, k).to(dtype)
    x[:, k // 2] *= rng.choice([1, 9])
    ca, sca, columns = torch.ops.bitsandbytes.int8_vectorwise_quant(x, 6.0)
    cb, scb, _ = torch.ops.bitsandbytes.int8_vectorwise_quant(torch.randn(n, k).to(dtype), 0.0)
    known = {
        "A": x, "B": cb, "CA": ca, "CB": cb, "SCA": sca, "SCB": scb, "row_stats": sca, "col_stats": scb, "stats": sca,
        "threshold": rng.choice([0.0, 6.0, 1]), "outlier_cols": columns, "bias": torch.randn(n).to(dtype),
    }  # fmt: skip
    sums = ca.int() @ cb.int().t()
    if target.name.endswith(
        ("int8_linear_matmul", "int8_linear_matmul.out", "int8_scaled_mm", "int8_vectorwise_dequant")
    ):
        known |= {"A": ca, "out": torch.empty_like(sums)}
    if "int8_mm_dequant" in target.name:
        known |= {"A": sums, "out": torch.empty_like(sums, dtype=dtype)}
    if "igemm" in target.name:
        batch = () if "batched" not in target.name else (2,)
        known |= {"A": ca.expand(*batch, m, k), "B": cb.t().contiguous().expand(*batch, k, n)}
        known["out"] = torch.empty(*batch, m, n, dtype=torch.int32)
    return known


def optimizer_arguments(target: Target, n: int, dtype: torch.dtype, rng: random.Random) -> dict[str, Any]:
    rules = ["adam", "lamb", "ademamix", "lion", "momentum", "lars", "rmsprop", "adagrad"]
    rule, coded = rng.choice(rules), "8bit" in target.name or rng.random() < 0.5
    coded = coded and "32bit" not in target.name
    state = torch.zeros(n, dtype=torch.uint8 if coded else torch.float32)
    absmax, copies = torch.zeros((n + 255) // 256), 2 if rule == "ademamix" else 1
    known: dict[str, Any] = {
        "p": torch.randn(n), "g": torch.randn(n).to(dtype), "state1": torch.cat([state] * copies), "state2": state,
        "absmax1": torch.cat([absmax] * copies), "absmax2": absmax.clone(), "unorm": torch.zeros(1),
    }  # fmt: skip
    if "step" not in target.parameters:  # lists of one tensor
        known = {name: [t] for name, t in known.items() if coded or "absmax" not in name}
        known |= {"absmax1": known.get("absmax1", []), "absmax2": known.get("absmax2", []), "steps": [3]}
    known |= {"optimizer_name": rule, "step": 3, "unorm_vec": torch.zeros(1), "clock": torch.tensor([0])}
    known |= {"qmap1": F.create_dynamic_map(True), "qmap2": F.create_dynamic_map(False), "seed": rng.choice([None, 7])}
    known |= {"t_alpha": rng.choice([0, 9]), "t_beta3": rng.choice([0, 9]), "offsets": [], "gnorm_scales": []}
    known |= {name: 0.1 for name in target.parameters if name in ("lr", "eps", "weight_decay", "max_unorm")}
    known |= {name: 0.9 for name in target.parameters if name.startswith("beta")} | {"p_norms": [], "gnorm_scale": 1.0}
    return known | {"alpha": 2.0, "dampening": 0.1, "param_norm": 1.0}


GENERIC: dict[str, Callable[[random.Random], Any]] = {
    "Tensor": lambda rng: torch.randn(rng.choice([1, 4, 33]), rng.choice([1, 8, 64])),
    "int": lambda rng: rng.choice([1, 2, 64, 256]),
    "number": lambda rng: rng.choice([1, 0.5]),
    "float": lambda rng: rng.random(),
    "bool": lambda rng: rng.random() < 0.5,
    "str": lambda rng: rng.choice(["nf4", "adam", "lion"]),
    "List[int]": lambda rng: [rng.choice([1, 4, 33]), rng.choice([1, 8, 64])],
    "ScalarType": lambda rng: rng.choice(DTYPES),
}


# ---- spoilt arguments


def huge(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1)[:1].expand(2**40) if t.numel() else t


SPOIL_TENSOR: list[Callable[[torch.Tensor, random.Random], Any]] = [
    lambda t, rng: t.to(rng.choice(DTYPES)),
    lambda t, rng: t.to(rng.choice(DTYPES)),
    lambda t, rng: t.to("meta"),
    lambda t, rng: t.reshape(-1)[: t.numel() // 2],
    lambda t, rng: t.reshape(-1)[:-1],
    lambda t, rng: t.reshape(-1)[:0],
    lambda t, rng: t.new_empty((0, *t.shape[1:])),
    lambda t, rng: torch.zeros((), dtype=t.dtype),
    lambda t, rng: torch.cat([t.reshape(-1)] * 2),
    lambda t, rng: torch.stack([t, t], dim=-1)[..., 0],
    lambda t, rng: t.t() if t.dim() == 2 else t[None],
    lambda t, rng: t.reshape(-1)[:1].expand(t.shape),
    lambda t, rng: huge(t),
    lambda t, rng: t.to_sparse() if t.dtype.is_floating_point else t[None, None],
    lambda t, rng: t.detach().requires_grad_() if t.dtype.is_floating_point else -t,
    lambda t, rng: (
        torch.full_like(t, rng.choice([float("nan"), float("inf"), -float("inf"), 0.0]))
        if t.dtype.is_floating_point
        else t
    ),
    lambda t, rng: torch.nn.Parameter(t, requires_grad=False),
    lambda t, rng: t.clone().uniform_(-1e30, 1e30) if t.dtype == torch.float32 else t,
    lambda t, rng: t.reshape(-1, 1, 1),
    lambda t, rng: rng.choice(OBJECTS),
]


def spoil_state(state: Any, rng: random.Random) -> Any:
    state = copy.deepcopy(state)
    name = rng.choice(["absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset", "state2", "nested"])
    if name == "state2" and state.state2 is not None and rng.random() < 0.7:
        state.state2 = spoil_state(state.state2, rng)
    else:
        setattr(state, name, spoil(getattr(state, name), name, "", rng))
    return state


def spoil(value: Any, name: str, type_name: str, rng: random.Random) -> Any:
    if isinstance(value, torch.Tensor):
        try:
            return rng.choice(SPOIL_TENSOR)(value, rng)
        except RuntimeError:  # a change that this tensor cannot take
            return None
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return rng.choice([[spoil(value[0], name, "", rng)], [spoil(value[0], name, "", rng)], [], value * 2, [None]])
    if isinstance(value, F.QuantState):
        return spoil_state(value, rng) if rng.random() < 0.9 else rng.choice(OBJECTS)
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.4 else rest | {key: spoil(value[key], key, "", rng)}
    if isinstance(value, torch.dtype) or type_name == "ScalarType":
        return rng.choice([*DTYPES, torch.quint8, torch.complex128, *OBJECTS])
    if isinstance(value, bool):
        return rng.choice([not value, *OBJECTS])
    if isinstance(value, int) or type_name == "int":
        return rng.choice([*INTS, *INTS, *OBJECTS])
    if isinstance(value, str) or type_name == "str":
        return rng.choice([*STRINGS, *STRINGS, *OBJECTS])
    if isinstance(value, list | tuple | torch.Size):
        return rng.choice([*SIZES, *SIZES, *OBJECTS])
    return rng.choice([*OBJECTS, *INTS, *STRINGS, torch.randn(4)])


@dataclass
class Call:
    target: Target
    arguments: dict[str, Any]
    spoilt: list[str]

    def __str__(self) -> str:
        arguments = ", ".join(f"{k}={describe(v)}" for k, v in self.arguments.items())
        return f"{self.target.name}({arguments}) spoilt: {self.spoilt}"


def describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        strides = (
            f" stride {tuple(value.stride())}" if value.layout == torch.strided and not value.is_contiguous() else ""
        )
        return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)}{strides} {value.device} {value.layout}>"
    if isinstance(value, F.QuantState):
        return "QuantState(" + ", ".join(f"{k}={describe(v)}" for k, v in vars(value).items() if v is not None) + ")"
    if isinstance(value, list):
        return "[" + ", ".join(map(describe, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {describe(v)}" for k, v in value.items()) + "}"
    return repr(value)[:80]


def make_call(seed: int, index: int, all_targets: list[Target], guarded: GuardedMemory) -> Call:
    rng = random.Random(f"{seed} {index}")
    torch.manual_seed(rng.getrandbits(60))
    operators = [t for t in all_targets if t.overload is not None]
    target = rng.choice(operators if rng.random() < 0.65 else all_targets)
    arguments = right_arguments(target, rng)
    count = rng.choices([0, 1, 2, 3], [1, 6, 2, 1])[0]
    spoilt = rng.sample(list(target.parameters), min(count, len(target.parameters)))
    for name in spoilt:
        arguments[name] = spoil(arguments.get(name), name, target.parameters[name], rng)
    if spoilt and rng.random() < 0.03:
        arguments.pop(rng.choice(list(arguments)), None)
    guarded.reset()
    return Call(target, {k: guarded.place(v, rng) for k, v in arguments.items()}, spoilt)


# ---- memory


class GuardedMemory:
    """Puts tensors right before a page that may not be touched, or right behind one: an access past an end is fatal."""

    SIZE = 1 << 16

    def __init__(self, count: int = 24) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        page = mmap.PAGESIZE
        self.maps, self.arenas, self.used = [], [], 0
        for _ in range(count):
            memory = mmap.mmap(-1, self.SIZE + 2 * page)
            address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for guard in (address, address + page + self.SIZE):
                if libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0) != 0:
                    raise OSError(ctypes.get_errno(), "mprotect")
            self.maps.append(memory)
            self.arenas.append(torch.frombuffer(memory, dtype=torch.uint8, offset=page, count=self.SIZE))

    def reset(self) -> None:
        self.used = 0

    def place(self, value: Any, rng: random.Random) -> Any:
        if isinstance(value, F.QuantState):
            for name in ("absmax", "code", "offset", "state2"):
                setattr(value, name, self.place(getattr(value, name), rng))
            return value
        if isinstance(value, list):
            return [self.place(v, rng) for v in value]
        plain = type(value) is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided
        if not plain or not value.is_contiguous() or value.requires_grad or value.is_complex():
            return value
        size = value.numel() * value.element_size()
        if not 0 < size <= self.SIZE or self.used == len(self.arenas):
            return value
        arena = self.arenas[self.used]
        self.used += 1
        begin = 0 if rng.random() < 0.2 else self.SIZE - size
        new = arena[begin : begin + size].view(value.dtype).view(value.shape)
        return new.copy_(value)
