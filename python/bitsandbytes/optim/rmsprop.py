"""RMSprop (Tieleman & Hinton 2012, lecture 6.5)."""

from typing import Any

from .._variants import fixed
from .optimizer import Optimizer1State


class RMSprop(Optimizer1State):
    """v = alpha * v + (1 - alpha) * g^2; p = p - lr * g / (sqrt(v) + eps). weight_decay * p is added to g."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """As torch.optim.RMSprop; the others as in Optimizer1State.

        Raises:
            NotImplementedError: alpha is 0, momentum is not, or centered is set.
        """
        if alpha == 0:
            raise NotImplementedError("RMSprop with alpha==0.0 is not supported!")
        if centered:
            raise NotImplementedError("Centered RMSprop is not supported!")
        taken: dict[str, Any] = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own = (optim_bits, args, min_8bit_size)
        Optimizer1State.__init__(self, "rmsprop", params, lr, (alpha, momentum), eps, weight_decay, *own, **taken)
        if momentum != 0:
            raise NotImplementedError("RMSprop with momentum is not supported!")


class RMSprop8bit(Optimizer1State):
    """RMSprop with a block-wise 8-bit moment. 1 byte of state a parameter."""

    __init__ = fixed(RMSprop, optim_bits=8)


class RMSprop32bit(Optimizer1State):
    """RMSprop with its moment in fp32. 4 bytes of state a parameter."""

    __init__ = fixed(RMSprop, optim_bits=32)
