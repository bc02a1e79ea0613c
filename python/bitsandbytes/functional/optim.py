"""One step of an optimizer for one tensor, in place. bitsandbytes.optim takes whole models at once."""

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from typing_extensions import deprecated

from .. import _checks as check
from .._codes import state_codes
from .._ops_optim import (
    RULES,
    TWO_STATES,
    Update8bit,
    Update32bit,
    check_disjoint,
    check_update_8bit,
    check_update_32bit,
    is_root,
)

_ops = torch.ops.bitsandbytes


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of a tensor, those with large strides first."""
    return sorted(range(x.dim()), key=x.stride, reverse=True)


class Flat:
    """Tensors as flat rows in the memory order of the parameter; those whose memory has gaps are copied, and written
    back at the end.

    State of AdEMAMix has one dimension more, in front.
    """

    def __init__(self, op: str, p: Tensor) -> None:
        self.op, self.p, self.order, self.copies = op, p, memory_order(p), list[tuple[Tensor, Tensor]]()

    def __call__(self, name: str, x: Tensor) -> Tensor:
        check.tensor(self.op, name, x)
        more = x.dim() - self.p.dim()
        if not 0 <= more <= 1 or x.shape[more:] != self.p.shape:
            return x
        ordered = x.permute([*range(more), *(d + more for d in self.order)])
        rows = ordered.contiguous()
        if rows is not ordered and name != "g":
            self.copies.append((ordered, rows))
        return rows.view(-1)

    def write_back(self) -> None:
        for x, rows in self.copies:
            x.copy_(rows)


@torch.no_grad()
def optimizer_update_32bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    beta1: float,
    eps: float,
    step: int,
    lr: float,
    state2: Tensor | None = None,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
) -> None:
    """One step with fp32 state. Elements whose gradient is not finite are skipped and keep parameter and state.

    Args:
        optimizer_name: adam, lamb, ademamix, lion, momentum, lars, rmsprop or adagrad.
        g, p: gradient and parameter, of one shape; fp32, fp16 or bf16, each on its own.
        state1, state2: fp32 of that shape, zeros before the first step; state1 of ademamix has two rows, (2, *p.shape).
        step: from 1.
        gnorm_scale: factor of the gradient.
        max_unorm: limit of the norm of the update, relative to the norm of p; 0 for no limit.
        unorm_vec: one fp32 element that receives the norm of the update, if max_unorm > 0.
        skip_zeros: skip elements whose gradient is 0 too.

    The papers of the rules are named in bitsandbytes.optim.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "optimizer_update_32bit"
    check.tensor(op, "p", p)
    flat = Flat(op, p)
    update = Update32bit(
        optimizer_name=optimizer_name,
        g=flat("g", g),
        p=flat("p", p),
        state1=flat("state1", state1),
        state2=None if state2 is None else flat("state2", state2),
        unorm_vec=unorm_vec,
        max_unorm=max_unorm,
        param_norm=torch.linalg.vector_norm(p, dtype=torch.float32).item() if max_unorm > 0 else 0.0,
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        lr=lr,
        gnorm_scale=gnorm_scale,
        skip_zeros=skip_zeros,
    )
    check_update_32bit(update)
    _ops.optimizer_update_32bit.default(*update)
    flat.write_back()


@torch.no_grad()
def optimizer_update_8bit_blockwise(
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
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    skip_zeros: bool = False,
) -> None:
    """One step with 8-bit state in blocks of 256: x = qmap[state] * absmax (arXiv 2110.02861).

    Args:
        state1, state2: uint8, of the shape of p, (2, *p.shape) for state1 of ademamix; zeros, with zeros in absmax,
            before the first step.
        qmap1, qmap2: 256 ascending fp32 values; the signed and the unsigned dynamic map, as a rule.
        absmax1, absmax2: fp32, one per block; (2, blocks) for state1 of ademamix.
        The others as in optimizer_update_32bit.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "optimizer_update_8bit_blockwise"
    check.tensor(op, "p", p)
    flat = Flat(op, p)
    update = Update8bit(
        optimizer_name=optimizer_name,
        g=flat("g", g),
        p=flat("p", p),
        state1=flat("state1", state1),
        state2=None if state2 is None else flat("state2", state2),
        beta1=beta1,
        beta2=beta2,
        beta3=beta3,
        alpha=alpha,
        eps=eps,
        step=step,
        lr=lr,
        qmap1=qmap1,
        qmap2=qmap2,
        absmax1=absmax1,
        absmax2=absmax2,
        weight_decay=weight_decay,
        gnorm_scale=gnorm_scale,
        skip_zeros=skip_zeros,
    )
    check_update_8bit(update)
    _ops.optimizer_update_8bit_blockwise.default(*update)
    flat.write_back()


@deprecated("optimizer_update_8bit will be removed; use optimizer_update_8bit_blockwise.", category=FutureWarning)
@torch.no_grad()
def optimizer_update_8bit(
    optimizer_name: str,
    g: Tensor,
    p: Tensor,
    state1: Tensor,
    state2: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    lr: float,
    qmap1: Tensor,
    qmap2: Tensor | None,
    max1: Tensor,
    max2: Tensor | None,
    new_max1: Tensor,
    new_max2: Tensor | None,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    unorm_vec: Tensor | None = None,
    max_unorm: float = 0.0,
) -> None:
    """Deprecated. One step with 8-bit state that has one scale per tensor: x = qmap[state] * max.

    Args:
        optimizer_name: adam, lamb, lion, momentum, lars, rmsprop or adagrad.
        max1, max2: one fp32 element each, the scales of the states as they are.
        new_max1, new_max2: likewise; they receive the scales of the states after the step.
        The others as in optimizer_update_32bit and optimizer_update_8bit_blockwise.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "optimizer_update_8bit"
    check.one_of(op, "optimizer_name", optimizer_name, [rule for rule in RULES if rule != "ademamix"])
    check.tensor(op, "p", p)
    states: list[Any] = [(1, state1, qmap1, max1, new_max1)]
    if optimizer_name in TWO_STATES:
        states.append((2, state2, qmap2, max2, new_max2))
    wide = [_widened(op, p, *state) for state in states]
    check_disjoint(op, [{"p": p, "g": g, "state1": state1, "state2": state2}])
    optimizer_update_32bit(
        *(optimizer_name, g, p, wide[0], beta1, eps, step, lr, wide[1] if len(wide) > 1 else None, beta2),
        weight_decay=weight_decay,
        gnorm_scale=gnorm_scale,
        unorm_vec=unorm_vec,
        max_unorm=max_unorm,
    )
    for x, (number, state, qmap, _, scale) in zip(wide, states, strict=True):
        scale.fill_(x.abs().max() if x.numel() else 0)
        codes = state_codes(x.reshape(1, -1), scale.view(1), qmap.view(-1), is_root(optimizer_name, number))
        state.copy_(codes.view(state.shape))


