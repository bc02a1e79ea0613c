"""8-bit states of second moments: what is above 0 stays so, and no element goes much further than in 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_default_backend import on_other_device
from test_optim import states, step

from bitsandbytes import optim

LR = 1e-3
BLOCK = 256


def largest_of_small_half(name: str, factor: float) -> float:
    """4096 zeros, 60 steps: of every two neighbours one has gradients near 0.1, one a thousandth of that, and after
    step 20 `factor` times that."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(4096))
    optimizer = getattr(optim, name)([p], lr=LR)
    for t in range(60):
        g = torch.randn(2, 2048) * 0.1
        g[1] *= 1e-3 * (factor if t >= 20 else 1)
        p.grad = g.t().reshape(-1).clone()
        optimizer.step()
    return p.detach()[1::2].abs().max().item()


@pytest.mark.parametrize("factor", (1, 0.1, 0.01, 0))
@pytest.mark.parametrize("name", ("AdamW", "AdEMAMix", "LAMB", "RMSprop", "Adagrad"))
def test_small_gradients_beside_large_ones_do_not_throw_elements_away(name: str, factor: float) -> None:
    """AdamW went 1.9, 2.7, 10 and 69 while second moments became 0; torch goes 0.03."""
    coded = largest_of_small_half(name + "8bit", factor)
    wide = largest_of_small_half(("AdamW" if name == "LAMB" else name) + "32bit", factor)  # LAMB clips other norms
    print(name, factor, wide, coded)
    assert coded < 1.5 * wide


def moments(state: dict[str, Any], rule: str, bits: int) -> torch.Tensor:
    key = "1" if rule in ("rmsprop", "adagrad") else "2"
    if bits == 32:
        return state[f"state{key}"][0]
    absmax = state[f"absmax{key}"][0].repeat_interleave(BLOCK)
    codes = state[f"state{key}"][0]
    return state[f"qmap{key}"][codes.int()] * absmax[: codes.numel()]


@pytest.mark.parametrize("where", ("native", "plain torch"))
@pytest.mark.parametrize("rule", ("adam", "lamb", "ademamix", "rmsprop", "adagrad"))
def test_second_moments_above_0_stay_above_0(rule: str, where: str) -> None:
    call = None if where == "native" else lambda *args: on_other_device("optimizer_step", *args)
    n = 1000
    g = 10.0 ** (torch.rand(n) * 12 - 12)
    g[::7] = 0
    p, state, wide = torch.zeros(n), states(rule, n, 8), states(rule, n, 32)
    for t in (1, 2):
        step(rule, p, g, state, t, call=call)
        step(rule, p, g, wide, t)
    assert torch.equal(moments(state, rule, 8) > 0, moments(wide, rule, 32) > 0)
    assert torch.equal(moments(state, rule, 8) == 0, g == 0)


# What a step of 8-bit Adam may be at most, |u8| <= K |u32| + c, where m and v are the states of 32 bits and p moves by
# lr u. Neighbours of the unsigned map differ by a factor of at most 2.74 and v > 0 is never 0, so a decoded v is at
# least 0.53 v, whose root is 0.73 of that of v: K = 1 / 0.73 = 1.4. Those of the signed map differ by at most 5.9,
# so m is wrong by at most 0.71 |m|, or by its least code, which is nothing beside it. As |m| <= 7.27 sqrt(v) (Cauchy,
# for betas of 0.9 and 0.999 and any gradients), c = 1.4 * 0.9 * 0.71 * 7.27 = 6.5. Over many steps rounded codes stay
# where they are while gradients shrink, or are none any more: u32 goes to 0 and u8 stays what it was, so there is no
# bound without c. RMSprop: v >= 0.29 v by the signed map, so K = 1.9, and no step is longer than 1 / sqrt(1 - beta).
# Adagrad: likewise, and 1.
BOUNDS = {"adam": (2, 6.5), "lamb": (2, 6.5), "ademamix": (2, 6.5), "rmsprop": (2, 3.2), "adagrad": (2, 1.0)}


@pytest.mark.parametrize("rule", BOUNDS)
def test_no_step_of_an_element_is_much_longer_than_in_32_bits(rule: str) -> None:
    """Gradients over 8 decades in every block, of one sign or both, that turn larger, smaller or 0 every 20 steps."""
    n, (factor, more) = 2048, BOUNDS[rule]
    changes = torch.tensor([1, 1, 1, 0.1, 0.01, 0, 10.0, 1000.0])
    for seed in range(4):
        torch.manual_seed(seed)
        size = 10.0 ** (torch.rand(n) * 8 - 8)
        p, q = torch.zeros(n), torch.zeros(n)
        coded, wide = states(rule, n, 8), states(rule, n, 32)
        for t in range(1, 121):
            if t % 20 == 0:
                size = (size * changes[torch.randint(0, len(changes), (n,))]).clamp(max=10)
            g = size * (0.3 * torch.randn(n) + seed % 2)
            before = p.clone(), q.clone()
            step(rule, p, g, coded, t, lr=LR)
            step(rule, q, g, wide, t, lr=LR)
            moved, allowed = (p - before[0]).abs(), factor * (q - before[1]).abs() + more * LR
            assert (moved <= 1.001 * allowed).all(), (seed, t, (moved / allowed).max())


def test_one_step_from_rounded_states_is_within_the_bound_without_luck() -> None:
    """Before each step the 32-bit states become those of 8 bits, so that one rounding alone lies between the two."""
    n = 2048
    for seed in range(3):
        torch.manual_seed(seed)
        size = 10.0 ** (torch.rand(n) * 8 - 8)
        p, coded, wide = torch.zeros(n), states("adam", n, 8), states("adam", n, 32)
        for t in range(1, 80, 2):
            size = size * 10.0 ** (torch.randn(n) * 0.1)
            g = torch.randn(2, n) * size
            step("adam", p, g[0], coded, t, lr=LR)
            step("adam", p.clone(), g[0], wide, t, lr=LR)
            q, r = p.clone(), p.clone()
            step("adam", q, g[1], coded, t + 1, lr=LR)
            step("adam", r, g[1], wide, t + 1, lr=LR)
            assert ((q - p).abs() <= 1.4 * (r - p).abs() + 6.5 * LR * 1.001).all()
            for number in ("1", "2"):
                absmax = coded[f"absmax{number}"][0].repeat_interleave(BLOCK)
                wide[f"state{number}"][0].copy_(coded[f"qmap{number}"][coded[f"state{number}"][0].int()] * absmax)
