"""Every operator in plain torch, for any device that has no kernel of its own. Written for exact bytes, not for speed.

The CPU and CUDA never come here: they have kernels of their own, or ones that say why there are none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _checks as check
from ..._ops import (
    check_code,
    check_dequantize_4bit,
    check_dequantize_blockwise,
    check_gemm_4bit,
    check_gemv_4bit,
    read_linear_4bit_layout,
    storage_rows,
)
from ..utils import CODES_BY_THRESHOLD, THRESHOLDS, _get_4bit_code, default_kernel, nearest_codes

_ops = torch.ops.bitsandbytes


def _normalize(A: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """t = x / absmax as rows of one block, the last one padded with zeros, and absmax; both in fp32."""
    n = A.numel()
    blocks = check.blocks(n, blocksize)
    x = A.reshape(-1).float()
    x = torch.nn.functional.pad(x, (0, blocks * blocksize - n)).view(blocks, blocksize)
    absmax = x.abs().amax(dim=1)
    # The floor makes t = 0 of a block of zeros. Infinity gives t = 0 and NaN, NaN gives NaN.
    return x * (1.0 / absmax.clamp(min=1e-38))[:, None], absmax


@default_kernel("bitsandbytes::quantize_4bit")
def _(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    op = "quantize_4bit"
    check.dtype(op, "A", A, *check.FLOATS)
    check.one_of(op, "blocksize", blocksize, check.BLOCKSIZES)
    check.one_of(op, "quant_type", quant_type, check.QUANT_TYPES)
    rows = storage_rows(A.numel(), quant_storage)
    t, absmax = _normalize(A, blocksize)
    below = torch.bucketize(t, t.new_tensor(THRESHOLDS[quant_type]))  # NaN comes last
    codes = torch.tensor(CODES_BY_THRESHOLD[quant_type], dtype=torch.uint8, device=A.device)[below]
    pairs = codes.view(-1)[: A.numel() + A.numel() % 2].view(-1, 2)
    packed = pairs[:, 0] << 4 | pairs[:, 1]
    packed = torch.nn.functional.pad(packed, (0, rows * quant_storage.itemsize - len(packed)))
    return packed.view(quant_storage).view(rows, 1), absmax


def _dequantize(values: Tensor, codes: Tensor, absmax: Tensor, blocksize: int, n: int) -> Tensor:
    """values[code] * absmax of its block for the first n codes, in fp32 and flat."""
    blocksize = min(blocksize, max(n, 1))
    blocks = check.blocks(n, blocksize)
    x = torch.nn.functional.pad(values[codes[:n].int()], (0, blocks * blocksize - n)).view(blocks, blocksize)
    return (x * absmax.reshape(-1, 1)).view(-1)[:n]


def _unpack(packed: Tensor) -> Tensor:
    """4-bit codes in order, high nibble first."""
    packed = packed.contiguous().view(-1).view(torch.uint8)
    return torch.stack((packed >> 4, packed & 15), dim=1).view(-1)


@default_kernel("bitsandbytes::dequantize_4bit")
def _dequantize_4bit(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    check_dequantize_4bit("dequantize_4bit", A, absmax, blocksize, quant_type, shape, dtype)
    n = check.numel("dequantize_4bit", "shape", shape)
    values = _get_4bit_code(quant_type, A.device)
    return _dequantize(values, _unpack(A), absmax, blocksize, n).to(dtype).view(tuple(shape))


@default_kernel("bitsandbytes::dequantize_4bit.out")
def _(
    A: Tensor, absmax: Tensor, blocksize: int, quant_type: str, shape: Sequence[int], dtype: torch.dtype, out: Tensor
) -> None:
    check.out_like("dequantize_4bit", out, shape, dtype, A.device)
    out.copy_(_ops.dequantize_4bit.default(A, absmax, blocksize, quant_type, shape, dtype))


@default_kernel("bitsandbytes::quantize_blockwise")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    op = "quantize_blockwise"
    check.dtype(op, "A", A, *check.FLOATS)
    check.blockwise_blocksize(op, blocksize, A.device)
    check_code(op, code)
    check.same_device(op, A.device, code=code)
    code = code.reshape(-1)
    if not bool((code[1:] >= code[:-1]).all()):
        raise ValueError(f"{op}: code is not in ascending order, expected a sorted map without NaN")
    t, absmax = _normalize(A, min(blocksize, max(A.numel(), 1)))  # a block longer than A is A
    return nearest_codes(t, code).view(-1)[: A.numel()].view(A.shape), absmax


@default_kernel("bitsandbytes::dequantize_blockwise")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype) -> Tensor:
    check_dequantize_blockwise(A, absmax, code, blocksize, dtype)
    return _dequantize(code.reshape(-1), A.reshape(-1), absmax, blocksize, A.numel()).to(dtype).view(A.shape)


@default_kernel("bitsandbytes::dequantize_blockwise.out")
def _(A: Tensor, absmax: Tensor, code: Tensor, blocksize: int, dtype: torch.dtype, out: Tensor) -> None:
    check.out_like("dequantize_blockwise", out, A.shape, dtype, A.device)
    out.copy_(_ops.dequantize_blockwise.default(A, absmax, code, blocksize, dtype))


@default_kernel("bitsandbytes::gemv_4bit")
def _(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int) -> Tensor:
    check_gemv_4bit(A, B, shapeB, absmax, code, blocksize)
    weight = _dequantize(code.reshape(-1), _unpack(B), absmax, blocksize, shapeB[0] * shapeB[1])
    return torch.nn.functional.linear(A, weight.to(A.dtype).view(*shapeB))


@default_kernel("bitsandbytes::gemv_4bit.out")
def _(A: Tensor, B: Tensor, shapeB: Sequence[int], absmax: Tensor, code: Tensor, blocksize: int, out: Tensor) -> None:
    check_gemv_4bit(A, B, shapeB, absmax, code, blocksize)
    check.out_like("gemv_4bit", out, (*A.shape[:-1], shapeB[0]), A.dtype, A.device)
    out.copy_(_ops.gemv_4bit.default(A, B, shapeB, absmax, code, blocksize))


@default_kernel("bitsandbytes::gemm_4bit")
def _(
    A: Tensor,
    B: Tensor,
    shapeB: Sequence[int],
    absmax: Tensor,
    blocksize: int,
    quant_type: str,
    bias: Tensor | None = None,
    absmax_8bit: Tensor | None = None,
    absmax_code: Tensor | None = None,
    absmax_offset: Tensor | None = None,
) -> Tensor:
    check_gemm_4bit(A, B, shapeB, absmax, blocksize, quant_type, bias, absmax_8bit, absmax_code, absmax_offset)
    if absmax_8bit is not None and absmax_code is not None and absmax_offset is not None:
        # Through the dispatcher, so that a device with kernels for some operators uses them here.
        scales = _ops.dequantize_blockwise.default(absmax_8bit, absmax, absmax_code, 256, torch.float32)
        absmax = scales + absmax_offset
    weight = _ops.dequantize_4bit.default(B, absmax, blocksize, quant_type, shapeB, A.dtype)
    return torch.nn.functional.linear(A, weight, None if bias is None else bias.to(A.dtype))


def linear_4bit(A: Tensor, B: Tensor, absmax: Tensor, layout: int, *rest: Tensor | None) -> Tensor:
    shape, blocksize, quant_type = read_linear_4bit_layout(layout)
    # Through the dispatcher: backends of other projects have a gemm_4bit.
    return _ops.gemm_4bit.default(A, B, shape, absmax, blocksize, quant_type, *rest)


for _name in ("linear_4bit", "linear_4bit.nested", "linear_4bit.forward", "linear_4bit.nested_forward"):
    default_kernel(f"bitsandbytes::{_name}")(linear_4bit)
