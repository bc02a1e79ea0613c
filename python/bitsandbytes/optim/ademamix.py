"""AdEMAMix (Pagliardini et al. 2024, arXiv 2409.03137)."""

from collections.abc import Iterable
from typing import Literal

import torch

from ._variants import fixed
from .optimizer import Optimizer2State


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
