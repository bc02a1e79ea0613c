"""LARS (You et al. 2017, arXiv 1708.03888)."""

from collections.abc import Callable
from typing import Any

import torch

from .._variants import fixed
from .optimizer import Optimizer1State


class LARS(Optimizer1State):
    """SGD with momentum whose update becomes no longer than max_unorm times the norm of its tensor."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """As torch.optim.SGD; the others as in Optimizer1State.

        Raises:
            NotImplementedError: momentum is 0.
        """
        if momentum == 0:
            raise NotImplementedError("LARS without momentum is not supported!")
        taken: dict[str, Any] = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own = (optim_bits, args, min_8bit_size, max_unorm)
        Optimizer1State.__init__(self, "lars", params, lr, (momentum, dampening), 0.0, weight_decay, *own, **taken)
        self.options = {"nesterov": nesterov}


class LARS8bit(Optimizer1State):
    """LARS with block-wise 8-bit momentum. 1 byte of state a parameter."""

    __init__ = fixed(LARS, optim_bits=8)


class LARS32bit(Optimizer1State):
    """LARS with momentum in fp32. 4 bytes of state a parameter."""

    __init__ = fixed(LARS, optim_bits=32)


class PytorchLARS(torch.optim.Optimizer):
    """LARS in plain torch, in the dtype of the parameters."""

    def __init__(
        self,
        params: Any,
        lr: float = 0.01,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        max_unorm: float = 0.02,
    ) -> None:
        if lr < 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if momentum < 0.0:
            raise ValueError(f"Invalid momentum value: {momentum}")
        if weight_decay < 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"nesterov": nesterov, "max_unorm": max_unorm})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have gradients; the loss of the closure is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self._update(group, p, p.grad), alpha=-float(group["lr"]))
        return loss

    def _update(self, group: dict[str, Any], p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        g = g.add(p, alpha=group["weight_decay"])
        update, momentum = g, group["momentum"]
        if momentum != 0:
            if "momentum_buffer" in self.state[p]:
                update = self.state[p]["momentum_buffer"].mul_(momentum).add_(g, alpha=1 - group["dampening"])
            else:
                update = self.state[p]["momentum_buffer"] = g.clone()
            if group["nesterov"]:
                update = g.add(update, alpha=momentum)
        p_norm, u_norm = p.norm(), update.norm()
        longest = group["max_unorm"] * p_norm
        clips = (group["max_unorm"] > 0) & (p_norm > 0) & (u_norm > longest)
        return update * torch.where(clips, longest / u_norm, 1.0)
