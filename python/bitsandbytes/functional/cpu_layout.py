"""The layout that the released package packs 4-bit weights into on CPUs with AVX512-BF16, after the first forward.

Here weights stay as stored: nothing packs them so, and only dequantize_4bit reads what was packed elsewhere.

Rows are taken in groups of 32. Of each group, byte (k / 2, row, k % 2) holds the code of row `row` in its low and of
row `row + 16` in its high nibble. absmax becomes bf16, transposed to [K / blocksize, N].
"""

import copy

import torch
from torch import Tensor

from .blockwise import scales
from .quant_state import QuantState

_BLOCK_N = 32


def _shape(op: str, state: QuantState, block_n: int) -> tuple[int, int, int]:
    """N, K and the blocksize of a weight that the layout can hold."""
    if block_n != _BLOCK_N:
        raise ValueError(f"{op}: block_n is {block_n}, expected {_BLOCK_N}")
    shape, blocksize = tuple(state.shape or ()), state.blocksize or 64
    if len(shape) != 2 or shape[0] % block_n or shape[1] % blocksize:
        expected = f"[N, K] with N a multiple of {block_n} and K one of the blocksize {blocksize}"
        raise ValueError(f"{op}: shape of quant_state is {list(shape)}, expected {expected}")
    return shape[0], shape[1], blocksize


def _convert_weight_packed_for_cpu(
    qweight: Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[Tensor, QuantState]:
    """Packed codes in the layout above, uint8 [N, K / 2], and a state that says so; the arguments stay as they are."""
    n, k, blocksize = _shape("_convert_weight_packed_for_cpu", quant_state, block_n)
    stored = qweight.contiguous().view(-1).view(torch.uint8)
    codes = torch.stack((stored >> 4, stored & 15), dim=-1)
    low, high = codes.view(n // block_n, 2, block_n // 2, k // 2, 2).unbind(1)
    packed = (high << 4 | low).transpose(1, 2).reshape(n, k // 2)
    state = copy.copy(quant_state)
    state.__dict__.update(
        original_absmax=quant_state.absmax,
        original_dtype=quant_state.dtype,
        original_nested=quant_state.nested,
        original_storage_type=qweight.dtype,
    )
    state.packing_format_for_cpu = True
    state.absmax = scales(quant_state).view(n, k // blocksize).t().contiguous().bfloat16()
    state.dtype = torch.bfloat16
    state.nested = False
    return packed, state


def _convert_weight_packed_for_cpu_inverse(
    packed_weight: Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[Tensor, QuantState]:
    """The inverse, exact for what the function above packed. The released package keeps absmax in bf16 only."""
    n, k, _ = _shape("_convert_weight_packed_for_cpu_inverse", quant_state, block_n)
    grouped = packed_weight.view(n // block_n, k // 2, block_n // 2, 2).transpose(1, 2)
    codes = torch.stack((grouped & 15, grouped >> 4), dim=1)
    stored = codes[..., 0] << 4 | codes[..., 1]
    state = copy.copy(quant_state)
    known = state.__dict__
    qweight = stored.reshape(-1).view(known.get("original_storage_type", torch.uint8)).view(-1, 1)
    state.absmax = known.get("original_absmax", quant_state.absmax.t().float().flatten())
    state.dtype = known.get("original_dtype", quant_state.dtype)
    state.nested = "original_absmax" in known and known["original_nested"]
    for name in [name for name in known if name.startswith("original_")]:
        delattr(state, name)
    state.packing_format_for_cpu = False
    return qweight, state
