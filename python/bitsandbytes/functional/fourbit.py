"""4-bit block-wise quantization: NF4 and FP4 (QLoRA, arXiv 2305.14314)."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .. import _checks as check
from .._variants import fixed_function
from .blockwise import fill, nest, scales
from .codebooks import get_4bit_type
from .cpu_layout import stored
from .quant_state import QuantState

_ops = torch.ops.bitsandbytes
_dequantize_4bit = _ops.dequantize_4bit.default
_gemm_4bit = _ops.gemm_4bit.default
_linear_4bit = _ops.linear_4bit.forward
_linear_4bit_nested = _ops.linear_4bit.nested_forward
_compiler = torch.compiler
_in_dynamo = torch.compiler.is_dynamo_compiling
_functorch_active = torch._C._are_functorch_transforms_active
_plain_tensors = torch._C.DisableTorchFunctionSubclass

NESTED_BLOCKSIZE = 256


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor in blocks to 4 bits: absmax = max |x| of the block, code = that of x / absmax.

    Args:
        A: any shape, read as one flat row; fp32, fp16 or bf16.
        absmax, out: optional tensors to receive the scales (fp32, one per block) and the packed codes.
        blocksize: elements per scale, a power of two from 32 to 4096; 64 by default.
        compress_statistics: quantize the scales to 8 bits too ("double quantization"), in blocks of 256.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that the packed bytes are stored as.

    Returns:
        The packed codes, two per byte with the first in the high nibble, shape [ceil(n / 2) / itemsize, 1], and the
        state that dequantize_4bit needs.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "quantize_4bit"
    blocksize = 64 if blocksize is None else blocksize
    check.tensor(op, "A", A)
    check.dtype(op, "A", A, *check.FLOATS)
    check.one_of(op, "blocksize", blocksize, check.BLOCKSIZES)
    check.one_of(op, "quant_type", quant_type, check.QUANT_TYPES)
    check.one_of(op, "quant_storage", quant_storage, check.STORAGES)
    packed, scale = _ops.quantize_4bit.default(A, blocksize, quant_type, quant_storage)
    packed = fill(op, "out", out, packed)
    scale = fill(op, "absmax", absmax, scale)
    code = get_4bit_type(quant_type, A.device)
    state = QuantState(scale, A.shape, code, blocksize, quant_type, A.dtype)
    if compress_statistics:
        nest(state, NESTED_BLOCKSIZE)
    return packed, state


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """x = value[code] * absmax of its block, rounded once to the dtype of the state.

    Args:
        A: packed codes from quantize_4bit; if they are transposed, [1, bytes], so is the result.
        quant_state: from quantize_4bit; without it absmax and out are needed and blocksize and quant_type count.
        absmax: scales, taken as fp32, one per block.
        out: optional tensor to receive the result, in the shape of the tensor that was quantized.
        blocksize: elements per scale; 64 by default.
        quant_type: "fp4" or "nf4".

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "dequantize_4bit"
    check.tensor(op, "A", A)
    if out is not None:
        check.tensor(op, "out", out)
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError(f"{op}: quant_state is None, expected absmax and out to be given then")
        check.tensor(op, "absmax", absmax)
        blocksize = 64 if blocksize is None else blocksize
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    check.state(op, quant_state)
    check.one_of(op, "quant_type", quant_state.quant_type, check.QUANT_TYPES)
    A, quant_state = stored(A, quant_state)
    if out is not None:
        check.out_like(op, out, quant_state.shape or (), quant_state.dtype or out.dtype, A.device)
    args = (A, scales(quant_state), quant_state.blocksize, quant_state.quant_type, quant_state.shape, quant_state.dtype)
    if out is not None and out.is_contiguous():
        _ops.dequantize_4bit.out(*args, out=out)
        result = out
    else:
        result = _ops.dequantize_4bit.default(*args)
        result = result if out is None else out.copy_(result)
    return result.t() if A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1 and result.dim() == 2 else result


quantize_fp4 = fixed_function(quantize_4bit, "quantize_fp4", "quantize_4bit to FP4.", quant_type="fp4")
quantize_nf4 = fixed_function(quantize_4bit, "quantize_nf4", "quantize_4bit to NF4.", quant_type="nf4")
dequantize_fp4 = fixed_function(dequantize_4bit, "dequantize_fp4", "dequantize_4bit from FP4.", quant_type="fp4")
dequantize_nf4 = fixed_function(dequantize_4bit, "dequantize_nf4", "dequantize_4bit from NF4.", quant_type="nf4")


def gemm_4bit(
    A: Tensor, B: Tensor, state: QuantState, bias: Tensor | None = None, differentiable: bool = False
) -> Tensor:
    """A [..., K] @ W^T + bias for a packed weight W of state.shape = [N, K]: one operator call.

    It has derivatives in forward mode and under torch.func; those of requires_grad if it is told so.
    """
    # A graph of torch.compile shows the public operator, which has derivatives too. This is derivatives_wanted().
    public = (
        differentiable
        or _in_dynamo()
        or _compiler._is_compiling_flag
        or _functorch_active()
        or forward_ad._current_level >= 0
    )
    layout = None if public else state.linear_layout
    with _plain_tensors():  # B may be a Params4bit, which needs no detour through its __torch_function__ here
        if layout is None and state.packing_format_for_cpu:
            B, state = stored(B, state)
        second = state.state2
        if second is None or not state.nested:
            if layout is not None:
                return _linear_4bit(A, B, state.absmax, layout, bias)
            return _gemm_4bit(A, B, state.shape, state.absmax, state.blocksize, state.quant_type, bias)
        if second.blocksize != NESTED_BLOCKSIZE:  # which the operators take for granted
            return _gemm_4bit(A, B, state.shape, scales(state), state.blocksize, state.quant_type, bias)
        nested = (state.absmax, second.code, state.offset)
        if layout is not None:
            return _linear_4bit_nested(A, B, second.absmax, layout, bias, *nested)
        return _gemm_4bit(A, B, state.shape, second.absmax, state.blocksize, state.quant_type, bias, *nested)


def dequantized(B: Tensor, state: QuantState, dtype: torch.dtype) -> Tensor:
    """The weight that gemm_4bit multiplies with, in a dtype."""
    with _plain_tensors():
        B, state = stored(B, state)
        return _dequantize_4bit(B, scales(state), state.blocksize, state.quant_type, state.shape, dtype)


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """A [..., K] @ W^T for a packed weight W of state.shape = [N, K].

    Args:
        A: fp32, fp16 or bf16, and so is the result, [..., N].
        B: packed codes from quantize_4bit.
        out: optional tensor to receive the result.
        transposed_A, transposed_B: accepted for compatibility; the state knows.
        state: from quantize_4bit; required.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "gemv_4bit"
    if state is None:
        raise ValueError(f"{op}: state is None, expected the QuantState from quantize_4bit")
    check.tensor(op, "A", A)
    check.tensor(op, "B", B)
    check.state(op, state)
    return fill(op, "out", out, gemm_4bit(A, B, state, differentiable=A.requires_grad))
