"""libbnb.so through ctypes: it takes the states of checkpoints that QuantState.from_dict takes, and no others."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_fuzz_states import fuzzer
from torch import Tensor

import bitsandbytes.functional as F

LIBRARY = Path(os.environ.get("BNB_SHARED_LIBRARY", Path(__file__).parents[2] / "build" / "release" / "libbnb.so"))
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3, torch.uint8: 4, torch.int8: 5}
OTHER = 6


class CTensor(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("data", ctypes.c_void_p),
        ("size", ctypes.c_int64),
    )


class Library:
    def __init__(self) -> None:
        self.c = ctypes.CDLL(str(LIBRARY))
        self.c.bnb_last_error.restype = ctypes.c_char_p
        self.c.bnb_weight_items.restype = ctypes.POINTER(CTensor)
        self.c.bnb_weight_elements.restype = ctypes.c_int64

    def read(self, reader: str, codes: Tensor, items: dict[str, Tensor]) -> dict[str, Any] | str:
        """What dequantize_* and state_items give, or the message."""
        kept = {name: value.contiguous() for name, value in items.items()}
        array = (CTensor * len(kept))()
        for i, (name, value) in enumerate(kept.items()):
            text = name.encode(errors="replace")
            array[i] = CTensor(text, TYPES.get(value.dtype, OTHER), value.data_ptr() or None, value.numel())
        handle = ctypes.c_void_p()
        count = ctypes.c_size_t(len(kept))
        read = getattr(self.c, reader)
        size = ctypes.c_size_t(codes.numel())
        if read(ctypes.c_void_p(codes.data_ptr()), size, array, count, ctypes.byref(handle)):
            return str(self.c.bnb_last_error().decode())
        try:
            written = self.c.bnb_weight_items(handle, ctypes.byref(count))
            found: dict[str, Any] = {
                written[i].name.decode(): ctypes.string_at(
                    written[i].data, written[i].size * (4 if written[i].type == 0 else 1)
                )
                for i in range(count.value)
            }
            out = torch.empty(self.c.bnb_weight_elements(handle))
            n = ctypes.c_int64(out.numel())
            assert self.c.bnb_weight_dequantize(handle, ctypes.c_void_p(out.data_ptr()), 0, n) == 0
            found["decoded"] = out
            return found
        finally:
            self.c.bnb_weight_free(handle)


@pytest.fixture(scope="module")
def library() -> Iterator[Library]:
    if not LIBRARY.is_file():
        pytest.skip(f"no {LIBRARY}; BNB_SHARED_LIBRARY may name one")
    yield Library()


def plain(value: Any) -> bool:
    """What C can be given: dense tensors by names that are text without NUL."""
    return isinstance(value, dict) and all(
        isinstance(k, str) and "\0" not in k and isinstance(v, Tensor) and not v.is_meta and v.layout == torch.strided
        for k, v in value.items()
    )


def test_states_are_taken_and_refused_as_python_does(library: Library) -> None:
    saved = []
    for quant_type in ("nf4", "fp4"):
        for nested in (False, True):
            codes, state = F.quantize_4bit(torch.randn(6, 70), quant_type=quant_type, compress_statistics=nested)
            saved.append((codes, state.as_dict(packed=True)))
    counts = {"taken": 0, "refused": 0}
    for case in range(4000):
        mutator = fuzzer.Mutator(7, case)
        codes, items = mutator.random.choice(saved)
        broken = items if case < 20 else mutator.changed(items)
        if not plain(broken):
            continue
        found = library.read("bnb_weight_read_4bit", codes, broken)
        try:
            state = F.QuantState.from_dict(dict(broken), device="cpu")
            fits = state.quant_type is not None and codes.numel() == (math.prod(state.shape) + 1) // 2
        except ValueError:
            fits = False
        assert isinstance(found, dict) == fits, f"case {case}: {found}"
        counts["taken" if fits else "refused"] += 1
        if not isinstance(found, dict):
            continue
        state.dtype = torch.float32
        decoded = F.dequantize_4bit(codes, state).reshape(-1)
        assert torch.equal(decoded.nan_to_num(7.0), found["decoded"].nan_to_num(7.0)), f"case {case}"
        state = F.QuantState.from_dict(dict(broken), device="cpu")
        for name, value in state.as_dict(packed=True).items():
            if name != "quant_map":  # which is that of the type here
                assert value.numpy().tobytes() == found[name], f"case {case}: {name}"
    assert counts["taken"] > 200 and counts["refused"] > 500, counts
