"""Lion (Chen et al. 2023, arXiv 2302.06675)."""

from typing import Any

from .._variants import fixed
from .optimizer import Optimizer1State


class Lion(Optimizer1State):
    """u = sign(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g. Weight decay is decoupled."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """The arguments are those of Optimizer1State."""
        taken: dict[str, Any] = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own = (optim_bits, args, min_8bit_size)
        Optimizer1State.__init__(self, "lion", params, lr, betas, 0.0, weight_decay, *own, is_paged=is_paged, **taken)


class Lion8bit(Optimizer1State):
    """Lion with block-wise 8-bit momentum. 1 byte of state a parameter."""

    __init__ = fixed(Lion, optim_bits=8)


class Lion32bit(Optimizer1State):
    """Lion with momentum in fp32. 4 bytes of state a parameter."""

    __init__ = fixed(Lion, optim_bits=32)


class PagedLion(Optimizer1State):
    """Lion whose state may leave the GPU."""

    __init__ = fixed(Lion, is_paged=True)


class PagedLion8bit(Optimizer1State):
    """Lion with block-wise 8-bit momentum that may leave the GPU."""

    __init__ = fixed(Lion, optim_bits=8, is_paged=True)


class PagedLion32bit(Optimizer1State):
    """Lion with momentum in fp32 that may leave the GPU."""

    __init__ = fixed(Lion, optim_bits=32, is_paged=True)
