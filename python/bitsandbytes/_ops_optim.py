"""The operators of the optimizers: schemas and shape functions, as _ops.py has them for the others.

One step of one rule. State is fp32, or 8-bit codes in blocks of 256: x = map[code] * absmax (arXiv 2110.02861).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from . import _checks as check

# The first two are part of the public contract. optimizer_step is a whole group of tensors in one call, of any mixture
# of dtypes and states; those with codes have absmax. `clock` is added to every step, and then counts on by itself.
SCHEMAS = {
    "optimizer_update_32bit": (
        "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, "
        "Tensor(a4!)? unorm_vec, float max_unorm, float param_norm, float beta1, float beta2, float beta3, "
        "float alpha, float eps, float weight_decay, int step, float lr, float gnorm_scale, bool skip_zeros=False) "
        "-> ()"
    ),
    "optimizer_update_8bit_blockwise": (
        "(str optimizer_name, Tensor(a0!) g, Tensor(a1!) p, Tensor(a2!) state1, Tensor(a3!)? state2, float beta1, "
        "float beta2, float beta3, float alpha, float eps, int step, float lr, Tensor(a4!) qmap1, Tensor(a5!)? qmap2, "
        "Tensor(a6!) absmax1, Tensor(a7!)? absmax2, float weight_decay, float gnorm_scale, bool skip_zeros=False) "
        "-> ()"
    ),
    "optimizer_step": (
        "(str optimizer_name, Tensor(a!)[] p, Tensor[] g, Tensor(b!)[] state1, Tensor(c!)[] state2, "
        "Tensor(d!)[] absmax1, Tensor(e!)[] absmax2, Tensor(f!)[] unorm, Tensor? qmap1, Tensor? qmap2, int[] steps, "
        "float lr, float beta1, float beta2, float beta3, float alpha, float eps, float weight_decay, "
        "int t_alpha=0, int t_beta3=0, float max_unorm=0., bool skip_zeros=False, float dampening=0., "
        "bool nesterov=False, bool bias_correction=True, bool coupled_decay=False, int? seed=None, int[] offsets=[], "
        "float[] gnorm_scales=[], float[] p_norms=[], Tensor(g!)? clock=None) -> ()"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"bitsandbytes::{_name}", _schema)

BLOCK = 256
RULES = ("adam", "lamb", "ademamix", "lion", "momentum", "lars", "rmsprop", "adagrad")
TWO_STATES = ("adam", "lamb", "ademamix")
MOMENTUM = ("momentum", "lars")
SQUARES_ALONE = ("rmsprop", "adagrad")  # whose one state holds second moments


def first_states(rule: str) -> int:
    """Elements of state 1 for each of the parameter: AdEMAMix keeps two averages there."""
    return 2 if rule == "ademamix" else 1


def is_root(rule: str, number: int) -> bool:
    """Whether state 1 or 2 holds second moments, by whose root the step is divided."""
    return number == 2 or rule in SQUARES_ALONE


def contiguous(op: str, name: str, state: Tensor) -> None:
    if not state.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {tuple(state.stride())}, expected a contiguous tensor")


def check_state(
    op: str, number: int, at: str, rule: str, n: int, state: Tensor, qmap: Tensor | None, absmax: Tensor | None
) -> None:
    """State 1 or 2 of a parameter of n elements. `at` stands behind names, as [3] for the fourth of a list."""
    copies = first_states(rule) if number == 1 else 1
    check.dtype(op, f"state{number}{at}", state, torch.float32, torch.uint8)
    check.equal(op, f"state{number}{at}", "elements", state.numel(), copies * n)
    contiguous(op, f"state{number}{at}", state)
    if state.dtype == torch.float32:
        return
    if qmap is None:
        raise ValueError(f"{op}: qmap{number} is None, expected the map of the codes in state{number}{at}")
    check.dtype(op, f"qmap{number}", qmap, torch.float32)
    check.equal(op, f"qmap{number}", "size", qmap.numel(), check.CODES)
    if absmax is None:
        raise ValueError(f"{op}: absmax{number}{at} is missing, expected the scales of the codes in state{number}{at}")
    check.dtype(op, f"absmax{number}{at}", absmax, torch.float32)
    check.at_least(op, f"absmax{number}{at}", absmax.numel(), copies * check.blocks(n, BLOCK))
    contiguous(op, f"absmax{number}{at}", absmax)


LARGEST = torch.finfo(torch.float32).max


def check_numbers(
    op: str,
    at: str,
    rule: str,
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
    *_: Any,
) -> None:
    """The numbers of optimizer_step from lr on, as src/common/arguments.h checks them. `at` is appended to names."""
    numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "lr * weight_decay": lr * weight_decay}
    for name, x in (numbers | {"max_unorm": max_unorm}).items():
        if not 0 <= x <= LARGEST:
            raise ValueError(f"{op}: {name}{at} is {x}, expected a number of 0 or more that is finite in fp32")
    for name, x in (("alpha", alpha), ("dampening", dampening)):
        if not -LARGEST <= x <= LARGEST:
            raise ValueError(f"{op}: {name}{at} is {x}, expected a number that is finite in fp32")
    corrected = rule in TWO_STATES and bias_correction
    betas = [("beta1", beta1)] + ([("beta2", beta2)] if rule in (*TWO_STATES, "lion") else [])
    for name, x in betas:
        if not 0 <= x <= 1 or (corrected and x == 1):
            allowed = "a number from 0 to below 1" if corrected else "a number from 0 to 1"
            raise ValueError(f"{op}: {name}{at} is {x}, expected {allowed}")
    if rule == "ademamix" and not 0 <= beta3 <= 1:
        raise ValueError(f"{op}: beta3{at} is {beta3}, expected a number from 0 to 1")
    for name, steps in (("t_alpha", t_alpha), ("t_beta3", t_beta3)):
        if steps < 0:
            raise ValueError(f"{op}: {name}{at} is {steps}, expected 0 or more steps")


def check_scale(op: str, at: str, gnorm_scale: float, p_norm: float | None = None) -> None:
    if not -LARGEST <= gnorm_scale <= LARGEST:
        raise ValueError(f"{op}: gnorm_scale{at} is {gnorm_scale}, expected a finite number")
    if p_norm is not None and not p_norm >= 0:
        raise ValueError(f"{op}: p_norm{at} is {p_norm}, expected a number of 0 or more")


def check_apart(op: str, tensors: Sequence[Mapping[str, Tensor | None]]) -> None:
    """That what is written lies apart from all else; of each tensor of a call its parts by name, of which g is read."""
    many = len(tensors) > 1
    pieces = sorted(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), name, f"[{i}]" if many else "", name != "g")
        for i, parts in enumerate(tensors)
        for name, x in parts.items()
        if x is not None and x.numel() and not x.is_meta
    )
    last: dict[bool, Any] = {}  # what ends last: of all, of what is written
    for piece in pieces:
        begin, end, *_, written = piece
        before = last.get(not written)
        if before is not None and begin < before[1]:
            mine, other = (piece, before) if written else (before, piece)
            raise ValueError(
                f"{op}: {mine[2]}{mine[3]} is in the memory of {other[2]}{other[3]}, expected memory of its own"
            )
        for kind in (False, True) if written else (False,):
            if kind not in last or end > last[kind][1]:
                last[kind] = piece


def _check_shape(op: str, name: str, state: Tensor, p: Tensor, doubled: bool) -> None:
    """A state is flat or has the shape of the parameter; two of it are one behind the other."""
    wanted = (2, *p.shape) if doubled else tuple(p.shape)
    if state.dim() >= 2 + doubled and p.dim() >= 2 and tuple(state.shape) != wanted:
        raise ValueError(f"{op}: {name} has shape {tuple(state.shape)}, expected {wanted}, that of p")


def check_tensor(op: str, at: str, rule: str, p: Tensor, g: Tensor, state1: Tensor, state2: Tensor | None) -> None:
    check.dtype(op, f"p{at}", p, *check.FLOATS)
    check.dtype(op, f"g{at}", g, *check.FLOATS)
    check.equal(op, f"g{at}", "size", g.numel(), p.numel())
    _check_shape(op, f"state1{at}", state1, p, first_states(rule) == 2)
    if rule in TWO_STATES:
        if state2 is None:
            raise ValueError(f"{op}: state2{at} is None, expected the second moments of {rule}")
        _check_shape(op, f"state2{at}", state2, p, False)
        if state1.dtype in (torch.float32, torch.uint8):  # else it is state1 that is wrong
            check.dtype(op, f"state2{at}", state2, state1.dtype)
    check.same_device(op, p.device, **{f"g{at}": g, f"state1{at}": state1, f"state2{at}": state2})


def check_step(op: str, step: int) -> None:
    torch._check_value(step >= 1, lambda: f"{op}: step is {step}, expected 1 or more")


def check_update_32bit(
    rule: str, g: Tensor, p: Tensor, state1: Tensor, state2: Tensor | None, unorm_vec: Tensor | None, step: int
) -> None:
    op = "optimizer_update_32bit"
    check.one_of(op, "optimizer_name", rule, RULES)
    check_tensor(op, "", rule, p, g, state1, state2)
    check_step(op, step)
    for number, state in ((1, state1), (2, state2 if rule in TWO_STATES else None)):
        if state is not None:
            check.dtype(op, f"state{number}", state, torch.float32)
            check_state(op, number, "", rule, p.numel(), state, None, None)
    if unorm_vec is not None:
        check.dtype(op, "unorm_vec", unorm_vec, torch.float32)
        check.at_least(op, "unorm_vec", unorm_vec.numel(), 1)
        check.same_device(op, p.device, unorm_vec=unorm_vec)


def check_update_8bit(
    rule: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    step: int,
    qmap1: Tensor,
    qmap2: Tensor | None,
    absmax1: Tensor,
    absmax2: Tensor | None,
) -> None:
    op = "optimizer_update_8bit_blockwise"
    check.one_of(op, "optimizer_name", rule, RULES)
    check_tensor(op, "", rule, p, g, state1, state2)
    check_step(op, step)
    states = ((1, state1, qmap1, absmax1), (2, state2 if rule in TWO_STATES else None, qmap2, absmax2))
    for number, state, qmap, absmax in states:
        if state is not None:
            check.dtype(op, f"state{number}", state, torch.uint8)
            check_state(op, number, "", rule, p.numel(), state, qmap, absmax)
    check.same_device(op, p.device, qmap1=qmap1, qmap2=qmap2, absmax1=absmax1, absmax2=absmax2)


def check_optimizer_step(
    rule: str,
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
    offsets: Sequence[int],
    gnorm_scales: Sequence[float],
    p_norms: Sequence[float],
    clock: Tensor | None,
) -> None:
    op = "optimizer_step"
    if not len(p):
        return
    check.one_of(op, "optimizer_name", rule, RULES)
    two = rule in TWO_STATES
    lists = {"g": g, "state1": state1, "steps": steps} | ({"state2": state2} if two else {})
    optional = {"absmax1": absmax1, "unorm": unorm, "offsets": offsets, "gnorm_scales": gnorm_scales}
    optional |= {"p_norms": p_norms} | ({"absmax2": absmax2} if two else {})
    lists |= {name: values for name, values in optional.items() if len(values)}
    for name, values in lists.items():
        if len(values) != len(p):
            raise ValueError(f"{op}: {name} has {len(values)} entries, expected {len(p)}, one a tensor of p")
    for i, t in enumerate(p):
        at = f"[{i}]"
        check_tensor(op, at, rule, t, g[i], state1[i], state2[i] if two else None)
        check_step(op, steps[i])
        check.same_device(op, p[0].device, **{f"p{at}": t})
        first, second = (a[i] if len(a) else None for a in (absmax1, absmax2))
        check_state(op, 1, at, rule, t.numel(), state1[i], qmap1, first)
        if two:
            check_state(op, 2, at, rule, t.numel(), state2[i], qmap2, second)
        if len(unorm):
            check.dtype(op, f"unorm{at}", unorm[i], torch.float32)
            check.at_least(op, f"unorm{at}", unorm[i].numel(), 1)
    check.same_device(op, p[0].device, qmap1=qmap1, qmap2=qmap2, clock=clock)
    if clock is not None:
        check.dtype(op, "clock", clock, torch.int64)
        check.equal(op, "clock", "size", clock.numel(), 1)


@register_fake("bitsandbytes::optimizer_update_32bit")
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
    check_update_32bit(optimizer_name, g, p, state1, state2, unorm_vec, step)


@register_fake("bitsandbytes::optimizer_update_8bit_blockwise")
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
    check_update_8bit(optimizer_name, g, p, state1, state2, step, qmap1, qmap2, absmax1, absmax2)


@register_fake("bitsandbytes::optimizer_step")
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
