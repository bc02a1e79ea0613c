"""AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137)."""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch

from .._variants import fixed
from .optimizer import Optimizer2State


class _ReferenceAdEMAMix(torch.optim.Optimizer):
    """AdEMAMix in plain torch, in the dtype of the parameters. State: m1_m2 of shape (2, *p.shape), and nu."""

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        t_beta3: int | None = None,
        t_alpha: int | None = None,
    ) -> None:
        numbers = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, numbers | {"t_beta3": t_beta3, "t_alpha": t_alpha})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of all parameters that have gradients; the loss of the closure is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            t = group["step"] = group.get("step", 0) + 1
            beta1, beta2, beta3 = group["betas"]
            alpha = group["alpha"] * (1 if group["t_alpha"] is None else min(1, t / group["t_alpha"]))
            if group["t_beta3"] is not None:  # the half-life grows linearly from that of beta1
                part, ln1, ln3 = t / group["t_beta3"], math.log(beta1), math.log(beta3)
                beta3 = min(beta3, math.exp(ln1 * ln3 / ((1 - part) * ln3 + part * ln1)))
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad
                if not state:
                    state.update(m1_m2=p.new_zeros((2, *p.shape)), nu=torch.zeros_like(p))
                (m1, m2), v = state["m1_m2"], state["nu"]
                m1.lerp_(g, 1 - beta1)
                m2.lerp_(g, 1 - beta3)
                v.lerp_(g * g, 1 - beta2)
                update = (m1 / (1 - beta1**t) + alpha * m2) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
                p.sub_(group["lr"] * (update + group["weight_decay"] * p))
        return loss


class AdEMAMix(Optimizer2State):
    """Adam with a second, slow average m2: u = (m1 / (1 - beta1^t) + alpha * m2) / (sqrt(v / (1 - beta2^t)) + eps).

    alpha grows linearly over t_alpha steps, and the half-life of beta3 over t_beta3. state1 holds m1 and m2.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: Literal[8, 32] = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
    ) -> None:
        """betas: of m1, v and m2. t_alpha, t_beta3: steps, None for none. The others as in Optimizer2State."""
        options = (optim_bits, None, min_8bit_size, 0.0, False, is_paged)
        Optimizer2State.__init__(
            self, "ademamix", params, lr, betas, eps, weight_decay, *options, alpha, t_alpha, t_beta3
        )


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with block-wise 8-bit moments. 3 bytes of state a parameter."""

    __init__ = fixed(AdEMAMix, optim_bits=8)


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix with block-wise 8-bit moments that may leave the GPU."""

    __init__ = fixed(AdEMAMix, optim_bits=8, is_paged=True)


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix whose state may leave the GPU."""

    __init__ = fixed(AdEMAMix, is_paged=True)


class AdEMAMix32bit(Optimizer2State):
    """AdEMAMix with moments in fp32. 12 bytes of state a parameter."""

    __init__ = fixed(AdEMAMix, optim_bits=32)


class PagedAdEMAMix32bit(AdEMAMix32bit):
    """AdEMAMix with moments in fp32 that may leave the GPU."""

    __init__ = fixed(AdEMAMix, optim_bits=32, is_paged=True)
