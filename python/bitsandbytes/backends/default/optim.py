"""The steps of the optimizers in plain torch, for any device that has no kernel of its own.

The rules of src/common/optim_rules.h, operation by operation, each rounded to fp32; docs/NUMERICS.md says what they
are.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from ... import _checks as check
from ..._ops_optim import (
    BLOCK,
    MOMENTUM,
    SQUARES_ALONE,
    TWO_STATES,
    check_apart,
    check_numbers,
    check_optimizer_step,
    check_scale,
    check_update_8bit,
    check_update_32bit,
    first_states,
    is_root,
)
from ..utils import default_kernel, nearest_codes
from .stochastic import rounded_stochastically

_LARGEST = torch.finfo(torch.float32).max
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Config:
    """What all tensors of a call share."""

    rule: str
    lr: float
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    t_alpha: int = 0
    t_beta3: int = 0
    max_unorm: float = 0.0
    skip_zeros: bool = False
    dampening: float = 0.0
    nesterov: bool = False
    bias_correction: bool = True
    coupled_decay: bool = False
    seed: int | None = None

    @property
    def decoupled(self) -> bool:
        return not self.coupled_decay and self.rule in (*TWO_STATES, "lion")

    def at(self, t: int) -> "Hyper":
        """The numbers of step t."""
        beta1, gain1, beta3, alpha, scale, eps = self.beta1, 1 - self.beta1, self.beta3, self.alpha, 1.0, self.eps
        if self.rule in MOMENTUM:  # at t = 1 what was in the state does not count
            beta1, gain1 = (0.0, 1.0) if t == 1 else (self.beta1, 1 - self.dampening)
        if self.rule == "adagrad":
            beta1 = gain1 = 1.0
        if self.rule in TWO_STATES and self.bias_correction:
            first, second = 1 - self.beta1**t, math.sqrt(1 - self.beta2**t)
            scale, eps, alpha = second / first, eps * second, alpha * first
        if self.t_alpha > 0:
            alpha *= min(1.0, t / self.t_alpha)
        if 0 < t < self.t_beta3 and self.beta3 > 0:  # the half-life grows linearly from that of beta1
            part, to = t / self.t_beta3, math.log(self.beta3)
            ratio = to / math.log(self.beta1) if self.beta1 > 0 else 0.0
            beta3 = min(self.beta3, math.exp(to / ((1 - part) * ratio + part)))
        decay = 1 - self.lr * self.weight_decay if self.decoupled else 1.0
        return Hyper(
            beta1=_f32(beta1),
            gain1=_f32(gain1),
            beta2=_f32(self.beta1 if self.rule in MOMENTUM else self.beta2),  # Nesterov's step ahead
            gain2=_f32(1 - self.beta2),
            beta3=_f32(beta3),
            gain3=_f32(1 - beta3),
            alpha=_f32(alpha),
            scale=_f32(scale),
            eps=max(_f32(eps), _SMALLEST_NORMAL),
            coupled=0.0 if self.decoupled else _f32(self.weight_decay),
            keep=_f32(decay),
            rate=_f32(self.lr),
        )


@dataclass(frozen=True)
class Hyper:
    """s = s * beta + g * gain;  u = scale * (..) / (sqrt(v) + eps);  p = p * keep - rate * trust * u."""

    beta1: float
    gain1: float
    beta2: float
    gain2: float
    beta3: float
    gain3: float
    alpha: float
    scale: float
    eps: float
    coupled: float
    keep: float
    rate: float


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


def _average(s: Tensor, beta: float, x: Tensor, gain: float) -> Tensor:
    return _fma(s, beta, x * gain)


def _direction(c: Config, h: Hyper, g: Tensor, s: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """u and the states moved."""
    if c.rule == "lion":
        return _average(s[0], h.beta1, g, h.gain1).sign(), [_average(s[0], h.beta2, g, h.gain2)]
    if c.rule in MOMENTUM:
        m = _average(s[0], h.beta1, g, h.gain1).clamp(-_LARGEST, _LARGEST)
        return _fma(m, h.beta2, g) if c.nesterov else m, [m]
    if c.rule in SQUARES_ALONE:
        v = _average(s[0], h.beta1, g * g, h.gain1).clamp(max=_LARGEST)
        return g * h.scale / (_sqrt(v) + h.eps), [v]
    m = _average(s[0], h.beta1, g, h.gain1)
    v = _average(s[-1], h.beta2, g * g, h.gain2).clamp(max=_LARGEST)
    if c.rule != "ademamix":
        return m * h.scale / (_sqrt(v) + h.eps), [m, v]
    slow = _average(s[1], h.beta3, g, h.gain3)
    return _fma(slow, h.alpha, m) * h.scale / (_sqrt(v) + h.eps), [m, slow, v]


def _blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def state_codes(x: Tensor, absmax: Tensor, qmap: Tensor, is_root: bool) -> Tensor:
    """The codes of blocks, the last dimension of x. A first moment below 0 never gets the code of 0, nor does a second
    moment (`is_root`) above 0."""
    codes = nearest_codes(x * (1 / absmax.clamp(min=1e-38))[..., None], qmap)
    values = qmap[codes.int()]
    if is_root:
        above = qmap[(codes.int() + 1).clamp(max=check.CODES - 1)]
        return codes + ((x > 0) & (values <= 0) & (above > 0)).to(torch.uint8)
    below = qmap[(codes.int() - 1).clamp(min=0)]
    return codes - ((x < 0) & (values >= 0) & (below < 0)).to(torch.uint8)


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
    h = c.at(t)
    flat, raw = p.reshape(-1).float(), g.reshape(-1).float() * _f32(gnorm_scale)
    grad = _fma(flat, h.coupled, raw)
    takes_part = (grad * grad if c.rule in (*TWO_STATES, *SQUARES_ALONE) else grad).isfinite()
    if c.skip_zeros:
        takes_part &= raw != 0
    before = [s.load() for s in states]
    u, moved = _direction(c, h, grad, before)
    rate = h.rate
    if c.max_unorm > 0:
        u_norm = _norm(u.masked_fill(~takes_part, 0))
        rate = _f32(rate * _trust(c.max_unorm, _norm(flat) if p_norm is None else p_norm, u_norm))
        if unorm is not None:
            unorm.view(-1)[:1].fill_(u_norm)
    stepped = torch.where(takes_part, _fma(u, -rate, flat * h.keep), flat)
    if c.seed is not None and p.element_size() == 2:
        stepped = rounded_stochastically(stepped, p.dtype, c.seed, t, offset)
    p.copy_(stepped.view(p.shape))
    for state, old, new in zip(states, before, moved, strict=True):
        state.store(torch.where(takes_part, new, old))


@default_kernel("bitsandbytes::optimizer_update_32bit")
def _(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    unorm_vec: Tensor | None,
    max_unorm: float,
    param_norm: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    step: int,
    lr: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    op, numbers = "optimizer_update_32bit", (lr, beta1, beta2, beta3, alpha, eps, weight_decay)
    check_update_32bit(optimizer_name, g, p, state1, state2, unorm_vec, step)
    check_numbers(op, "", optimizer_name, *numbers, max_unorm=max_unorm)
    check_scale(op, "", gnorm_scale, param_norm if max_unorm > 0 else None)
    second = state2 if optimizer_name in TWO_STATES else None
    check_apart(op, [{"p": p, "g": g, "state1": state1, "state2": second}])
    config = Config(optimizer_name, *numbers, max_unorm=max_unorm, skip_zeros=skip_zeros)
    states = _states(optimizer_name, p.numel(), (state1, second), (None, None), (None, None))
    _step(config, p, g, states, step, unorm_vec, 0, gnorm_scale, param_norm)


@default_kernel("bitsandbytes::optimizer_update_8bit_blockwise")
def _(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
    weight_decay: float,
    gnorm_scale: float,
    skip_zeros: bool = False,
) -> None:
    op, numbers = "optimizer_update_8bit_blockwise", (lr, beta1, beta2, beta3, alpha, eps, weight_decay)
    check_update_8bit(optimizer_name, g, p, state1, state2, step, qmap1, qmap2, absmax1, absmax2)
    check_numbers(op, "", optimizer_name, *numbers)
    check_scale(op, "", gnorm_scale)
    second = state2 if optimizer_name in TWO_STATES else None
    check_apart(op, [{"p": p, "g": g, "state1": state1, "state2": second, "absmax1": absmax1, "absmax2": absmax2}])
    config = Config(optimizer_name, *numbers, skip_zeros=skip_zeros)
    states = _states(optimizer_name, p.numel(), (state1, second), (absmax1, absmax2), (qmap1, qmap2))
    _step(config, p, g, states, step, gnorm_scale=gnorm_scale)


@default_kernel("bitsandbytes::optimizer_step")
def _(
    optimizer_name: str,
    p: Sequence[Tensor],
    g: Sequence[Tensor],
    state1: Sequence[Tensor],
    state2: Sequence[Tensor],
    absmax1: Sequence[Tensor],
    absmax2: Sequence[Tensor],
    unorm: Sequence[Tensor],
    qmap1: Tensor | None,
    qmap2: Tensor | None,
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    t_alpha: int = 0,
    t_beta3: int = 0,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    dampening: float = 0.0,
    nesterov: bool = False,
    bias_correction: bool = True,
    coupled_decay: bool = False,
    seed: int | None = None,
    offsets: Sequence[int] = (),
    gnorm_scales: Sequence[float] = (),
    p_norms: Sequence[float] = (),
    clock: Tensor | None = None,
) -> None:
    lists = (p, g, state1, state2, absmax1, absmax2, unorm)
    check_optimizer_step(optimizer_name, *lists, qmap1, qmap2, steps, offsets, gnorm_scales, p_norms, clock)
    op, two = "optimizer_step", optimizer_name in TWO_STATES
    numbers = (
        *(lr, beta1, beta2, beta3, alpha, eps, weight_decay, t_alpha, t_beta3, max_unorm),
        *(skip_zeros, dampening, nesterov, bias_correction, coupled_decay, seed),
    )
    check_numbers(op, "", optimizer_name, *numbers)
    for i, (scale, norm) in enumerate(zip_longest(gnorm_scales, p_norms)):
        check_scale(op, f"[{i}]", 1.0 if scale is None else scale, norm)
    parts = {"p": p, "g": g, "state1": state1, "absmax1": absmax1}
    parts |= {"state2": state2, "absmax2": absmax2} if two else {}
    check_apart(op, [{name: x[i] if x else None for name, x in parts.items()} for i in range(len(p))])
    config = Config(optimizer_name, *numbers)
    late = 0 if clock is None else int(clock.item())
    for i, tensor in enumerate(p):
        state = (state1[i], state2[i] if two else None)
        absmax = (absmax1[i] if absmax1 else None, absmax2[i] if absmax2 else None)
        states = _states(optimizer_name, tensor.numel(), state, absmax, (qmap1, qmap2))
        _step(
            config,
            tensor,
            g[i],
            states,
            steps[i] + late,
            unorm[i] if unorm else None,
            offsets[i] if offsets else 0,
            gnorm_scales[i] if gnorm_scales else 1.0,
            p_norms[i] if p_norms else None,
        )
    if clock is not None:
        clock.add_(1)
