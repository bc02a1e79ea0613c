"""The steps of the optimizers in plain torch, for any device that has no kernel of its own.

The rules of src/common/optim_rules.h, operation by operation, each rounded to fp32; docs/NUMERICS.md says what they
are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor

from ... import _checks as check
from ..._codes import rounded_stochastically, state_codes
from ..._ops_optim import (
    BLOCK,
    MOMENTUM,
    SQUARES_ALONE,
    TWO_STATES,
    Numbers,
    OptimizerStep,
    Update8bit,
    Update32bit,
    check_disjoint,
    check_numbers,
    check_optimizer_step,
    check_scale,
    check_update_8bit,
    check_update_32bit,
    first_states,
    is_root,
    numbers_of,
)
from ..._schemas import gather
from ..utils import default_kernel

_LARGEST = torch.finfo(torch.float32).max
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny

T = TypeVar("T")


@dataclass(frozen=True)
class Config:
    """A rule and the numbers that all tensors of a call share."""

    rule: str
    numbers: Numbers

    @property
    def decoupled(self) -> bool:
        return not self.numbers.coupled_decay and self.rule in (*TWO_STATES, "lion")

    def at(self, t: int) -> "Hyper":
        """The numbers of step t."""
        c = self.numbers
        beta1, one_minus_beta1, beta3, alpha, scale, eps = c.beta1, 1 - c.beta1, c.beta3, c.alpha, 1.0, c.eps
        if self.rule in MOMENTUM:  # at t = 1 what was in the state does not count
            beta1, one_minus_beta1 = (0.0, 1.0) if t == 1 else (c.beta1, 1 - c.dampening)
        if self.rule == "adagrad":
            beta1 = one_minus_beta1 = 1.0
        if self.rule in TWO_STATES and c.bias_correction:
            first, second = 1 - c.beta1**t, math.sqrt(1 - c.beta2**t)
            scale, eps, alpha = second / first, eps * second, alpha * first
        if c.t_alpha > 0:
            alpha *= min(1.0, t / c.t_alpha)
        if 0 < t < c.t_beta3 and c.beta3 > 0:  # the half-life grows linearly from that of beta1
            part, to = t / c.t_beta3, math.log(c.beta3)
            ratio = to / math.log(c.beta1) if c.beta1 > 0 else 0.0
            beta3 = min(c.beta3, math.exp(to / ((1 - part) * ratio + part)))
        decay = 1 - c.lr * c.weight_decay if self.decoupled else 1.0
        return Hyper(
            beta1=_f32(beta1),
            one_minus_beta1=_f32(one_minus_beta1),
            beta2=_f32(c.beta1 if self.rule in MOMENTUM else c.beta2),  # Nesterov's step ahead
            one_minus_beta2=_f32(1 - c.beta2),
            beta3=_f32(beta3),
            one_minus_beta3=_f32(1 - beta3),
            alpha=_f32(alpha),
            scale=_f32(scale),
            eps=max(_f32(eps), _SMALLEST_NORMAL),
            coupled=0.0 if self.decoupled else _f32(c.weight_decay),
            decay_factor=_f32(decay),
            step_size=_f32(c.lr),
        )


@dataclass(frozen=True)
class Hyper:
    """s = s * beta + g * one_minus_beta;  u = scale * (..) / (sqrt(v) + eps);  p = p * decay_factor - step_size * u."""

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    beta3: float
    one_minus_beta3: float
    alpha: float
    scale: float
    eps: float
    coupled: float
    decay_factor: float
    step_size: float


def _f32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float64).float().item()


def _fma(a: Tensor, b: Tensor | float, c: Tensor) -> Tensor:
    """a * b + c rounded once, where the device has doubles."""
    if a.device.type == "mps":
        return a * b + c
    return (a.double() * (b.double() if isinstance(b, Tensor) else b) + c.double()).float()


def _sqrt(v: Tensor) -> Tensor:
    """Rounded right, which torch's fp32 root on a CPU is not always."""
    return v.sqrt() if v.device.type == "mps" else v.double().sqrt().float()


def _ema(s: Tensor, beta: float, x: Tensor, one_minus_beta: float) -> Tensor:
    return _fma(s, beta, x * one_minus_beta)


