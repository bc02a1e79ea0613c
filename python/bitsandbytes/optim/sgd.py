"""Stochastic gradient descent with momentum (Sutskever et al. 2013), as torch.optim.SGD has it."""

from typing import Any

from .._variants import fixed
from .optimizer import Optimizer1State


class SGD(Optimizer1State):
    """m = momentum * m + (1 - dampening) * g, at first m = g; p = p - lr * m, or lr * (g + momentum * m) if nesterov.

    weight_decay * p is added to the gradient.
    """

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
        *,
        percentile_clipping: int = 100,
        block_wise: bool = True,
    ) -> None:
        """As torch.optim.SGD; the others as in Optimizer1State.

        Raises:
            NotImplementedError: momentum is 0.
        """
        if momentum == 0:
            raise NotImplementedError("SGD without momentum is not supported!")
        taken: dict[str, Any] = {"percentile_clipping": percentile_clipping, "block_wise": block_wise}
        own = (optim_bits, args, min_8bit_size)
        Optimizer1State.__init__(self, "momentum", params, lr, (momentum, dampening), 0.0, weight_decay, *own, **taken)
        self.options = {"nesterov": nesterov}


class SGD8bit(Optimizer1State):
    """SGD with block-wise 8-bit momentum. 1 byte of state a parameter."""

    __init__ = fixed(SGD, optim_bits=8)


class SGD32bit(Optimizer1State):
    """SGD with momentum in fp32. 4 bytes of state a parameter."""

    __init__ = fixed(SGD, optim_bits=32)
