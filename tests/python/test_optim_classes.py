"""The optimizer classes: those of the released package by signature, and optimizers as users of torch expect them."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import runpy
from pathlib import Path
from typing import Any

import pytest
import reference as ref
import torch

import bitsandbytes as bnb
from bitsandbytes import optim

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASED = json.loads((GOLDEN / "optimizers.json").read_text())
maker = runpy.run_path(str(GOLDEN / "make_optimizers.py"))
CLASSES = [name for name in RELEASED if "init" in RELEASED[name] and "methods" not in RELEASED[name]]
STATEFUL = [name for name in CLASSES if name != "PytorchLARS"]
every_class = pytest.mark.parametrize("name", STATEFUL)


def make(name: str, params: Any, **options: Any) -> Any:
    required = {"lr": 1e-2, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    return getattr(optim, name)(params, **(required | options))


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.randn(shape).to(dtype))
    p.grad = torch.randn(shape).to(dtype)
    return p


@pytest.fixture(autouse=True)
def manager() -> Any:
    found = optim.GlobalOptimManager.get_instance()
    found.initialize()
    yield found
    found.initialize()


@pytest.mark.parametrize("name", RELEASED)
def test_class_equals_the_released_one(name: str) -> None:
    """Bases, signature, defaults, groups, options, and the keys, shapes and dtypes of states and files."""
    found, expected = maker["describe"](name), RELEASED[name]
    cls = getattr(optim, name, None) or getattr(optim.optimizer, name)
    for method, signature in expected.pop("methods", {}).items():
        if not method.startswith("__"):
            assert maker["signature"](getattr(cls, method)) == [list(p) for p in signature], method
    if name != "GlobalOptimManager":  # options of earlier releases, by name alone
        found["init"] = [p for p in found["init"] if p[2] != "KEYWORD_ONLY"]
    for key in ("args", "config"):
        found.get(key, {}).pop("percentile_clipping", None)
    for key, value in expected.items():
        assert found[key] == value, key


def test_there_are_41_names() -> None:
    assert len(maker["names"]()) - 3 == 41 and maker["names"]() == sorted(RELEASED)
    assert bnb.adam is optim.adam and set(optim.__all__) == {n for n in dir(optim) if not n.startswith("_")}


@pytest.mark.parametrize("name", [n for n in CLASSES if "amsgrad" in str(RELEASED[n]["init"])])
def test_amsgrad_raises_everywhere(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} does not support amsgrad=True"):
        make(name, [parameter(4)], amsgrad=True)


ERRORS = [
    ("AdamW", {"lr": -1.0}, "Invalid learning rate: -1.0"),
    ("LAMB", {"eps": -1.0}, "Invalid epsilon value: -1.0"),
    ("Lion", {"betas": (1.0, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
    ("AdEMAMix8bit", {"betas": (0.9, 0.999, 1.0)}, "Invalid beta parameter at index 2: 1.0"),
    ("Adagrad", {"weight_decay": -1.0}, "Invalid weight_decay value: -1.0"),
    ("Adagrad", {"initial_accumulator_value": 1.0}, "Initial accumulator value != 0.0 not supported!"),
    ("Adagrad32bit", {"lr_decay": 0.1}, "Lr Decay != 0.0 not supported!"),
    ("Adagrad8bit", {"optim_bits": 32}, "Adagrad8bit only supports optim_bits=8"),
    ("PagedAdamW8bit", {"optim_bits": 8}, "PagedAdamW8bit only supports optim_bits=32"),
    ("RMSprop", {"alpha": 0}, "RMSprop with alpha==0.0 is not supported!"),
    ("RMSprop8bit", {"centered": True}, "Centered RMSprop is not supported!"),
    ("RMSprop32bit", {"momentum": 0.9}, "RMSprop with momentum is not supported!"),
    ("RMSprop", {"momentum": -1}, "Invalid beta parameter at index 1: -1"),
    ("SGD8bit", {"momentum": 0}, "SGD without momentum is not supported!"),
    ("LARS", {"momentum": 0}, "LARS without momentum is not supported!"),
    ("PytorchLARS", {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
    ("LAMB8bit", {"optim_bits": 8}, "unexpected keyword argument 'optim_bits'"),
]


@pytest.mark.parametrize(("name", "options", "message"), ERRORS, ids=lambda v: str(v)[:40])
def test_wrong_options_are_told_as_in_the_released_package(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError, TypeError), match=message.replace("(", r"\(")):
        make(name, [parameter(4)], **options)


def test_bits_other_than_8_and_32_are_told() -> None:
    with pytest.raises(NotImplementedError, match="Amount of optimizer bits not supported: 16"):
        make("Adam", [parameter(4)], optim_bits=16).step()


# ---- steps


@every_class
def test_one_step_is_one_call_a_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever dtypes and sizes; and the same as of one tensor after the other."""
    shapes = [(64, 80), (3,), (), (0,), (5000,)]
    params = [parameter(*s, dtype=d) for s in shapes for d in (torch.float32, torch.bfloat16, torch.float16)]
    alone = [copy.deepcopy(p) for p in params]
    together, singles = make(name, params), [make(name, [p]) for p in alone]
    calls: list[int] = []
    with torch.profiler.profile() as profile:
        together.step()
    calls = [e for e in profile.events() if e.name == "bitsandbytes::optimizer_step"]
    assert len(calls) == 1
    for _ in range(2):
        together.step()
    for optimizer, p, q in zip(singles, alone, params, strict=True):
        p.grad = q.grad
        for _ in range(3):
            optimizer.step()
        ref.assert_bits(q.detach(), p.detach())


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix8bit", "AdEMAMix", "Lion8bit", "LAMB8bit", "SGD"])
def test_memory_layout_does_not_matter(name: str) -> None:
    """A transposed parameter is stepped as its transpose; one with gaps as its copy. Gradients have any layout."""
    w, g = torch.randn(80, 100), torch.randn(80, 100)
    layouts = {
        "plain": w.clone(),
        "transposed": w.t().contiguous().t(),
        "transpose": w.t().contiguous(),
        "gaps": torch.stack([w, w], -1)[..., 0],
    }
    params = {key: torch.nn.Parameter(x) for key, x in layouts.items()}
    optimizers = {key: make(name, [p]) for key, p in params.items()}
    for t in range(3):
        for key, p in params.items():
            grad = g.t() if key == "transpose" else g
            p.grad = grad.clone() if t % 2 else grad.contiguous()
            optimizers[key].step()
    assert torch.equal(params["transposed"].t(), params["transpose"])
    assert torch.equal(params["gaps"], params["plain"])
    first = optimizers["transposed"].state[params["transposed"]]["state1"]
    assert first.stride()[-2:] == (1, 80)