def _direction(c: Config, h: Hyper, g: Tensor, s: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The update u and the new states."""
    if c.rule == "lion":
        return _ema(s[0], h.beta1, g, h.one_minus_beta1).sign(), [_ema(s[0], h.beta2, g, h.one_minus_beta2)]
    if c.rule in MOMENTUM:
        m = _ema(s[0], h.beta1, g, h.one_minus_beta1).clamp(-_LARGEST, _LARGEST)
        return _fma(m, h.beta2, g) if c.numbers.nesterov else m, [m]
    if c.rule in SQUARES_ALONE:
        v = _ema(s[0], h.beta1, g * g, h.one_minus_beta1).clamp(max=_LARGEST)
        return g * h.scale / (_sqrt(v) + h.eps), [v]
    m = _ema(s[0], h.beta1, g, h.one_minus_beta1)
    v = _ema(s[-1], h.beta2, g * g, h.one_minus_beta2).clamp(max=_LARGEST)
    if c.rule != "ademamix":
        return m * h.scale / (_sqrt(v) + h.eps), [m, v]
    slow = _ema(s[1], h.beta3, g, h.one_minus_beta3)
    return _fma(slow, h.alpha, m) * h.scale / (_sqrt(v) + h.eps), [m, slow, v]


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


class _State:
    """One moment of one tensor: fp32, or codes with a map and the absmax of each block."""

    def __init__(self, stored: Tensor, absmax: Tensor | None, qmap: Tensor | None, is_root: bool) -> None:
        self.stored, self.absmax, self.is_root = stored, absmax, is_root
        self.qmap = None if stored.dtype == torch.float32 or qmap is None else qmap.reshape(-1)

    def load(self) -> Tensor:
        if self.qmap is None or self.absmax is None:
            return self.stored.clone()
        values = _blocks(self.qmap[self.stored.int()]) * self.absmax[:, None]
        return values.view(-1)[: self.stored.numel()]

    def store(self, x: Tensor) -> None:
        if self.qmap is None or self.absmax is None:
            self.stored.copy_(x)
            return
        blocks = _blocks(x)
        absmax = blocks.abs().amax(1) if len(blocks) else blocks.new_zeros(0)
        codes = state_codes(blocks, absmax, self.qmap, self.is_root)
        self.stored.copy_(codes.view(-1)[: self.stored.numel()])
        self.absmax.copy_(absmax)


def _states(
    rule: str, n: int, state: Sequence[Tensor | None], absmax: Sequence[Tensor | None], qmap: Sequence[Tensor | None]
) -> list[_State]:
    """The moments of a tensor of n elements, those of state 1 first."""
    found = []
    blocks = check.blocks(n, BLOCK)
    for number, stored, scales, values in zip((1, 2), state, absmax, qmap, strict=True):
        if stored is not None:
            flat = stored.view(-1)
            for i in range(first_states(rule) if number == 1 else 1):
                part = None if scales is None else scales.view(-1)[i * blocks : (i + 1) * blocks]
                found.append(_State(flat[i * n : (i + 1) * n], part, values, is_root(rule, number)))
    return found


def _norm(x: Tensor) -> float:
    return (x if x.device.type == "mps" else x.double()).norm().item()


def _trust(max_unorm: float, p_norm: float, u_norm: float) -> float:
    return _f32(max_unorm * p_norm / u_norm) if p_norm > 0 and u_norm > max_unorm * p_norm else 1.0


def _step(
    c: Config,
    p: Tensor,
    g: Tensor,
    states: list[_State],
    t: int,
    unorm: Tensor | None = None,
    offset: int = 0,
    gnorm_scale: float = 1.0,
    p_norm: float | None = None,
) -> None:
    h, numbers = c.at(t), c.numbers
    flat, raw = p.reshape(-1).float(), g.reshape(-1).float() * _f32(gnorm_scale)
    grad = _fma(flat, h.coupled, raw)
    takes_part = (grad * grad if c.rule in (*TWO_STATES, *SQUARES_ALONE) else grad).isfinite()
    if numbers.skip_zeros:
        takes_part &= raw != 0
    before = [s.load() for s in states]
    u, after = _direction(c, h, grad, before)
    step_size = h.step_size
    if numbers.max_unorm > 0:
        u_norm = _norm(u.masked_fill(~takes_part, 0))
        step_size = _f32(step_size * _trust(numbers.max_unorm, _norm(flat) if p_norm is None else p_norm, u_norm))
        if unorm is not None:
            unorm.view(-1)[:1].fill_(u_norm)
    stepped = torch.where(takes_part, _fma(u, -step_size, flat * h.decay_factor), flat)
    if numbers.seed is not None and p.element_size() == 2:
        stepped = rounded_stochastically(stepped, p.dtype, numbers.seed, t, offset)
    p.copy_(stepped.view(p.shape))
    for state, old, new in zip(states, before, after, strict=True):
        state.store(torch.where(takes_part, new, old))


@default_kernel("bitsandbytes::optimizer_update_32bit")
def _(*arguments: Any) -> None:
    u = Update32bit(*arguments)
    op, rule, numbers = "optimizer_update_32bit", u.optimizer_name, numbers_of(u)
    check_update_32bit(u)
    check_numbers(op, "", rule, numbers)
    check_scale(op, "", u.gnorm_scale, u.param_norm if u.max_unorm > 0 else None)
    second = u.state2 if rule in TWO_STATES else None
    check_disjoint(op, [{"p": u.p, "g": u.g, "state1": u.state1, "state2": second}])
    states = _states(rule, u.p.numel(), (u.state1, second), (None, None), (None, None))
    _step(Config(rule, numbers), u.p, u.g, states, u.step, u.unorm_vec, 0, u.gnorm_scale, u.param_norm)


@default_kernel("bitsandbytes::optimizer_update_8bit_blockwise")
def _(*arguments: Any) -> None:
    u = Update8bit(*arguments)
    op, rule, numbers = "optimizer_update_8bit_blockwise", u.optimizer_name, numbers_of(u)
    check_update_8bit(u)
    check_numbers(op, "", rule, numbers)
    check_scale(op, "", u.gnorm_scale)
    second = u.state2 if rule in TWO_STATES else None
    parts = {"p": u.p, "g": u.g, "state1": u.state1, "state2": second, "absmax1": u.absmax1, "absmax2": u.absmax2}
    check_disjoint(op, [parts])
    states = _states(rule, u.p.numel(), (u.state1, second), (u.absmax1, u.absmax2), (u.qmap1, u.qmap2))
    _step(Config(rule, numbers), u.p, u.g, states, u.step, gnorm_scale=u.gnorm_scale)


@default_kernel("bitsandbytes::optimizer_step")
def _(*arguments: Any) -> None:
    s = gather(OptimizerStep, arguments)
    op, rule, two = "optimizer_step", s.optimizer_name, s.optimizer_name in TWO_STATES
    check_optimizer_step(s)
    check_numbers(op, "", rule, s.numbers)
    for i, (scale, norm) in enumerate(zip_longest(s.gnorm_scales, s.p_norms)):
        check_scale(op, f"[{i}]", 1.0 if scale is None else scale, norm)
    names = ("p", "g", "state1", "absmax1", *(("state2", "absmax2") if two else ()))
    check_disjoint(op, [{name: _entry(getattr(s, name), i) for name in names} for i in range(len(s.p))])
    config = Config(rule, s.numbers)
    late = 0 if s.clock is None else int(s.clock.item())
    for i, p in enumerate(s.p):
        state = (s.state1[i], s.state2[i] if two else None)
        absmax = (_entry(s.absmax1, i), _entry(s.absmax2, i))
        states = _states(rule, p.numel(), state, absmax, (s.qmap1, s.qmap2))
        _step(
            config,
            p,
            s.g[i],
            states,
            s.steps[i] + late,
            _entry(s.unorm, i),
            s.offsets[i] if s.offsets else 0,
            s.gnorm_scales[i] if s.gnorm_scales else 1.0,
            _entry(s.p_norms, i),
        )
    if s.clock is not None:
        s.clock.add_(1)


def _entry(values: Sequence[T], i: int) -> T | None:
    return values[i] if values else None
