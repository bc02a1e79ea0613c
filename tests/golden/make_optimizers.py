"""Writes optimizers.json: what the classes of bitsandbytes.optim look like in the released package 0.50.2.

pip install bitsandbytes==0.50.2, in a virtual environment of its own; then, with its interpreter:
python tests/golden/make_optimizers.py tests/golden/optimizers.json
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import torch

REQUIRED = {"SGD": {"lr": 1e-3, "momentum": 0.9}, "LARS": {"lr": 1e-3, "momentum": 0.9}, "Pyto": {"momentum": 0.9}}


def signature(function: Any) -> list[list[str]]:
    return [[p.name, repr(p.default), p.kind.name] for p in inspect.signature(function).parameters.values()]


def values(options: dict[str, Any]) -> dict[str, str]:
    return {key: repr(value) for key, value in options.items() if key != "params"}


def state(entry: dict[str, Any]) -> dict[str, Any]:
    tensors = {k: [str(v.dtype), list(v.shape)] if isinstance(v, torch.Tensor) else repr(v) for k, v in entry.items()}
    return dict(sorted(tensors.items()))


def describe(name: str) -> dict[str, Any]:
    """One class: its signature and bases, and what an optimizer of 8192 and of 10 elements has after a step."""
    import bitsandbytes.optim

    cls = getattr(bitsandbytes.optim, name, None) or getattr(bitsandbytes.optim.optimizer, name)
    result = {"bases": [f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__], "init": signature(cls.__init__)}
    if name in ("Optimizer8bit", "Optimizer1State", "Optimizer2State", "GlobalOptimManager"):
        return result | {"methods": {m: signature(f) for m, f in vars(cls).items() if inspect.isfunction(f)}}
    params = [torch.nn.Parameter(torch.ones(64, 128)), torch.nn.Parameter(torch.ones(10))]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = cls(params, **REQUIRED.get(name[:4].rstrip("832"), {}))
    result |= {"group": values(optimizer.param_groups[0]), "defaults": values(optimizer.defaults)}
    if name == "PytorchLARS":
        return result
    result |= {"args": vars(optimizer.args), "name": optimizer.optimizer_name, "is_paged": optimizer.is_paged}
    result["config"] = values(optimizer.get_config(0, 0, optimizer.param_groups[0]))
    if name.endswith("AdEMAMix32bit"):  # whose step fails in the released package
        return result
    optimizer.step()
    files = optimizer.state_dict()["state"]
    layout = {str(i): {k: sorted(v) if isinstance(v, dict) else repr(v) for k, v in files[i].items()} for i in files}
    return result | {"state": [state(optimizer.state[p]) for p in params], "files": layout}


def names() -> list[str]:
    import bitsandbytes.optim

    found = [name for name in dir(bitsandbytes.optim) if inspect.isclass(getattr(bitsandbytes.optim, name))]
    return sorted([*found, "Optimizer8bit", "Optimizer1State", "Optimizer2State"])


if __name__ == "__main__":
    text = json.dumps({name: describe(name) for name in names()}, separators=(",", ":"))
    Path(sys.argv[1]).write_text(text.replace('},"', '},\n"') + "\n")
