"""A step changes all parameters or none, and each by its own state.

Numbers, shapes, groups that lose a parameter, memory that is shared.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_default_backend import on_other_device
from test_optim import RULES, N, states, step, tensors
from test_optim_classes import make, parameter

import bitsandbytes as bnb
from bitsandbytes import optim

WRONG_NUMBERS = [
    ("lr", math.nan, "lr"),
    ("lr", math.inf, "lr"),
    ("lr", 1e39, "lr"),
    ("weight_decay", -1.0, "weight_decay"),
    ("weight_decay", 1e39, "weight_decay"),
    ("eps", math.inf, "eps"),
    ("betas", (math.nan, 0.999), "beta1"),
    ("betas", (0.9, 1.0), "beta2"),
]


@pytest.mark.parametrize(("key", "value", "named"), WRONG_NUMBERS, ids=str)
@pytest.mark.parametrize("groups", (1, 2))
def test_numbers_of_every_group_are_checked_before_any_moves(groups: int, key: str, value: Any, named: str) -> None:
    params = [parameter(5000) for _ in range(groups)]
    optimizer = make("AdamW8bit", [{"params": [p]} for p in params])
    optimizer.step()
    optimizer.param_groups[-1][key] = value
    before = [p.detach().clone() for p in params]
    with pytest.raises((ValueError, RuntimeError), match=rf"{named}.* is .*, expected") as error:
        optimizer.step()
    assert groups == 1 or f"AdamW8bit: {named} of group 1 is" in str(error.value)
    assert all(map(torch.equal, params, before)) and all(optimizer.state[p]["step"] == 1 for p in params)


def test_numbers_too_large_together_are_refused() -> None:
    p = parameter(10)
    optimizer = make("AdamW", [p], lr=1e30, weight_decay=1e30)
    with pytest.raises((ValueError, RuntimeError), match=r"lr \* weight_decay is"):
        optimizer.step()


@pytest.mark.parametrize("where", ("native", "plain torch"))
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", math.nan),
        ("lr", 1e39),
        ("eps", -1.0),
        ("beta1", math.nan),
        ("alpha", math.inf),
        ("max_unorm", math.nan),
        ("t_alpha", -1),
    ],
)
def test_operators_refuse_numbers(where: str, key: str, value: float) -> None:
    call = None if where == "native" else lambda *args: on_other_device("optimizer_step", *args)
    state, p = states("adam", N, 8), torch.zeros(N)
    with pytest.raises((ValueError, RuntimeError), match=f"optimizer_step: {key} is .*, expected"):
        step("adam", p, torch.ones(N), state, 1, call=call, **{key: value})
    assert not p.any() and not any(x.any() for x in tensors(state))


@pytest.mark.parametrize("name", ("AdamW", "AdamW8bit", "AdEMAMix8bit", "SGD"))
@pytest.mark.parametrize("shape", ((40, 100), (100, 50), (5000,), (50, 101)), ids=str)
def test_a_parameter_of_another_shape_than_its_state_is_refused(name: str, shape: tuple[int, ...]) -> None:
    first, p = parameter(30), parameter(50, 100)
    optimizer = make(name, [{"params": [first]}, {"params": [p]}])
    optimizer.step()
    p.data, p.grad = torch.ones(shape), None
    p.grad = torch.ones(shape)
    before = first.detach().clone()
    for cached in (True, False):
        if not cached:
            optimizer._plans.clear()
        with pytest.raises(ValueError, match=rf"{name}: parameter 0 of group 1 has shape .*, expected \(50, 100\)"):
            optimizer.step()
    assert torch.equal(first, before) and bool((p == 1).all())


def test_a_parameter_of_a_later_group_that_became_float64_is_refused() -> None:
    first, p = parameter(30), parameter(5000)
    optimizer = make("AdamW8bit", [{"params": [first]}, {"params": [p]}])
    optimizer.step()
    p.data, p.grad = p.data.double(), None
    p.grad = torch.ones_like(p)
    before = first.detach().clone()
    with pytest.raises(ValueError, match="AdamW8bit: parameter 0 of group 1 has dtype float64, expected float32"):
        optimizer.step()
    assert torch.equal(first, before) and optimizer.state[first]["step"] == 1


@pytest.mark.parametrize("where", ("native", "plain torch"))
def test_operators_refuse_states_of_another_shape(where: str) -> None:
    call = None if where == "native" else lambda *args: on_other_device("optimizer_step", *args)
    for shape, given in (((20, 35), (35, 20)), ((20, 30), (20, 35))):
        state, p = states("adam", N, 32), torch.zeros(shape)
        for key in ("state1", "state2"):
            state[key] = [state[key][0].view(given)]
        with pytest.raises((ValueError, RuntimeError), match=r"optimizer_step: state1\[?0?\]? (is|has)"):
            step("adam", p, torch.ones(shape), state, 1, call=call)
        assert not p.any()


@pytest.mark.parametrize("first_has_gradient", (True, False))
def test_a_parameter_taken_out_leaves_the_others_as_they_are(first_has_gradient: bool) -> None:
    params = [parameter(5000), parameter(4096), parameter(10)]
    others = [torch.nn.Parameter(p.detach().clone()) for p in params[1:]]
    optimizer, expected = make("AdamW8bit", params), make("AdamW8bit", others)
    if not first_has_gradient:
        params[0].grad = None
    for t in range(4):
        if t == 2:
            assert optimizer.param_groups[0]["params"].pop(0) is params[0]
        for p, q in zip(params[1:], others, strict=True):
            q.grad = p.grad
        optimizer.step()
        expected.step()
    assert all(map(torch.equal, params[1:], others))
    assert [optimizer.state[p]["step"] for p in params[1:]] == [4, 4]
    saved = optimizer.state_dict()
    assert sorted(saved["state"]) == [0, 1] and saved["param_groups"][0]["params"] == [0, 1]
    again = make("AdamW8bit", [torch.nn.Parameter(p.detach().clone()) for p in params[1:]])
    again.load_state_dict(saved)
    assert len(optimizer.state) == 2 + first_has_gradient


def test_options_of_places_stay_with_the_parameters() -> None:
    manager = optim.GlobalOptimManager.get_instance()
    manager.initialize()
    try:
        old, params = [parameter(10) for _ in range(3)], [parameter(10) for _ in range(3)]
        manager.override_config(old[1], "lr", 0.0)
        manager.register_parameters(old)
        optimizer = make("AdamW", params)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [False, True, False]
        optimizer.param_groups[0]["params"].pop(0)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert [torch.equal(p, q) for p, q in zip(params, before, strict=True)] == [True, True, False]
    finally:
        manager.initialize()


def test_a_parameter_that_is_there_twice_is_stepped_twice() -> None:
    p, q = parameter(5000), None
    q = torch.nn.Parameter(p.detach().clone())
    q.grad = p.grad
    with pytest.warns(UserWarning, match="duplicate"):
        twice = make("AdamW8bit", [p, p])
    once = make("AdamW8bit", [q])
    twice.step()
    once.step()
    once.step()
    assert torch.equal(p, q) and twice.state[p]["step"] == 2


@pytest.mark.parametrize("where", ("native", "plain torch"))
def test_200_tensors_and_one_is_wrong(where: str) -> None:
    call = ops_call(where)
    wrongs = {
        "g": torch.zeros(9),
        "state1": torch.zeros(9),
        "state2": torch.zeros(10, dtype=torch.uint8),
        "p": torch.zeros(10, dtype=torch.float64),
    }
    for name, wrong in wrongs.items():
        lists = {
            key: [torch.full((10,), float(key in "pg")) for _ in range(200)] for key in ("p", "g", "state1", "state2")
        }
        lists[name][137] = wrong
        before = [x.clone() for x in lists["p"]]
        with pytest.raises((ValueError, RuntimeError), match=rf"optimizer_step: {name}\[137\] "):
            call("adam", *lists.values(), [], [], [], None, None, [1] * 200, 0.1, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0)
        assert all(map(torch.equal, before, lists["p"]))


def ops_call(where: str) -> Any:
    if where == "native":
        return torch.ops.bitsandbytes.optimizer_step.default
    return lambda *args: on_other_device("optimizer_step", *args)


@pytest.mark.parametrize("where", ("native", "plain torch"))
def test_memory_that_overlaps_is_refused(where: str) -> None:
    call = ops_call(where)
    memory = torch.zeros(1000)
    places = {"p": 0, "g": 100, "state1": 200, "state2": 300}
    cases = [("g", 0), ("g", 99), ("state1", 0), ("state1", 150), ("state2", 250), ("p", 399)]

    def run(starts: dict[str, int], second: int) -> None:
        lists = [[memory[at : at + 100], memory[at + second : at + second + 100]] for at in starts.values()]
        call("adam", *lists, [], [], [], None, None, [1, 1], 0.1, 0.9, 0.99, 0.0, 0.0, 1e-8, 0.0)

    run(places, 400)
    for name, at in cases:
        with pytest.raises(
            (ValueError, RuntimeError), match=r"optimizer_step: \w+\[\d\] is in the memory of \w+\[\d\], expected"
        ):
            run(places | {name: at}, 400)
    with pytest.raises((ValueError, RuntimeError), match=r"is in the memory of"):
        run(places, 350)  # of one tensor and of the next
    p = torch.zeros(700)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"optimizer_update_32bit|optimizer_step: p is in the memory of g"
    ):
        bnb.functional.optimizer_update_32bit("lion", p, p, torch.zeros(700), 0.9, 0.0, 1, 0.1, beta2=0.99)


def test_classes_refuse_numbers_when_they_are_made() -> None:
    for options in (
        {"lr": math.inf},
        {"lr": math.nan},
        {"lr": 1e39},
        {"eps": math.inf},
        {"weight_decay": 1e39},
        {"betas": (math.nan, 0.9)},
    ):
        with pytest.raises(ValueError, match="Invalid"):
            make("AdamW8bit", [parameter(4)], **options)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_may_be_shared(rule: str) -> None:
    """They are read alone."""
    g = torch.ones(10)
    lists = [
        [torch.zeros(10), torch.zeros(10)],
        [g, g],
        [torch.zeros(2 if rule == "ademamix" else 1, 10) for _ in range(2)],
    ]
    second = [torch.zeros(10), torch.zeros(10)]
    torch.ops.bitsandbytes.optimizer_step.default(
        rule, *lists, second, [], [], [], None, None, [1, 1], 0.1, 0.9, 0.99, 0.99, 1.0, 1e-8, 0.0
    )
    assert torch.equal(*lists[0])