def _widened(op: str, p: Tensor, number: int, state: Tensor, qmap: Tensor, scale: Tensor, new_scale: Tensor) -> Tensor:
    """A state with one scale in fp32, its parts checked."""
    sizes = {"state": p.numel(), "qmap": check.CODES, "max": 1, "new_max": 1}
    for (name, size), x in zip(sizes.items(), (state, qmap, scale, new_scale), strict=True):
        check.tensor(op, f"{name}{number}", x)
        check.dtype(op, f"{name}{number}", x, torch.uint8 if name == "state" else torch.float32)
        check.equal(op, f"{name}{number}", "elements", x.numel(), size)
        check.same_device(op, p.device, **{f"{name}{number}": x})
    return qmap.view(-1)[state.int()] * scale.view(())


HISTORY = 100  # norms of gradients, of which percentile clipping takes one


def check_percentile(op: str, name: str, percentile: Any, most: int = HISTORY) -> None:
    number = isinstance(percentile, Real) and not isinstance(percentile, bool)
    if not number or not 0 <= percentile <= most or percentile != int(percentile):
        raise ValueError(f"{op}: {name} is {percentile!r}, expected a whole number from 0 to {most}")


def clipped_norm(op: str, g: Tensor, gnorm_vec: Tensor, step: int, percentile: int) -> tuple[float, float, Tensor]:
    """The norm of a gradient, the percentile of it and the norms before it, and what gnorm_vec becomes.

    Elements that are not finite count as 0: a step skips them.
    """
    check.tensor(op, "gnorm_vec", gnorm_vec)
    check.dtype(op, "gnorm_vec", gnorm_vec, torch.float32)
    check.equal(op, "gnorm_vec", "elements", gnorm_vec.numel(), HISTORY)
    norm = torch.linalg.vector_norm(g, dtype=torch.float64)
    if not bool(norm.isfinite()):
        norm = torch.linalg.vector_norm(g.nan_to_num(0, 0, 0), dtype=torch.float64)
    square = norm.square().clamp(max=torch.finfo(torch.float32).max).float()
    history = gnorm_vec.clone()
    if step == 1 or not bool(history.any()):  # there is none yet
        history[:] = square
    history[step % HISTORY] = square
    limit = history.view(-1).sort().values[int(percentile)].sqrt()
    return square.sqrt().item(), limit.item(), history


def scale_to(norm: float, limit: float) -> float:
    """The factor that makes a norm no greater than the limit."""
    return limit / norm if norm > limit else 1.0


@deprecated("percentile_clipping will be removed; optimizers have an option of that name.", category=FutureWarning)
@torch.no_grad()
def percentile_clipping(
    grad: Tensor, gnorm_vec: Tensor, step: int, percentile: int = 5
) -> tuple[Tensor, Tensor, float]:
    """Deprecated. The norm of a gradient, the percentile of the last 100 norms, and the factor that clips to it.

    Args:
        gnorm_vec: 100 fp32 elements, the squares of the norms; this one's is written to element step % 100, at step 1
            to all.
        step: from 1.
        percentile: from 0 to 99, of the norms in ascending order.
    """
    op = "percentile_clipping"
    check.tensor(op, "grad", grad)
    check.dtype(op, "grad", grad, *check.FLOATS)
    check_percentile(op, "percentile", percentile, HISTORY - 1)
    if isinstance(step, bool) or not isinstance(step, Integral) or step < 1:
        raise ValueError(f"{op}: step is {step!r}, expected a whole number of 1 or more")
    norm, limit, history = clipped_norm(op, grad, gnorm_vec, step, percentile)
    gnorm_vec.copy_(history)
    found, most = (grad.new_tensor(x, dtype=torch.float32) for x in (norm, limit))
    return found, most, scale_to(norm, limit)
