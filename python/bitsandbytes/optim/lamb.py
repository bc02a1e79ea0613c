"""LAMB (You et al. 2020, arXiv 1904.00962)."""

from typing import Any

from .._variants import fixed, no_amsgrad
from .optimizer import Optimizer2State


class LAMB(Optimizer2State):
    """Adam whose update becomes no longer than max_unorm times the norm of its tensor.

    bias_correction=False leaves the divisions by 1 - beta^t out; adam_w_mode=False adds weight_decay * p to the
    gradient instead of decaying p.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """betas, eps, weight_decay as in Adam; the others as in Optimizer2State.

        Raises:
            ValueError: amsgrad is set.
        """
        no_amsgrad(self, amsgrad)
        taken: dict[str, Any] = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own = (optim_bits, args, min_8bit_size, max_unorm)
        Optimizer2State.__init__(self, "lamb", params, lr, betas, eps, weight_decay, *own, **taken)
        self.options = {"bias_correction": bias_correction, "coupled_decay": not adam_w_mode}


class LAMB8bit(Optimizer2State):
    """LAMB with block-wise 8-bit moments. 2 bytes of state a parameter."""

    __init__ = fixed(LAMB, optim_bits=8)


class LAMB32bit(Optimizer2State):
    """LAMB with moments in fp32. 8 bytes of state a parameter."""

    __init__ = fixed(LAMB, optim_bits=32)
