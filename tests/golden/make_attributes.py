"""Writes attributes.json: which public attributes of parameters, states and layers can be read, written and deleted in
the released package 0.50.2.

pip install bitsandbytes==0.50.2, in a virtual environment of its own; then, with its interpreter:
python tests/golden/make_attributes.py tests/golden/attributes.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import bitsandbytes as bnb


def quant_state() -> Any:
    return bnb.functional.quantize_4bit(torch.randn(8, 64), compress_statistics=True, quant_type="nf4")[1]


def used(layer: Any) -> Any:
    layer = layer.to("cpu")
    layer(torch.randn(2, 64))
    return layer


OBJECTS: dict[str, tuple[type, Callable[[], Any]]] = {
    "Int8Params": (torch.nn.Parameter, lambda: bnb.nn.Int8Params(torch.randn(8, 64), requires_grad=False)),
    "Int8Params, quantized": (
        torch.nn.Parameter,
        lambda: bnb.nn.Int8Params(torch.randn(8, 64), requires_grad=False).to("cpu"),
    ),
    "Params4bit": (torch.nn.Parameter, lambda: bnb.nn.Params4bit(torch.randn(8, 64))),
    "Params4bit, quantized": (torch.nn.Parameter, lambda: bnb.nn.Params4bit(torch.randn(8, 64)).to("cpu")),
    "QuantState": (object, quant_state),
    "MatmulLtState": (object, bnb.MatmulLtState),
    "Linear4bit": (torch.nn.Linear, lambda: used(bnb.nn.Linear4bit(64, 8))),
    "Linear8bitLt": (torch.nn.Linear, lambda: used(bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False))),
    "state of Linear8bitLt": (object, lambda: used(bnb.nn.Linear8bitLt(64, 8, has_fp16_weights=False)).state),
    "Embedding4bit": (torch.nn.Embedding, lambda: bnb.nn.Embedding4bit(8, 64).to("cpu")),
    "Embedding8bit": (torch.nn.Embedding, lambda: bnb.nn.Embedding8bit(8, 64).to("cpu")),
    "OutlierAwareLinear": (torch.nn.Linear, lambda: bnb.nn.OutlierAwareLinear(64, 8)),
    "StableEmbedding": (torch.nn.Embedding, lambda: bnb.nn.StableEmbedding(8, 64)),
}

WAYS: dict[str, Callable[[Any, str], Any]] = {
    "read": getattr,
    "write": lambda o, n: setattr(o, n, getattr(o, n)),
    "write None": lambda o, n: (setattr(o, n, None), _expect(getattr(o, n) is None)),
    "write in __dict__": lambda o, n: (vars(o)[n], vars(o).__setitem__(n, None), _expect(getattr(o, n) is None)),
    "delete": delattr,
}


def _expect(holds: bool) -> None:
    if not holds:
        raise AssertionError


def outcome(make: Callable[[], Any], name: str, act: Callable[[Any, str], Any]) -> str:
    try:
        act(make(), name)
    except Exception as error:  # noqa: BLE001  (whatever it is, its name is the answer)
        return type(error).__name__
    return "works"


def describe() -> dict[str, dict[str, dict[str, str]]]:
    """By kind of object, attribute, and what is done to it: "works", or the type of the error."""
    found: dict[str, Any] = {}
    for kind, (base, make) in OBJECTS.items():
        example = make()
        known = set(dir(base(1, 1) if issubclass(base, torch.nn.Module) else base))
        names = {n for n in {*dir(example), *vars(example)} - known if not n.startswith("_")}
        names = {n for n in names if not callable(getattr(type(example), n, None)) or n in vars(example)}
        found[kind] = {n: {way: outcome(make, n, act) for way, act in WAYS.items()} for n in sorted(names)}
    return found


if __name__ == "__main__":
    lines = json.dumps(describe(), separators=(",", ":")).replace('}},"', '}},\n"')
    Path(sys.argv[1]).write_text(lines + "\n")
