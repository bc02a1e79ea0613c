"""8-bit block-wise quantization (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861)."""

import torch
from torch import Tensor

from .. import _checks as check
from .codebooks import create_dynamic_map, name2qmap
from .quant_state import QuantState, statistic

_ops = torch.ops.bitsandbytes


def _dynamic_map(device: torch.device) -> Tensor:
    code = name2qmap.get("dynamic")
    if code is None:
        with torch.device("cpu"):  # also within a `with torch.device("meta")` of somebody else
            code = create_dynamic_map()
        if type(code) is Tensor:  # no fake one of a graph that is being traced
            name2qmap["dynamic"] = code
    return code.to(device, non_blocking=True)  # a constant need not be waited for


def fill(op: str, name: str, given: Tensor | None, result: Tensor) -> Tensor:
    """`result`, in the tensor that the caller provided for it, if any."""
    if given is None:
        return result
    check.tensor(op, name, given)
    check.dtype(op, name, given, result.dtype)
    if given.shape != result.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(given.shape)}, expected {tuple(result.shape)}")
    return given.copy_(result)


def scales(state: QuantState) -> Tensor:
    """The fp32 scale of each block, decoded if they are quantized themselves."""
    absmax = state.absmax
    check.tensor("QuantState", "absmax", absmax)
    if not state.nested:
        check.dtype("QuantState", "absmax", absmax, torch.float32)
        return absmax
    if state.state2 is None or state.offset is None:
        lacking = "state2" if state.state2 is None else "offset"
        raise ValueError(f"QuantState: {lacking} is None, expected both state2 and offset in a nested state")
    return dequantize_blockwise(absmax, state.state2) + state.offset


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantizes a tensor in blocks to 8 bits: absmax = max |x| of the block, code = the nearest one to x / absmax.

    Args:
        A: any shape; fp32, fp16 or bf16.
        code: 256 ascending values, taken as fp32; the signed dynamic map by default.
        absmax, out: optional tensors to receive the scales (fp32, one per block) and the codes (uint8, shape of A).
        blocksize: elements per scale, any number of 1 or more; on CUDA devices a power of two from 32 to 4096.
        nested: quantize the scales too.

    Returns:
        The codes, uint8 in the shape of A, and the state that dequantize_blockwise needs.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "quantize_blockwise"
    check.tensor(op, "A", A)
    check.dtype(op, "A", A, *check.FLOATS)
    check.blockwise_blocksize(op, blocksize, A.device)
    code = _dynamic_map(A.device) if code is None else _as_code(op, code, A.device)
    codes, scale = _ops.quantize_blockwise.default(A, code, blocksize)
    codes = fill(op, "out", out, codes)
    scale = fill(op, "absmax", absmax, scale)
    state = QuantState(scale, code=code, blocksize=blocksize, dtype=A.dtype)
    if nested:
        nest(state, blocksize)
    return codes, state


def nest(state: QuantState, blocksize: int) -> None:
    """Quantizes the scales of a state around their mean."""
    absmax = state.absmax
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    state.absmax, state.state2 = quantize_blockwise(absmax - offset, blocksize=blocksize)
    state.offset = offset
    state.nested = True


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """x = code[A] * absmax of its block, rounded once to the dtype of the state.

    Args:
        A: codes, uint8, any shape.
        quant_state: from quantize_blockwise; without it the next ones count:
        absmax, code, blocksize: scales and 256 values, taken as fp32 (the signed dynamic map by default), elements per
            scale; the result is fp32.
        out: optional tensor to receive the result.
        nested: accepted for compatibility; the state knows.

    Returns:
        A tensor in the shape of A.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    op = "dequantize_blockwise"
    check.tensor(op, "A", A)
    if quant_state is None:
        if absmax is None:
            raise ValueError(f"{op}: quant_state and absmax are both None, expected one of them")
        check.tensor(op, "absmax", absmax)
        code = _dynamic_map(A.device) if code is None else _as_code(op, code, A.device)
        quant_state = QuantState(absmax, code=code, blocksize=blocksize, dtype=torch.float32)
    check.state(op, quant_state)
    if quant_state.code is None:
        raise ValueError(f"{op}: code of quant_state is None, expected 256 values")
    dtype = quant_state.dtype if out is None else out.dtype
    args = (A, scales(quant_state), quant_state.code.to(A.device), quant_state.blocksize, dtype)
    if out is None:
        return _ops.dequantize_blockwise.default(*args)
    check.tensor(op, "out", out)
    check.out_like(op, out, A.shape, quant_state.dtype or out.dtype, A.device)
    if not out.is_contiguous():
        return out.copy_(_ops.dequantize_blockwise.default(*args))
    _ops.dequantize_blockwise.out(*args, out=out)
    return out


def _as_code(op: str, code: Tensor, device: torch.device) -> Tensor:
    check.tensor(op, "code", code)
    code = statistic(code)
    check.dtype(op, "code", code, torch.float32)
    if code.numel() != check.CODES:
        raise ValueError(f"{op}: code has {code.numel()} entries, expected {check.CODES}")
    return code.to(device)