def test_closures_and_parameters_without_gradients() -> None:
    p, q = parameter(5000), torch.nn.Parameter(torch.ones(10))
    optimizer = make("AdamW8bit", [p, q])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(optimizer.step(closure).item(), rel=0.1)
    assert optimizer.step() is None
    assert q not in optimizer.state and torch.equal(q, torch.ones(10)) and optimizer.state[p]["step"] == 3
    q.grad = torch.ones(10)
    optimizer.step()
    assert (optimizer.state[p]["step"], optimizer.state[q]["step"]) == (4, 1) and not torch.equal(q, torch.ones(10))
    p.grad = None
    optimizer.step()
    assert (optimizer.state[p]["step"], optimizer.state[q]["step"]) == (4, 2)


def test_groups_have_options_of_their_own() -> None:
    p, q, r = parameter(5000), parameter(5000), parameter(5000)
    optimizer = make("AdamW", [{"params": [p], "lr": 0.0, "weight_decay": 0.0}, {"params": [q]}])
    optimizer.add_param_group({"params": [r], "lr": 0.5})
    before = [x.detach().clone() for x in (p, q, r)]
    optimizer.step()
    moved = [(x - b).abs().max().item() for x, b in zip((p, q, r), before, strict=True)]
    assert moved[0] == 0 and 0 < moved[1] < 2e-3 < 0.4 < moved[2]


