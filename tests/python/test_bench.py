"""The benchmark's own arithmetic, and one case through a real worker."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import cases, real_model, report
from bench.run import ROOT, Side, best_of_turns

RESULT: dict[str, Any] = {
    "machine": {"cores": 2, "cpu": "Some(R) CPU (family 6, model 1)", "isa": ["avx2"], "date": "now", "commit": "abc"},
    "titles": ["project", "reference"],
    "packages": {},
    "limits": {
        "threads": {
            t: dict.fromkeys(
                ("read", "copy", "write", "update", "cache", "fresh32", "fresh64", "fma", "bf16", "int8"), 20.0
            )
            for t in ("1", "2")
        },
        "fma_isa": "avx2",
        "bf16_isa": "avx2",
    },
    "cases": [
        {
            "name": "quantize x",
            "versus": "",
            "bound": "copy",
            "bytes": 1e9,
            "flops": 0,
            "reach": 4,
            "seconds": {"1": {"ours": 0.2, "reference": 0.6}, "2": {"ours": 0.1, "reference": 0.5}},
            "ratio": {"1": 3.0, "2": 5.0},
        }
    ],
    "models": [],
    "filter": "x|y",
    "quick": False,
}


def test_a_row_states_times_ratio_rate_and_share() -> None:
    row = report.case_cells(RESULT["cases"][0], RESULT)
    assert row == ("quantize x", "100.0", "500.0", "5.00", "4", "yes", "3.00", "10.0 GB/s, 50% of copy", "5.0 GB/s")


def test_a_ratio_below_the_reach_is_said_to_be_missed() -> None:
    case = {**RESULT["cases"][0], "reach": 6}
    assert report.case_cells(case, RESULT)[5] == "NO"


def test_model_figures_count_upwards_whichever_way_is_better() -> None:
    figures = {f.key: 10.0 for f in cases.MODEL_FIGURES}
    ours = {**figures, "load": 5.0, "decode": 40.0}
    rows = report.model_rows({"name": "model nf4", "mode": "nf4", "figures": {"ours": ours, "reference": figures}})
    ratios = {row[0].removeprefix("model nf4: "): row[3] for row in rows}
    assert ratios["load s"] == "2.00" and ratios["decode tokens/s"] == "4.00" and ratios["perplexity"] == "1.00"


def test_results_are_written_as_json_and_markdown(tmp_path: Any) -> None:
    as_json, as_markdown = report.write(RESULT, tmp_path, None)
    assert as_json.name == "some-6-model-1-avx2-x-y.json"
    assert json.loads(as_json.read_text())["cases"] == RESULT["cases"]
    assert "| quantize x | 100.0 | 500.0 | 5.00 | 4 | yes |" in as_markdown.read_text()


def test_every_case_is_bound_by_a_limit_that_is_measured_or_by_none() -> None:
    measured = set(RESULT["limits"]["threads"]["1"])
    for case in cases.CASES:
        assert not case.bound or case.bound in measured
        assert not case.versus or case.versus in cases.BY_NAME
        assert case.bytes > 0


@pytest.mark.parametrize("name", ["Linear4bit bf16 64x64 M=1"])
def test_a_worker_measures_a_case(name: str) -> None:
    side = Side("project", sys.executable)
    try:
        assert "bitsandbytes" in side.ask(do="info")
        side.ask(do="open", case=name)
        (best,) = best_of_turns([(side, name)], threads=1, rounds=2, seconds=0.01)
        assert 1e-7 < best < 1
    finally:
        side.stop()


def test_the_demo_asks_for_the_steps_that_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else bench.real_model can measure."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    script = tmp_path / "python"  # -m bench.real_model nf4 STEP ...
    echo = 'echo "{\\"$step\\": 1}"'
    script.write_text(f'#!/bin/sh\nshift 3\nstep=load; {echo}\nfor step in "$@"; do {echo}; done\nstep=rss; {echo}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    found = demo.measure("nf4", demo.Progress())
    assert set(found) == set(demo.STEPS) and set(demo.STEPS) - {"load", "rss"} <= set(real_model.STEPS)
