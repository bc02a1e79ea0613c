"""The layout that the released package packs 4-bit weights into on CPUs with AVX512-BF16, after the first forward.

Here weights stay as stored: nothing packs them so. What was packed elsewhere is brought back for each use, which is
right but slow: _convert_weight_packed_for_cpu_inverse does it once and for all.

Rows are taken in groups of 32. Of each group, byte (k / 2, row, k % 2) holds the code of row `row` in its low and of
row `row + 16` in its high nibble. absmax becomes bf16, transposed to [K / blocksize, N].
"""

import copy

import torch
from torch import Tensor

from .. import _checks as check
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
    if quant_state.packing_format_for_cpu:
        raise ValueError(
            "_convert_weight_packed_for_cpu: quant_state is of a weight in this layout, expected one as stored"
        )
    quant_state.check_codes("_convert_weight_packed_for_cpu", "qweight", qweight)
    as_bytes = qweight.contiguous().view(-1).view(torch.uint8)
    codes = torch.stack((as_bytes >> 4, as_bytes & 15), dim=-1)
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
    op = "_convert_weight_packed_for_cpu_inverse"
    n, k, blocksize = _shape(op, quant_state, block_n)
    check.dtype(op, "packed_weight", packed_weight, torch.uint8)
    check.exactly(op, "packed_weight", packed_weight.numel(), n * k // 2)
    check.exactly(op, "absmax of quant_state", quant_state.absmax.numel(), n * k // blocksize)
    if packed_weight.dim() == 2 and not packed_weight.is_contiguous():
        packed_weight = packed_weight.t()  # as products take it; the layout has an order
    packed_weight = packed_weight.contiguous()
    grouped = packed_weight.view(n // block_n, k // 2, block_n // 2, 2).transpose(1, 2)
    codes = torch.stack((grouped & 15, grouped >> 4), dim=1)
    as_bytes = codes[..., 0] << 4 | codes[..., 1]
    state = copy.copy(quant_state)
    known = state.__dict__
    qweight = as_bytes.reshape(-1).view(known.get("original_storage_type", torch.uint8)).view(-1, 1)
    state.packing_format_for_cpu = False  # before absmax, which is fp32 then
    absmax = known.get("original_absmax")
    state.absmax = quant_state.absmax.t().flatten() if absmax is None else absmax.to(packed_weight.device)
    state.dtype = known.get("original_dtype", quant_state.dtype)
    state.nested = "original_absmax" in known and known["original_nested"]
    for name in [name for name in known if name.startswith("original_")]:
        delattr(state, name)
    return qweight, state


def stored(packed: Tensor, state: QuantState) -> tuple[Tensor, QuantState]:
    """A weight and its state in the layout that operators and checkpoints have."""
    return _convert_weight_packed_for_cpu_inverse(packed, state) if state.packing_format_for_cpu else (packed, state)
