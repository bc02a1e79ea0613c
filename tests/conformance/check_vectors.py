"""Checks the bitsandbytes that Python finds against the published vectors: this one, or the released one.

    python tests/conformance/check_vectors.py [--released]

--released: what the released package is known to do differently (README.md) is let pass. Prints a line per case.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitsandbytes as bnb
import bitsandbytes.functional as F

HERE = Path(__file__).resolve().parent
TOLERANCE = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # of the sum of |a * w|


def load() -> list[dict[str, Any]]:
    """The cases, with their tensors in place of what describes them."""
    manifest = json.loads((HERE / "vectors.json").read_text())
    blob = bytearray((HERE / manifest["blob"]).read_bytes())
    for case in manifest["cases"]:
        for name, entry in case["tensors"].items():
            dtype, count = getattr(torch, entry["dtype"]), torch.Size(entry["shape"]).numel()
            empty = torch.empty(entry["shape"], dtype=dtype)
            flat = torch.frombuffer(blob, dtype=dtype, count=count, offset=entry["offset"]) if count else empty
            case["tensors"][name] = flat.view(entry["shape"])
    return manifest["cases"]


def equal(what: str, given: Tensor, expected: Tensor) -> None:
    given, expected = given.reshape(-1).contiguous(), expected.reshape(-1).contiguous()
    assert given.dtype == expected.dtype and given.numel() == expected.numel(), f"{what}: {given.dtype}, {given.shape}"
    differ = (given.view(torch.uint8) != expected.view(torch.uint8)).nonzero()
    assert not len(differ), f"{what}: byte {int(differ[0])} of {len(differ)} that differ"


def decoded(given: Tensor, t: dict[str, Tensor], released: bool) -> None:
    """The released package gives zeros of fp4 another sign."""
    if released:
        given, t = given + 0.0, {"decoded": t["decoded"] + 0.0}
    equal("decoded", given, t["decoded"])


def near(what: str, codes: Tensor, expected: Tensor) -> None:
    """At most one in fifty codes is that of a neighbour."""
    off = (codes.reshape(-1).int() - expected.reshape(-1).int()).abs()
    assert int(off.max()) <= 1 and int((off > 0).sum()) <= len(off) // 50, (
        f"{what}: {int((off > 0).sum())} codes differ"
    )


def check_product(given: Tensor, t: dict[str, Tensor], a: Tensor, w: Tensor, tolerance: float | None = None) -> None:
    size = a.double().abs() @ w.double().abs().t()
    error = (given.double() - t["product"]).abs()
    assert bool((error <= (tolerance or TOLERANCE[given.dtype]) * size).all()), (
        f"product: {float((error / size).max()):g} off"
    )


def state_of(case: dict[str, Any]) -> F.QuantState:
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    t = {k: v for k, v in case["tensors"].items() if k in names or k.startswith("quant_state")}
    return F.QuantState.from_dict(dict(t), torch.device("cpu"))


def check_4bit(case: dict[str, Any], released: bool) -> None:
    t = case["tensors"]
    options = {"blocksize": case["blocksize"], "quant_type": case["quant_type"]}
    packed, state = F.quantize_4bit(t["x"], compress_statistics=case["nested"], **options)
    items = state.as_dict(packed=True)
    whole = t["x"].numel() // case["blocksize"] if released and case["released"] != "equal" else None
    equal("codes", packed.view(-1)[: whole and whole * case["blocksize"] // 2], t["codes"][: whole and whole * 32])
    for name, value in items.items():
        if released and case["nested"] and name == "absmax":
            near(name, value, t[name])
        else:
            equal(name, value[:whole] if name == "absmax" else value, t[name][:whole] if name == "absmax" else t[name])
    decoded(F.dequantize_4bit(t["codes"].view(-1, 1), state_of(case)), t, released)
    if "product" in t:
        y = bnb.matmul_4bit(t["a"], t["codes"].view(-1, 1).t(), state_of(case))
        check_product(y, t, t["a"], t["decoded"])


def check_8bit(case: dict[str, Any], released: bool) -> None:
    t = case["tensors"]
    codes, state = F.quantize_blockwise(t["x"], blocksize=case["blocksize"], nested=case["nested"])
    (near if released else equal)("codes", codes, t["codes"])
    if released:  # whose packed states are those of 4 bits alone
        (near if case["nested"] else equal)("absmax", state.absmax, t["absmax"])
        state.absmax = t["absmax"]
        if case["nested"]:
            equal("nested_absmax", state.state2.absmax, t["nested_absmax"])
    else:
        for name, value in state.as_dict(packed=True).items():
            equal(name, value, t[name])
        state = state_of(case)
    equal("decoded", F.dequantize_blockwise(t["codes"], state), t["decoded"])


def check_int8(case: dict[str, Any], released: bool) -> None:
    t = case["tensors"]
    weight_codes, weight_scale, _ = F.int8_vectorwise_quant(t["weight"])
    equal("weight_codes", weight_codes, t["weight_codes"])
    equal("weight_scale", weight_scale, t["weight_scale"])
    codes, scale, outliers = F.int8_vectorwise_quant(t["x"].clone(), case["threshold"])
    equal("codes", codes, t["codes"])
    equal("scale", scale, t["scale"])
    equal("outliers", torch.empty(0, dtype=torch.int64) if outliers is None else outliers.long(), t["outliers"])
    equal("sums", F.int8_linear_matmul(t["codes"], t["weight_codes"]), t["sums"])
    equal("decoded", F.int8_vectorwise_dequant(t["weight_codes"], t["weight_scale"]), t["decoded"])
    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.threshold, state.has_fp16_weights = (
        t["weight_codes"],
        t["weight_scale"],
        case["threshold"],
        False,
    )
    y = bnb.matmul(t["x"].clone(), t["weight_codes"], state=state)
    check_product(y, t, t["x"], t["decoded"], 2**-7 if released else None)  # it rounds scales and sums more often


CHECKS = {"4bit": check_4bit, "8bit": check_8bit, "int8": check_int8}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--released", action="store_true")
    released = parser.parse_args().released
    failed = 0
    for case in load():
        try:
            CHECKS[case["kind"]](case, released)
            print(f"{case['name']}: ok")
        except AssertionError as error:
            failed += 1
            print(f"{case['name']}: {error}")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
