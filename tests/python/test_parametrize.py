"""Parametrized parameters: read once per forward, by state of their own, whatever raises, nests or runs beside them."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import reference as ref
import torch
import torch.nn.utils.parametrize as P

import bitsandbytes.functional as F
from bitsandbytes.nn import parametrize
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized


class Twice(torch.nn.Module):
    """Reads its parameter twice, with something to be done in between."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(24, 64))
        self.between: Any = int

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        first = self.w
        self.between()
        return first, self.w, x @ first.t()


@pytest.fixture
def module() -> Twice:
    module = Twice()
    replace_parameter_4bit(module, "w")
    return module


@pytest.fixture
def dequantized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call of dequantize_4bit."""
    calls: list[int] = []
    dequantize = F.dequantize_4bit
    monkeypatch.setattr(F, "dequantize_4bit", lambda *args: calls.append(1) or dequantize(*args))
    return calls


@pytest.fixture(autouse=True)
def nothing_is_left() -> Any:
    yield
    assert not parametrize._reads.open
    assert P._cache_enabled == 0 and not P._cache


X = torch.ones(3, 64)


class Scaled(torch.nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return 2 * w


def fail(*args: Any) -> None:
    raise ZeroDivisionError


@pytest.mark.parametrize("place", ["earlier pre-hook", "later pre-hook", "forward", "forward hook"])
def test_what_raises_leaves_the_caches_of_others_alone(module: Twice, dequantized: list[int], place: str) -> None:
    other = torch.nn.Linear(2, 2)
    P.register_parametrization(other, "weight", Scaled())
    if place == "forward":
        module.between = fail
        handle = None
    elif place == "forward hook":
        handle = module.register_forward_hook(fail, prepend=True)
    else:
        handle = module.register_forward_pre_hook(fail, prepend=place == "earlier pre-hook")
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            module(X)
        assert P._cache_enabled == 0
    with torch.no_grad():
        before = other.weight.clone()
        other.parametrizations.weight.original.mul_(3)
        assert torch.equal(other.weight, 3 * before), "stale"
    if handle is not None:
        handle.remove()
    module.between = int
    dequantized.clear()
    first, second, _ = module(X)
    assert first is second and len(dequantized) == 1
    assert module.w is not module.w, "kept after the forward"


def test_the_cache_of_torch_stays_as_it_was_found(module: Twice) -> None:
    with P.cached():
        module(X)
        assert P._cache_enabled == 1
        module.between = fail
        with pytest.raises(ZeroDivisionError):
            module(X)
        assert P._cache_enabled == 1


def test_a_module_within_itself(module: Twice, dequantized: list[int]) -> None:
    """One read for all; one that fails inside, even before its hooks ran, changes no result of the outer one."""
    deep = []

    def again() -> None:
        module.between = int
        deep.append(module(X))

    module.between = again
    outer = module(X)
    assert len(dequantized) == 1 and deep[0][0] is outer[0] is outer[1]

    def inner_fails() -> None:
        handle = module.register_forward_pre_hook(fail, prepend=True)
        with pytest.raises(ZeroDivisionError):
            module(X)
        handle.remove()

    module.between = inner_fails
    first, second, _ = module(X)
    ref.assert_bits(first, second)


def test_a_module_in_another(module: Twice, dequantized: list[int]) -> None:
    outer = Twice()
    replace_parameter_4bit(outer, "w")
    outer.between = lambda: module(X)
    for _ in range(2):
        dequantized.clear()
        outer(X)
        assert len(dequantized) == 2
    module.between = fail

    def inner_fails() -> None:
        with pytest.raises(ZeroDivisionError):
            module(X)

    outer.between = inner_fails
    first, second, _ = outer(X)
    assert first is second


def test_several_parameters(dequantized: list[int]) -> None:
    class Two(Twice):
        def __init__(self) -> None:
            super().__init__()
            self.v = torch.nn.Parameter(torch.randn(24, 64))

        def forward(self, x: torch.Tensor) -> Any:
            return *super().forward(x), self.v + self.v

    module = Two()
    replace_parameter_4bit(module, "w")
    replace_parameter_4bit(module, "v", quant_type="fp4")
    module(X)
    assert len(dequantized) == 2
    P.remove_parametrizations(module, "v", leave_parametrized=False)  # its hooks stay
    module.v = torch.nn.Parameter(torch.randn(24, 64))
    module(X)
    assert len(dequantized) == 3


def test_threads_do_not_share_what_they_read(module: Twice, dequantized: list[int]) -> None:
    """Each thread's forward ends while others are in theirs."""
    barrier = threading.Barrier(8)
    module.between = barrier.wait
    expected = module.w
    results: list[Any] = []

    def work() -> None:
        for _ in range(5):
            results.append(module(X))
        assert not parametrize._reads.open

    threads = [threading.Thread(target=work) for _ in range(8)]
    dequantized.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(dequantized) == 40
    assert all(first is second and torch.equal(first, expected) for first, second, _ in results)


def test_a_weight_that_changes_within_the_forward_is_read_again(module: Twice) -> None:
    replacement = Twice()
    replace_parameter_4bit(replacement, "w")
    saved = replacement.state_dict()
    module.between = lambda: module.load_state_dict(saved)
    first, second, _ = module(X)
    ref.assert_bits(second, replacement.w)
    assert not torch.equal(first, second)

    def change() -> None:
        with torch.no_grad():
            module.parametrizations.w.original.zero_()

    module.between = change
    first, second, _ = module(X)
    assert not torch.equal(first, second)


def test_inference_mode_within_a_forward(module: Twice) -> None:
    """A tensor made under inference_mode is of no use for a gradient."""

    def peek() -> None:
        with torch.inference_mode():
            assert module.w.is_inference()

    x = X.clone().requires_grad_()
    module.between = peek
    module(x)[2].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(module: Twice, dequantized: list[int], reentrant: bool) -> None:
    """Without reentrance the forward that is done again ends by an exception of torch's own."""
    x = X.clone().requires_grad_()
    for _ in range(3):
        y = torch.utils.checkpoint.checkpoint(lambda x: module(x)[2].square(), x, use_reentrant=reentrant)
        y.sum().backward()
        assert not parametrize._reads.open
    assert len(dequantized) == 6


def test_copies_have_their_own(module: Twice, dequantized: list[int]) -> None:
    other = copy.deepcopy(module)
    module.between = lambda: other(X)
    module(X)
    assert len(dequantized) == 2
    ref.assert_bits(other.w, module.w)


def test_compile(module: Twice) -> None:
    torch._dynamo.reset()
    module.between = int
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(X), module(X), strict=True):
        ref.assert_bits(found, expected)


@pytest.mark.parametrize("replace", [replace_parameter_4bit, replace_parameter_4bit_prequantized])
def test_texts_of_the_released_package(replace: Any) -> None:
    module = Twice()
    rest = ({}, torch.device("cpu")) if replace is replace_parameter_4bit_prequantized else ()
    with pytest.raises(AttributeError, match="Module does not have parameter 'nonexistent'"):
        replace(module, "nonexistent", *rest)
    with pytest.raises(TypeError, match=r"Parameter 'between' is not an instance of nn\.Parameter"):
        replace(module, "between", *rest)
