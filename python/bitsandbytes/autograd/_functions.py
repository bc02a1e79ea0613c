"""Products with quantized weights that gradients flow through (QLoRA, arXiv 2305.14314); the weight is frozen."""

from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from ..functional.blockwise import fill, scales
from ..functional.fourbit import gemm_4bit
from ..functional.quant_state import QuantState


class MatMul4Bit(torch.autograd.Function):
    """y = A @ W^T + bias with a 4-bit W. Gradients for A (grad @ W in the dtype of grad) and for bias."""

    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        out: Tensor | None = None,
        bias: Tensor | None = None,
        quant_state: QuantState | None = None,
    ) -> Tensor:
        if quant_state is None:
            raise ValueError("MatMul4Bit: quant_state is None, expected the QuantState from quantize_4bit")
        ctx.state = quant_state
        ctx.weight = B
        ctx.bias_dtype = None if bias is None else bias.dtype
        if out is not None:
            ctx.mark_dirty(out)
        return fill("matmul_4bit", "out", out, gemm_4bit(A, B, quant_state, bias))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        (grad,) = grads
        grad_A = grad_bias = None
        if ctx.needs_input_grad[0]:
            state = ctx.state
            with torch._C.DisableTorchFunctionSubclass():
                weight = torch.ops.bitsandbytes.dequantize_4bit.default(
                    ctx.weight, scales(state), state.blocksize, state.quant_type, state.shape, grad.dtype
                )
            grad_A = torch.matmul(grad, weight)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.bias_dtype)
        return grad_A, None, None, grad_bias, None


def matmul_4bit(
    A: Tensor,
    B: Tensor,
    quant_state: QuantState,
    out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """y = A @ W^T + bias for a weight that quantize_4bit packed. The weight is read as stored and not changed.

    Args:
        A: [..., K]; fp32, fp16 or bf16. Products are summed in fp32, and y has the dtype of A.
        B: the packed weight, or its transpose (packed.t()).
        quant_state: of a weight of shape [N, K].
        out: optional tensor to receive y.
        bias: N values.

    Returns:
        [..., N]. Differentiable in A and bias.

    Raises:
        ValueError, TypeError, RuntimeError: a wrong argument, which the message names.
    """
    if quant_state is None:
        raise ValueError("matmul_4bit: quant_state is None, expected the QuantState from quantize_4bit")
    check.tensor("matmul_4bit", "A", A)
    check.tensor("matmul_4bit", "B", B)
    check.state("matmul_4bit", quant_state)
    if torch.is_grad_enabled() and (A.requires_grad or (bias is not None and bias.requires_grad)):
        return MatMul4Bit.apply(A, B, out, bias, quant_state)
    y = gemm_4bit(A, B, quant_state, bias)
    return y if out is None else fill("matmul_4bit", "out", out, y)
