"""The operators of the optimizers: schemas and shape functions, as _ops_fourbit.py has them for 4 bits.

One step of one rule. State is fp32, or 8-bit codes in blocks of 256: x = map[code] * absmax (arXiv 2110.02861).
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch.library import register_fake

from . import _checks as check
from ._schemas import gather, schema_of


class Numbers(NamedTuple):
    """What all tensors of a call share: OptimizerConfig of bnb/optim.h."""

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


class OptimizerStep(NamedTuple):
    """A whole group of tensors in one call, of any mixture of dtypes and states; those with codes have absmax."""

    optimizer_name: str
    p: Annotated[Sequence[Tensor], "a!"]
    g: Sequence[Tensor]
    state1: Annotated[Sequence[Tensor], "b!"]
    state2: Annotated[Sequence[Tensor], "c!"]
    absmax1: Annotated[Sequence[Tensor], "d!"]
    absmax2: Annotated[Sequence[Tensor], "e!"]
    unorm: Annotated[Sequence[Tensor], "f!"]
    qmap1: Tensor | None
    qmap2: Tensor | None
    steps: Sequence[int]
    numbers: Numbers
    offsets: Sequence[int] = ()
    gnorm_scales: Sequence[float] = ()
    p_norms: Sequence[float] = ()
    clock: Annotated[Tensor | None, "g!"] = None  # added to every step, and incremented by the call


class Update32bit(NamedTuple):
    optimizer_name: str
    g: Annotated[Tensor, "a0!"]
    p: Annotated[Tensor, "a1!"]
    state1: Annotated[Tensor, "a2!"]
    state2: Annotated[Tensor | None, "a3!"]
    unorm_vec: Annotated[Tensor | None, "a4!"]
    max_unorm: float
    param_norm: float
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    weight_decay: float
    step: int
    lr: float
    gnorm_scale: float
    skip_zeros: bool = False


class Update8bit(NamedTuple):
    optimizer_name: str
    g: Annotated[Tensor, "a0!"]
    p: Annotated[Tensor, "a1!"]
    state1: Annotated[Tensor, "a2!"]
    state2: Annotated[Tensor | None, "a3!"]
    beta1: float
    beta2: float
    beta3: float
    alpha: float
    eps: float
    step: int
    lr: float
    qmap1: Annotated[Tensor, "a4!"]
    qmap2: Annotated[Tensor | None, "a5!"]
    absmax1: Annotated[Tensor, "a6!"]
    absmax2: Annotated[Tensor | None, "a7!"]
    weight_decay: float
    gnorm_scale: float
    skip_zeros: bool = False


def numbers_of(update: Update32bit | Update8bit) -> Numbers:
    return Numbers(**{name: x for name, x in update._asdict().items() if name in Numbers._fields})


# The first two are part of the public contract.
SCHEMAS = {
    "optimizer_update_32bit": schema_of(Update32bit),
    "optimizer_update_8bit_blockwise": schema_of(Update8bit),
    "optimizer_step": schema_of(OptimizerStep),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"bitsandbytes::{_name}", _schema)

BLOCK = 256
RULES = ("adam", "lamb", "ademamix", "lion", "momentum", "lars", "rmsprop", "adagrad")
TWO_STATES = ("adam", "lamb", "ademamix")
MOMENTUM = ("momentum", "lars")
SQUARES_ALONE = ("rmsprop", "adagrad")  # whose one state holds second moments


def first_states(rule: str) -> int:
    """Elements of state 1 per element of the parameter: AdEMAMix keeps two EMAs there."""
    return 2 if rule == "ademamix" else 1


def is_root(rule: str, number: int) -> bool:
    """Whether state 1 or 2 holds second moments: the step is divided by their square root."""
    return number == 2 or rule in SQUARES_ALONE


def contiguous(op: str, name: str, state: Tensor) -> None:
    if not state.is_contiguous():
        raise ValueError(f"{op}: {name} has strides {tuple(state.stride())}, expected a contiguous tensor")


def check_state(
    op: str, number: int, at: str, rule: str, n: int, state: Tensor, qmap: Tensor | None, absmax: Tensor | None
) -> None:
    """State 1 or 2 of a parameter of n elements. `at` is appended to names: [3] for the fourth of a list."""
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


def check_numbers(op: str, at: str, rule: str, c: Numbers) -> None:
    """As src/common/arguments.h checks them. `at` is appended to names."""
    products = {"lr": c.lr, "eps": c.eps, "weight_decay": c.weight_decay, "lr * weight_decay": c.lr * c.weight_decay}
    for name, x in (products | {"max_unorm": c.max_unorm}).items():
        if not 0 <= x <= LARGEST:
            raise ValueError(f"{op}: {name}{at} is {x}, expected a number of 0 or more that is finite in fp32")
    for name, x in (("alpha", c.alpha), ("dampening", c.dampening)):
        if not -LARGEST <= x <= LARGEST:
            raise ValueError(f"{op}: {name}{at} is {x}, expected a number that is finite in fp32")
    corrected = rule in TWO_STATES and c.bias_correction
    betas = [("beta1", c.beta1)] + ([("beta2", c.beta2)] if rule in (*TWO_STATES, "lion") else [])
    for name, x in betas:
        if not 0 <= x <= 1 or (corrected and x == 1):
            allowed = "a number from 0 to below 1" if corrected else "a number from 0 to 1"
            raise ValueError(f"{op}: {name}{at} is {x}, expected {allowed}")
    if rule == "ademamix" and not 0 <= c.beta3 <= 1:
        raise ValueError(f"{op}: beta3{at} is {c.beta3}, expected a number from 0 to 1")
    for name, steps in (("t_alpha", c.t_alpha), ("t_beta3", c.t_beta3)):
        if steps < 0:
            raise ValueError(f"{op}: {name}{at} is {steps}, expected 0 or more steps")


def check_scale(op: str, at: str, gnorm_scale: float, p_norm: float | None = None) -> None:
    if not -LARGEST <= gnorm_scale <= LARGEST:
        raise ValueError(f"{op}: gnorm_scale{at} is {gnorm_scale}, expected a finite number")
    if p_norm is not None and not p_norm >= 0:
        raise ValueError(f"{op}: p_norm{at} is {p_norm}, expected a number of 0 or more")


def check_disjoint(op: str, tensors: Sequence[Mapping[str, Tensor | None]]) -> None:
    """Outputs must not overlap inputs or one another. `tensors`: the parts of each by name, of which only g is read."""
    many = len(tensors) > 1
    pieces = sorted(
        (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size(), name, f"[{i}]" if many else "", name != "g")
        for i, parts in enumerate(tensors)
        for name, x in parts.items()
        if x is not None and x.numel() and not x.is_meta
    )
    last: dict[bool, Any] = {}  # the piece that ends last: of all (False), of those written (True)
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
    """A state is flat or has the shape of the parameter, after a dimension of 2 if it is doubled."""
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


def check_update_32bit(u: Update32bit) -> None:
    op, rule = "optimizer_update_32bit", u.optimizer_name
    check.one_of(op, "optimizer_name", rule, RULES)
    check_tensor(op, "", rule, u.p, u.g, u.state1, u.state2)
    check_step(op, u.step)
    for number, state in ((1, u.state1), (2, u.state2 if rule in TWO_STATES else None)):
        if state is not None:
            check.dtype(op, f"state{number}", state, torch.float32)
            check_state(op, number, "", rule, u.p.numel(), state, None, None)
    if u.unorm_vec is not None:
        check.dtype(op, "unorm_vec", u.unorm_vec, torch.float32)
        check.at_least(op, "unorm_vec", u.unorm_vec.numel(), 1)
        check.same_device(op, u.p.device, unorm_vec=u.unorm_vec)


def check_update_8bit(u: Update8bit) -> None:
    op, rule = "optimizer_update_8bit_blockwise", u.optimizer_name
    check.one_of(op, "optimizer_name", rule, RULES)
    check_tensor(op, "", rule, u.p, u.g, u.state1, u.state2)
    check_step(op, u.step)
    second = u.state2 if rule in TWO_STATES else None
    for number, state, qmap, absmax in ((1, u.state1, u.qmap1, u.absmax1), (2, second, u.qmap2, u.absmax2)):
        if state is not None:
            check.dtype(op, f"state{number}", state, torch.uint8)
            check_state(op, number, "", rule, u.p.numel(), state, qmap, absmax)
    check.same_device(op, u.p.device, qmap1=u.qmap1, qmap2=u.qmap2, absmax1=u.absmax1, absmax2=u.absmax2)


def check_optimizer_step(s: OptimizerStep) -> None:
    op, rule, n = "optimizer_step", s.optimizer_name, len(s.p)
    if n == 0:
        return
    check.one_of(op, "optimizer_name", rule, RULES)
    two = rule in TWO_STATES
    lists: dict[str, Sequence[Any]] = {"g": s.g, "state1": s.state1, "steps": s.steps}
    if two:
        lists["state2"] = s.state2
    for name in ("absmax1", "unorm", "offsets", "gnorm_scales", "p_norms", *(["absmax2"] if two else [])):
        if len(values := getattr(s, name)):  # those may be left out
            lists[name] = values
    for name, values in lists.items():
        if len(values) != n:
            raise ValueError(f"{op}: {name} has {len(values)} entries, expected {n}, one per tensor of p")
    for i, p in enumerate(s.p):
        at = f"[{i}]"
        check_tensor(op, at, rule, p, s.g[i], s.state1[i], s.state2[i] if two else None)
        check_step(op, s.steps[i])
        check.same_device(op, s.p[0].device, **{f"p{at}": p})
        first, second = (a[i] if len(a) else None for a in (s.absmax1, s.absmax2))
        check_state(op, 1, at, rule, p.numel(), s.state1[i], s.qmap1, first)
        if two:
            check_state(op, 2, at, rule, p.numel(), s.state2[i], s.qmap2, second)
        if len(s.unorm):
            check.dtype(op, f"unorm{at}", s.unorm[i], torch.float32)
            check.at_least(op, f"unorm{at}", s.unorm[i].numel(), 1)
    check.same_device(op, s.p[0].device, qmap1=s.qmap1, qmap2=s.qmap2, clock=s.clock)
    if s.clock is not None:
        check.dtype(op, "clock", s.clock, torch.int64)
        check.equal(op, "clock", "size", s.clock.numel(), 1)


@register_fake("bitsandbytes::optimizer_update_32bit")
def _(*arguments: Any) -> None:
    check_update_32bit(Update32bit(*arguments))


@register_fake("bitsandbytes::optimizer_update_8bit_blockwise")
def _(*arguments: Any) -> None:
    check_update_8bit(Update8bit(*arguments))


@register_fake("bitsandbytes::optimizer_step")
def _(*arguments: Any) -> None:
    check_optimizer_step(gather(OptimizerStep, arguments))
