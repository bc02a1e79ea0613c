"""SwitchBack (Wortsman et al. 2023, arXiv 2304.13013): training in int8 with the gradient of the weight in floats."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._ops_int8 import as_rows

_ops = torch.ops.bitsandbytes


def _quantize_weight(weight: Tensor, by_vector: bool) -> tuple[Tensor, Tensor]:
    """Codes [N, K] and N scales: of each row, or the same one for all."""
    if by_vector:
        return _ops.int8_vectorwise_quant.default(weight)[:2]
    codes, scale, _ = _ops.int8_vectorwise_quant.default(weight.reshape(1, -1))
    return codes.view(weight.shape), scale.expand(weight.shape[0])


class _SwitchBack(torch.autograd.Function):
    """y = x @ W^T + bias and grad_x = grad @ W in int8, grad_W = grad^T @ x in the dtype of x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, by_vector: bool, mem_efficient: bool
    ) -> Tensor:
        codes, scale = _quantize_weight(weight.detach(), by_vector)
        ctx.by_vector, ctx.mem_efficient = by_vector, mem_efficient
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        if mem_efficient:  # 1 byte instead of 2 or 4 for each activation that is kept
            x_codes, x_scale, _ = _ops.int8_vectorwise_quant.default(x)
            ctx.save_for_backward(weight, x_codes, x_scale)
            return _ops.int8_scaled_mm.default(x_codes, codes, x_scale, scale, bias, x.dtype)
        ctx.save_for_backward(weight, x)
        return _ops.int8_linear.default(x, codes, scale, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        weight, x, *x_scale = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            codes, scale = _quantize_weight(weight.t().contiguous(), ctx.by_vector)
            grad_x = _ops.int8_linear.default(grad, codes, scale).to(ctx.x_dtype)
        if ctx.needs_input_grad[1]:
            if x_scale:
                x = _ops.int8_vectorwise_dequant.default(x, *x_scale).to(ctx.x_dtype)
            grad_weight = (as_rows(grad).t() @ as_rows(x)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = as_rows(grad).sum(0, dtype=ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None, None


class SwitchBackLinear(torch.nn.Linear):
    """A linear layer whose product and gradient of x are computed in int8, and whose gradient of the weight is not.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear.
        vector_wise_quantization: one scale for each row of the weight instead of one for all.
        mem_efficient: keep int8 codes of x for the backward pass instead of x.
    """

    W_int8: Tensor
    state_W: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        vector_wise_quantization: bool = False,
        mem_efficient: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.vector_wise_quantization = vector_wise_quantization
        self.mem_efficient = mem_efficient

    def prepare_for_eval(self) -> None:
        """Replaces the weight by its codes W_int8 and scales state_W, for good: the layer then no longer learns it."""
        codes, scale = _quantize_weight(self.weight.detach(), self.vector_wise_quantization)
        del self.weight
        self.register_buffer("W_int8", codes)
        self.register_buffer("state_W", scale.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        if "W_int8" in self._buffers:
            return _ops.int8_linear.default(x, self.W_int8, self.state_W, self.bias)
        return _SwitchBack.apply(x, self.weight, self.bias, self.vector_wise_quantization, self.mem_efficient)


SwitchBackLinearGlobal = partial(SwitchBackLinear, vector_wise_quantization=False)
SwitchBackLinearVectorwise = partial(SwitchBackLinear, vector_wise_quantization=True)


class _Standard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (grad,) = grads
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            torch.matmul(grad, weight) if needs_x else None,
            as_rows(grad).t() @ as_rows(x) if needs_weight else None,
            as_rows(grad).sum(0, dtype=bias.dtype) if needs_bias else None,
        )


class StandardLinear(torch.nn.Linear):
    """torch.nn.Linear with its gradients written out: what SwitchBack is compared with."""

    def forward(self, x: Tensor) -> Tensor:
        return _Standard.apply(x, self.weight, self.bias)
