"""Adam (Kingma & Ba 2015, arXiv 1412.6980)."""

from typing import Any

from .._variants import fixed, no_amsgrad
from .optimizer import Optimizer2State


class Adam(Optimizer2State):
    """Adam: u = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps). Weight decay is decoupled, as AdamW's."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """As torch.optim.Adam; the others as in Optimizer2State.

        Raises:
            ValueError: amsgrad is set.
        """
        no_amsgrad(self, amsgrad)
        taken: dict[str, Any] = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own = (optim_bits, args, min_8bit_size)
        Optimizer2State.__init__(self, "adam", params, lr, betas, eps, weight_decay, *own, is_paged=is_paged, **taken)


class Adam8bit(Optimizer2State):
    """Adam with block-wise 8-bit moments. 2 bytes of state a parameter."""

    __init__ = fixed(Adam, shown=["optim_bits"], optim_bits=8)


class Adam32bit(Optimizer2State):
    """Adam with moments in fp32. 8 bytes of state a parameter."""

    __init__ = fixed(Adam, shown=["optim_bits"], optim_bits=32)


class PagedAdam(Optimizer2State):
    """Adam whose state may leave the GPU."""

    __init__ = fixed(Adam, shown=["is_paged"], is_paged=True)


class PagedAdam8bit(Optimizer2State):
    """Adam with block-wise 8-bit moments that may leave the GPU."""

    __init__ = fixed(Adam, shown=["optim_bits", "is_paged"], optim_bits=8, is_paged=True)


class PagedAdam32bit(Optimizer2State):
    """Adam with moments in fp32 that may leave the GPU."""

    __init__ = fixed(Adam, shown=["optim_bits", "is_paged"], optim_bits=32, is_paged=True)
