"""Options of earlier releases: percentile_clipping, block_wise, and the functions that went with them."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import pytest
import torch
from test_optim_classes import STATEFUL, make, parameter

import bitsandbytes.functional as F
from bitsandbytes import optim

CLASSES = [name for name in STATEFUL if "AdEMAMix" not in name]  # which never had the options


def gradient(t: int, shape: tuple[int, ...] = (70, 80)) -> torch.Tensor:
    """Mostly of one length, some a hundred times as long."""
    torch.manual_seed(t)
    return torch.randn(shape) * (100 if t % 7 == 3 else 1 + 0.1 * (t % 5))


class History:
    """The rule as it was documented: the last 100 squared norms, at first all that of the first gradient."""

    def __init__(self) -> None:
        self.squares: list[float] = []

    def scale(self, g: torch.Tensor, t: int, percentile: int) -> float:
        square = g.double().square().sum().item()
        if t == 1:
            self.squares = [square] * 100
        self.squares[t % 100] = square
        limit = sorted(self.squares)[percentile]
        return min(1.0, math.sqrt(limit / square))


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_clips_to_the_percentile_of_the_last_norms(name: str) -> None:
    p, small = parameter(70, 80), parameter(6)
    q, r = copy.deepcopy(p), copy.deepcopy(small)
    clipped, plain = make(name, [p, small], percentile_clipping=5), make(name, [q, r])
    histories = [History(), History()]
    for t in range(1, 120 if name in ("AdamW8bit", "Lion") else 12):
        pairs = ((p, q, histories[0]), (small, r, histories[1]))
        for x, y, history in pairs:
            x.grad = gradient(t, tuple(x.shape))
            y.grad = (x.grad * torch.tensor(history.scale(x.grad, t, 5), dtype=torch.float32)).contiguous()
        clipped.step()
        plain.step()
    for x, y, history in pairs:
        # But for signs of sums next to 0 (Lion), and codes of numbers next to a threshold.
        assert ((x - y).abs() > 1e-5 + 1e-4 * y.abs()).float().mean() < 2e-3
        torch.testing.assert_close(clipped.state[x]["gnorm_vec"], torch.tensor(history.squares), rtol=1e-5, atol=0)
        assert "gnorm_vec" not in plain.state[y]


@pytest.mark.parametrize("name", ("AdamW8bit", "SGD32bit"))
def test_checkpoints_go_on_with_their_norms(name: str) -> None:
    p = parameter(70, 80)
    one = make(name, [p], percentile_clipping=20)
    for t in range(1, 6):
        p.grad = gradient(t)
        one.step()
    saved = io.BytesIO()
    torch.save(one.state_dict(), saved)
    saved.seek(0)
    q = torch.nn.Parameter(p.detach().clone())
    two = make(name, [q], percentile_clipping=20)
    two.load_state_dict(torch.load(saved, weights_only=True))
    for t in range(6, 12):
        p.grad = q.grad = gradient(t)
        one.step()
        two.step()
    assert torch.equal(p, q) and torch.equal(one.state[p]["gnorm_vec"], two.state[q]["gnorm_vec"])
    without = make(name, [q])
    without.load_state_dict(one.state_dict())
    before = one.state_dict()
    inner = next(x for x in before["state"][0].values() if isinstance(x, dict))
    inner["gnorm_vec"] = torch.zeros(99)
    with pytest.raises(ValueError, match=r"load_state_dict: state\[0\].gnorm_vec has size 99, expected 100"):
        two.load_state_dict(before)


def test_norms_begin_where_a_checkpoint_has_none() -> None:
    """Not at 0, which no gradient would pass."""
    p = parameter(5000)
    plain = make("AdamW8bit", [p])
    plain.step()
    clipped = make("AdamW8bit", [p], percentile_clipping=5)
    clipped.load_state_dict(plain.state_dict())
    before = p.detach().clone()
    clipped.step()
    assert not torch.equal(p, before) and bool((clipped.state[p]["gnorm_vec"] > 0).all())


def test_a_gradient_that_is_not_finite_does_not_spoil_the_norms() -> None:
    p = parameter(5000)
    optimizer = make("AdamW8bit", [p], percentile_clipping=5)
    optimizer.step()
    p.grad[3], p.grad[4] = math.nan, math.inf
    optimizer.step()
    assert p.isfinite().all() and optimizer.state[p]["gnorm_vec"].isfinite().all()


def test_single_parameters_may_be_clipped() -> None:
    manager = optim.GlobalOptimManager.get_instance()
    p, q = parameter(5000), parameter(5000)
    try:
        manager.override_config(p, "percentile_clipping", 10)
        optimizer = make("Adam", [p, q])
        optimizer.step()
    finally:
        manager.initialize()
    assert "gnorm_vec" in optimizer.state[p] and "gnorm_vec" not in optimizer.state[q]


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"percentile_clipping": 101}, ValueError, "percentile_clipping is 101, expected a whole number from 0 to 100"),
    ({"percentile_clipping": -1}, ValueError, "percentile_clipping is -1"),
    ({"percentile_clipping": 2.5}, ValueError, "percentile_clipping is 2.5"),
    ({"percentile_clipping": "5"}, ValueError, "percentile_clipping is '5'"),
    ({"percentile_clipping": None}, ValueError, "percentile_clipping is None"),
    ({"block_wise": False}, ValueError, "block_wise is False, expected True: states have a scale for each block"),
]


@pytest.mark.parametrize("name", CLASSES)
def test_wrong_options_are_named(name: str) -> None:
    make(name, [parameter(4)], block_wise=True, percentile_clipping=100)
    for options, kind, message in WRONG:
        with pytest.raises(kind, match=f"{name}: {message}"):
            make(name, [parameter(4)], **options)


def test_the_order_of_earlier_releases_is_told_where_it_is_another() -> None:
    """They had percentile_clipping behind min_8bit_size."""
    with pytest.raises(TypeError, match="AdamW: is_paged is 5, expected True or False; percentile_clipping and"):
        optim.AdamW([parameter(4)], 1e-3, (0.9, 0.99), 1e-8, 0.0, False, 32, None, 4096, 5)


def test_args_may_hold_them() -> None:
    options = {"optim_bits": 8, "min_8bit_size": 100, "max_unorm": 0.0, "skip_zeros": False}
    p = parameter(5000)
    optimizer = make(
        "Adam", [p], args=optim.optimizer.MockArgs(options | {"percentile_clipping": 5, "block_wise": True})
    )
    optimizer.step()
    assert "gnorm_vec" in optimizer.state[p]
    with pytest.raises(ValueError, match="block_wise is False"):
        make("Adam", [p], args=optim.optimizer.MockArgs(options | {"block_wise": False}))


def test_the_function_warns_and_works() -> None:
    norms, history = torch.zeros(100), History()
    for t in range(1, 30):
        g = gradient(t)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            norm, limit, scale = F.percentile_clipping(g, norms, t, 5)
        assert [w.category for w in caught] == [FutureWarning]
        expected = history.scale(g, t, 5)
        assert scale == pytest.approx(expected, rel=1e-5) and norm.item() == pytest.approx(g.norm().item(), rel=1e-5)
        assert limit.item() == pytest.approx(math.sqrt(sorted(history.squares)[5]), rel=1e-5)
    with pytest.raises(ValueError, match="percentile_clipping: gnorm_vec has elements 10, expected 100"):
        F.percentile_clipping(g, torch.zeros(10), 1, 5)
    wrong: list[tuple[Any, Any, str]] = [
        (1, 100, "percentile is 100, expected a whole number from 0 to 99"),
        (1, 5.5, "percentile is 5.5"),
        (0, 5, "step is 0, expected a whole number of 1 or more"),
        ("1", 5, "step is '1'"),
    ]
    before = norms.clone()
    for step, percentile, message in wrong:
        with pytest.raises(ValueError, match=f"percentile_clipping: {message}"):
            F.percentile_clipping(g, norms, step, percentile)
    assert torch.equal(norms, before)


@pytest.mark.parametrize("rule", ("adam", "momentum", "rmsprop", "lion"))
def test_states_with_one_scale_follow_those_of_32_bits(rule: str) -> None:
    n = 3000
    p, q = torch.ones(n), torch.ones(n)
    two = rule == "adam"
    states = [torch.zeros(n, dtype=torch.uint8) for _ in range(1 + two)] + [None] * (1 - two)
    wide = [torch.zeros(n) for _ in range(1 + two)] + [None] * (1 - two)
    old, new = ([torch.zeros(1) for _ in range(1 + two)] + [None] * (1 - two) for _ in range(2))
    maps = (F.create_dynamic_map(True), F.create_dynamic_map(False) if two else None)
    with pytest.warns(FutureWarning, match="optimizer_update_8bit will be removed"):
        for t in range(1, 21):
            torch.manual_seed(t)
            g = torch.randn(n) * 0.1 + 0.3
            F.optimizer_update_8bit(rule, g, p, *states, 0.9, 0.99, 1e-8, t, 1e-2, *maps, *old, *new)
            F.optimizer_update_32bit(rule, g, q, wide[0], 0.9, 1e-8, t, 1e-2, wide[1], 0.99)
            old, new = new, old
    moved = (q - 1).norm()
    assert (p - q).norm() < 0.03 * moved and moved > 1
    found = maps[0][states[0].int()] * old[0]
    assert (found - wide[0]).norm() < 0.1 * wide[0].norm()
    with pytest.raises(ValueError, match="optimizer_update_8bit: max1 has elements 2, expected 1"):
        F.optimizer_update_8bit(rule, g, p, *states, 0.9, 0.99, 1e-8, 1, 1e-2, *maps, torch.zeros(2), old[1], *new)


def test_histories_are_fp32_under_any_default_dtype() -> None:
    p = parameter(5000)
    optimizer = make("AdamW8bit", [p])
    optimizer.step()
    optimizer.args.percentile_clipping = 5  # after the state was made
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["gnorm_vec"].dtype == torch.float32
