"""A few seconds of what ./dev fuzz does for minutes with the loaders of states."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SEED = 1


def load_fuzzer() -> Any:
    path = Path(__file__).parents[1] / "fuzz" / "states.py"
    spec = importlib.util.spec_from_file_location("fuzz_states", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_states"] = module
    spec.loader.exec_module(module)
    return module


fuzzer = load_fuzzer()


@pytest.mark.parametrize(("target", "cases"), [("quant_state", 1500), ("optimizer", 150)])
def test_broken_states(target: str, cases: int) -> None:
    counts, faults = fuzzer.run(target, SEED, iter(range(cases)))
    assert not faults, "\n".join(faults)
    assert sum(counts.values()) == cases
    assert counts["refused"] > cases // 4 and counts["worked"] > cases // 50, counts


def test_the_fuzzer_finds_an_undocumented_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **named: Any) -> None:
        raise AttributeError("absmax")

    monkeypatch.setattr(fuzzer.F.QuantState, "from_dict", broken)
    _, faults = fuzzer.run("quant_state", SEED, iter(range(5)))
    assert len(faults) == 5 and "AttributeError" in faults[0]
