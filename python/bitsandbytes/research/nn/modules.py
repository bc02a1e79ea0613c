"""Linear layers whose products are rounded as 8-bit floating point would."""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ... import functional as F
from ..autograd._functions import block_size, matmul_fp8_global, matmul_fp8_mixed


class _LinearFP8(torch.nn.Linear):
    """y = x @ W^T + bias. x and W are rounded to floats of 4 exponent and 3 fraction bits, gradients to 5 and 2."""

    product: ClassVar[Callable[..., Tensor]]

    def __init__(self, input_features: int, output_features: int, bias: bool = True) -> None:
        super().__init__(input_features, output_features, bias)
        self.fw_code: Tensor | None = None
        self.bw_code: Tensor | None = None
        self.bsz, self.bsz2 = block_size(input_features), block_size(output_features)

    def forward(self, x: Tensor) -> Tensor:
        if self.fw_code is None or self.bw_code is None:
            self.fw_code = F.create_fp8_map(True, 4, 3, 8).to(x.device)
            self.bw_code = F.create_fp8_map(True, 5, 2, 8).to(x.device)
        y = type(self).product(x, self.weight.t(), self.fw_code, self.bw_code, self.bsz, self.bsz2)
        return y if self.bias is None else y + self.bias


class LinearFP8Mixed(_LinearFP8):
    """With a scale for each block of x and its gradient: matmul_fp8_mixed."""

    product = staticmethod(matmul_fp8_mixed)


class LinearFP8Global(_LinearFP8):
    """With one scale for each tensor: matmul_fp8_global."""

    product = staticmethod(matmul_fp8_global)