def test_schedules_scalers_and_rates_that_are_tensors() -> None:
    layer = torch.nn.Linear(100, 100)
    optimizer = make("AdamW8bit", layer.parameters(), lr=torch.tensor(1e-2))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.0)
    scaler = torch.amp.GradScaler("cpu")

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale(layer(torch.randn(5, 100)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    before = layer.weight.detach().clone()
    step()
    assert not torch.equal(layer.weight, before)
    schedule.step()
    before = layer.weight.detach().clone()
    step()
    assert torch.equal(layer.weight, before), "lr is 0 now"
    optimizer.zero_grad()
    layer.weight.grad = torch.full_like(layer.weight, torch.inf)
    layer.bias.grad = torch.zeros_like(layer.bias)
    steps = optimizer.state[layer.weight]["step"]
    scaler.step(optimizer)
    assert optimizer.state[layer.weight]["step"] == steps, "the scaler leaves the step out"


def test_compiled_training_step_is_the_eager_one() -> None:
    layer = torch.nn.Linear(80, 80)
    other = copy.deepcopy(layer)
    x = torch.randn(4, 80)

    def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, second = make("AdamW8bit", layer.parameters()), make("AdamW8bit", other.parameters())
    compiled = torch.compile(train, backend="aot_eager")
    for _ in range(3):
        train(layer, first)
        compiled(other, second)
    torch.testing.assert_close(other.weight, layer.weight)


def test_a_step_is_seen_by_autograd() -> None:
    p = parameter(5000)
    optimizer = make("Lion", [p])
    loss = (p * p).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_and_parameters_that_cannot_be_stepped_are_told() -> None:
    table = torch.nn.Embedding(300, 64, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="Adam8bit: a gradient of group 0 is sparse"):
        make("Adam8bit", table.parameters()).step()
    for dtype in (torch.complex64, torch.float64):
        with pytest.raises(ValueError, match="SGD: parameter 1 of group 0 has dtype"):
            make("SGD", [parameter(4), parameter(4, dtype=dtype)]).step()


def test_state_that_was_moved_or_replaced_is_the_state() -> None:
    """As frameworks do that keep states elsewhere between steps."""
    p, q = parameter(5000), parameter(10)
    r, s = copy.deepcopy(p), copy.deepcopy(q)
    r.grad, s.grad = p.grad, q.grad
    moved, kept = make("AdamW8bit", [p, q]), make("AdamW8bit", [r, s])
    for _ in range(3):
        moved.step()
        kept.step()
        for entry in moved.state.values():
            for key, value in entry.items():
                entry[key] = value.clone() if isinstance(value, torch.Tensor) else value
    assert torch.equal(p, r) and torch.equal(q, s)
    moved.state.clear()
    moved.step()
    assert moved.state[p]["step"] == 1


def test_copies_and_pickles_go_on_as_the_original() -> None:
    p = parameter(5000)
    optimizer = make("LAMB8bit", [p], bias_correction=False)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        (q,) = other.param_groups[0]["params"]
        q.grad = p.grad.clone()
        other.step()
        expected = copy.deepcopy(optimizer)
        expected.param_groups[0]["params"][0].grad = p.grad
        expected.step()
        assert torch.equal(q, expected.param_groups[0]["params"][0])


def test_update_step_is_the_step_of_one_parameter() -> None:
    """For optimizers of other projects that bring their own step."""
    p, q = parameter(5000), None
    q = copy.deepcopy(p)
    q.grad = p.grad
    a, b = make("AdamW8bit", [p]), make("AdamW8bit", [q])
    group = b.param_groups[0]
    b.init_state(group, q, 0, 0)
    for _ in range(3):
        a.step()
        b.update_step(group, q, 0, 0)
    assert torch.equal(p, q) and a.state[p]["step"] == b.state[q]["step"] == 3


# ---- what the rules of classes are


@pytest.mark.parametrize("options", [{"dampening": 0.5}, {"nesterov": True}, {"weight_decay": 0.1}], ids=str)
def test_sgd_is_that_of_torch(options: dict[str, Any]) -> None:
    p = parameter(100)
    q = copy.deepcopy(p)
    ours, theirs = make("SGD", [p], **options), torch.optim.SGD([q], lr=1e-2, momentum=0.9, **options)
    for _ in range(5):
        p.grad = q.grad = torch.randn(100)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_adamw_is_that_of_torch() -> None:
    p = parameter(100)
    q = copy.deepcopy(p)
    ours, theirs = make("AdamW", [p], weight_decay=0.1), torch.optim.AdamW([q], weight_decay=0.1)
    for _ in range(5):
        p.grad = q.grad = torch.randn(100)
        ours.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.1}, {"dampening": 0.3}], ids=str)
