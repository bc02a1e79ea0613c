"""Adagrad (Duchi et al. 2011, JMLR 12)."""

from typing import Any

from .._variants import fixed
from .optimizer import Optimizer1State


class Adagrad(Optimizer1State):
    """v = v + g^2; p = p - lr * g / (sqrt(v) + eps). weight_decay * p is added to the gradient."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """As torch.optim.Adagrad; the others as in Optimizer1State.

        Raises:
            ValueError: lr_decay or initial_accumulator_value is not 0.
        """
        if initial_accumulator_value != 0:
            raise ValueError("Initial accumulator value != 0.0 not supported!")
        if lr_decay != 0:
            raise ValueError("Lr Decay != 0.0 not supported!")
        taken: dict[str, Any] = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own = (optim_bits, args, min_8bit_size)
        Optimizer1State.__init__(self, "adagrad", params, lr, (0.0, 0.0), eps, weight_decay, *own, **taken)


class Adagrad8bit(Optimizer1State):
    """Adagrad with a block-wise 8-bit sum of squares. 1 byte of state a parameter."""

    __init__ = fixed(Adagrad, defaults={"optim_bits": 8}, shown=["optim_bits"], optim_bits=8)


class Adagrad32bit(Optimizer1State):
    """Adagrad with its sum of squares in fp32. 4 bytes of state a parameter."""

    __init__ = fixed(Adagrad, shown=["optim_bits"], optim_bits=32)
