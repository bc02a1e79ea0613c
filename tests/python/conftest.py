"""Shared by all Python tests: what is selected, deterministic hypothesis, names of instruction sets, the real model."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch
from process import QUANTIZE_ONE, run_python

from bench import real_model

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=60, database=None)
hypothesis.settings.register_profile("more", deadline=None, max_examples=2000, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """A test that calls torch.set_num_threads leaves it as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def isas() -> list[str]:
    """The instruction sets that can run here, as the message about a wrong name lists them."""
    message = run_python(QUANTIZE_ONE, BNB_FORCE_ISA="none-such").stderr
    found = re.search(r'BNB_FORCE_ISA: "none-such" cannot run here, expected one of ([\w, ]+)', message)
    assert found, message
    return found[1].split(", ")


@pytest.fixture(scope="session")
def reference_python() -> str:
    python = os.environ.get("BNB_REFERENCE_PYTHON")
    if not python:
        pytest.skip("BNB_REFERENCE_PYTHON is not set to an interpreter with bitsandbytes 0.50.2 (./dev test sets it)")
    return python


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Under which a row does not depend on its batch even if it is the only one."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def quiet() -> None:
    """Without the progress bars of transformers."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def tok() -> Any:
    """The tokenizer of the real model."""
    return real_model.tokenizer()


@pytest.fixture(scope="module")
def ids(tok: Any) -> torch.Tensor:
    """96 tokens of prose, as two rows."""
    return tok(real_model.text(), return_tensors="pt").input_ids[0, :96].view(2, 48)