def test_lars_is_the_plain_one(options: dict[str, Any]) -> None:
    p = parameter(50, 60)
    q = copy.deepcopy(p)
    ours, plain = make("LARS", [p], **options), optim.PytorchLARS([q], lr=1e-2, momentum=0.9, **options)
    for _ in range(5):
        p.grad = q.grad = torch.randn(50, 60)
        ours.step()
        plain.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_lamb_options_change_the_step() -> None:
    results = []
    for options in ({}, {"bias_correction": False}, {"adam_w_mode": False}):
        torch.manual_seed(3)
        p = parameter(5000)
        optimizer = make("LAMB", [p], weight_decay=0.1, max_unorm=10.0, **options)
        optimizer.step()
        results.append(p.detach().clone())
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_group_may_round_stochastically() -> None:
    p, q = (torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2))
    p.grad = q.grad = torch.ones(5000, dtype=torch.bfloat16)
    optimizer = make("SGD", [{"params": [p], "seed": 1}, {"params": [q]}], lr=1e-4)
    optimizer.step()
    assert len(q.unique()) == 1 and len(p.unique()) == 2


# ---- options of single parameters


def dtype_of(optimizer: Any, p: torch.Tensor) -> torch.dtype:
    return optimizer.state[p]["state1"].dtype


def test_overrides_of_parameters(manager: Any) -> None:
    p, q, r = parameter(5000), parameter(5000), parameter(5000)
    manager.override_config(q, "optim_bits", 32)
    manager.override_config([r], key_value_dict={"lr": 0.0, "weight_decay": 0.0})
    before = r.detach().clone()
    optimizer = make("AdamW8bit", [p, q, r])
    optimizer.step()
    assert [dtype_of(optimizer, x) for x in (p, q, r)] == [torch.uint8, torch.float32, torch.uint8]
    assert torch.equal(r, before)
    manager.override_config(r, "lr", 0.1)
    optimizer.step()
    assert not torch.equal(r, before), "an override counts from the next step on"
    assert optimizer.get_config(0, 2, optimizer.param_groups[0])["lr"] == 0.1


def test_overrides_follow_places_of_registered_parameters(manager: Any) -> None:
    old = [parameter(5000), parameter(5000)]
    manager.override_config(old[1], "optim_bits", 8)
    manager.register_parameters(old)
    new = [parameter(5000), parameter(5000)]
    optimizer = make("Adam", new)
    optimizer.step()
    assert [dtype_of(optimizer, p) for p in new] == [torch.float32, torch.uint8]


def test_a_parameter_takes_its_override_along_when_it_goes(manager: Any) -> None:
    p = parameter(5000)
    manager.override_config(p, "optim_bits", 32)
    assert len(manager.pid2config) == 1
    del p
    assert not manager.pid2config


@pytest.mark.parametrize("layer", [bnb.nn.StableEmbedding, bnb.nn.Embedding])
def test_embeddings_have_32_bit_states(layer: Any) -> None:
    table, linear = layer(100, 64), torch.nn.Linear(100, 100)
    optimizer = make("AdamW8bit", [*table.parameters(), *linear.parameters()])
    linear(table(torch.tensor([1, 2])).flatten()[:100]).sum().backward()
    optimizer.step()
    assert dtype_of(optimizer, table.weight) == torch.float32 and dtype_of(optimizer, linear.weight) == torch.uint8


def test_manager_is_one() -> None:
    with pytest.raises(RuntimeError, match=r"Call get_instance\(\) instead"):
        optim.GlobalOptimManager()
    assert optim.GlobalOptimManager.get_instance() is optim.GlobalOptimManager.get_instance()


def test_args_object_gives_the_options() -> None:
    args = optim.optimizer.MockArgs({"optim_bits": 8, "min_8bit_size": 100, "max_unorm": 0.0, "skip_zeros": True})
    p = parameter(200)
    optimizer = make("Adam", [p], args=args)
    optimizer.step()
    assert dtype_of(optimizer, p) == torch.uint8 and optimizer.get_config(0, 0, optimizer.param_groups[0])["skip_zeros"]


def test_signatures_can_be_read() -> None:
    """By tools that look at them, as trainers do to see whether an option is there."""
    assert "optim_bits" not in inspect.signature(optim.Lion8bit).parameters
    assert list(inspect.signature(optim.AdamW8bit).parameters)[:2] == ["params", "lr"]
