"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101)."""

from typing import Any

from .._variants import fixed, no_amsgrad
from .optimizer import Optimizer2State


class AdamW(Optimizer2State):
    """Adam with decoupled weight decay: p = p * (1 - lr * weight_decay) - lr * u."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """As torch.optim.AdamW; the others as in Optimizer2State.

        Raises:
            ValueError: amsgrad is set.
        """
        no_amsgrad(self, amsgrad)
        taken: dict[str, Any] = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own = (optim_bits, args, min_8bit_size)
        Optimizer2State.__init__(self, "adam", params, lr, betas, eps, weight_decay, *own, is_paged=is_paged, **taken)


class AdamW8bit(Optimizer2State):
    """AdamW with block-wise 8-bit moments. 2 bytes of state a parameter."""

    __init__ = fixed(AdamW, shown=["optim_bits"], optim_bits=8)


class AdamW32bit(Optimizer2State):
    """AdamW with moments in fp32. 8 bytes of state a parameter."""

    __init__ = fixed(AdamW, shown=["optim_bits"], optim_bits=32)


class PagedAdamW(Optimizer2State):
    """AdamW whose state may leave the GPU."""

    __init__ = fixed(AdamW, is_paged=True)


class PagedAdamW8bit(Optimizer2State):
    """AdamW with block-wise 8-bit moments that may leave the GPU."""

    __init__ = fixed(AdamW, shown=["optim_bits"], optim_bits=8, is_paged=True)


class PagedAdamW32bit(Optimizer2State):
    """AdamW with moments in fp32 that may leave the GPU."""

    __init__ = fixed(AdamW, shown=["optim_bits"], optim_bits=32, is_paged=True)
