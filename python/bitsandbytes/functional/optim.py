"""One step of an optimizer for one tensor, in place. bitsandbytes.optim takes whole models at once."""

import torch
from torch import Tensor

from .. import _checks as check
from .._ops_optim import check_update_8bit, check_update_32bit

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
    """One step with fp32 state. Gradients that are not finite are passed over, element by element.

    Args:
        optimizer_name: adam, lamb, ademamix, lion, momentum, lars, rmsprop or adagrad.
        g, p: gradient and parameter, of one shape; fp32, fp16 or bf16, each on its own.
        state1, state2: fp32 of that shape, zeros before the first step; state1 of ademamix has two rows, (2, *p.shape).
        step: from 1.
        gnorm_scale: factor of the gradient.
        max_unorm: the update becomes no longer than this times the norm of p; 0 for no limit.
        unorm_vec: one fp32 element that gets the norm of the update, if max_unorm > 0.
        skip_zeros: pass over elements whose gradient is 0.

    The papers of the rules are named in bitsandbytes.optim.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "optimizer_update_32bit"
    check.tensor(op, "p", p)
    flat = Flat(op, p)
    second = None if state2 is None else flat("state2", state2)
    tensors = (flat("g", g), flat("p", p), flat("state1", state1), second, unorm_vec)
    param_norm = torch.linalg.vector_norm(p, dtype=torch.float32).item() if max_unorm > 0 else 0.0
    check_update_32bit(optimizer_name, *tensors, step)
    numbers = (beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros)
    _ops.optimizer_update_32bit.default(optimizer_name, *tensors, max_unorm, param_norm, *numbers)
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
        absmax1, absmax2: fp32, one a block; (2, blocks) for state1 of ademamix.
        The others as in optimizer_update_32bit.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "optimizer_update_8bit_blockwise"
    check.tensor(op, "p", p)
    flat = Flat(op, p)
    second = None if state2 is None else flat("state2", state2)
    tensors = (flat("g", g), flat("p", p), flat("state1", state1), second)
    numbers = (beta1, beta2, beta3, alpha, eps, step, lr)
    maps = (qmap1, qmap2, absmax1, absmax2)
    check_update_8bit(optimizer_name, *tensors, step, *maps)
    _ops.optimizer_update_8bit_blockwise.default(
        optimizer_name, *tensors, *numbers, *maps, weight_decay, gnorm_scale, skip_zeros
    )
    flat.write_back()
