"""Products whose operands are rounded to a map of 256 values, as 8-bit floating point would (Wortsman et al. 2023,
arXiv 2304.13013), and the one of SwitchBack in int8. The products themselves are of the dtype of the operands."""

from typing import Any

import torch
from torch import Tensor

from ... import _checks as check
from ... import functional as F
from ..._codes import nearest_codes
from ..._ops_int8 import as_rows
from ...autograd._functions import MatmulLtState, matmul
from ...functional.blockwise import fill


def block_size(features: int) -> int:
    """Elements that share a scale, for rows of so many features: the next power of two, from 64 to 4096."""
    size = 64
    while size < min(features, 4096):
        size *= 2
    return size


def _by_block(x: Tensor, code: Tensor, blocksize: int) -> Tensor:
    """x rounded to `code` with a scale for each block."""
    codes, state = F.quantize_blockwise(x, code=code, blocksize=blocksize)
    return F.dequantize_blockwise(codes, state)


def _whole(x: Tensor, code: Tensor) -> Tensor:
    """x rounded to `code` with one scale."""
    if x.numel() == 0:
        return x
    scale = x.abs().max().float()
    codes = nearest_codes(x.float() / scale.clamp(min=1e-38), code)
    return (code[codes.int()] * scale).to(x.dtype)


class _Fp8(torch.autograd.Function):
    """y = A @ B with A and B rounded to fw_code, and grad_A = grad @ B^T with grad rounded to bw_code.

    mixed: a scale for each block of A and grad, and grad_B = A^T @ grad as they are. Otherwise one scale for each
    tensor, and grad_B of the rounded ones.
    """

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor, fw_code: Tensor, bw_code: Tensor, bsz: int, bsz2: int, mixed: bool
    ) -> Tensor:
        ctx.save_for_backward(A, B, fw_code, bw_code)
        ctx.bsz2, ctx.mixed = bsz2, mixed
        rounded = _by_block(A, fw_code, bsz) if mixed else _whole(A, fw_code)
        return torch.matmul(rounded, _whole(B, fw_code))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        A, B, fw_code, bw_code = ctx.saved_tensors
        grad_A = grad_B = None
        rounded = _by_block(grad.contiguous(), bw_code, ctx.bsz2) if ctx.mixed else _whole(grad, bw_code)
        if ctx.needs_input_grad[0]:
            grad_A = torch.matmul(rounded, _whole(B, fw_code).t()).to(A.dtype)
        if ctx.needs_input_grad[1]:
            a, g = (A, grad) if ctx.mixed else (_whole(A, fw_code), rounded)
            grad_B = (as_rows(a).t() @ as_rows(g)).to(B.dtype)
        return grad_A, grad_B, None, None, None, None, None


def _matmul(
    op: str,
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    bsz: int,
    bsz2: int,
    out: Tensor | None,
    mixed: bool,
) -> Tensor:
    for name, value in (("A", A), ("B", B), ("fw_code", fw_code), ("bw_code", bw_code)):
        check.tensor(op, name, value)
    check.dtype(op, "A", A, *check.FLOATS)
    check.dtype(op, "B", B, A.dtype)
    if B.dim() != 2 or A.dim() == 0 or A.shape[-1] != B.shape[0]:
        raise ValueError(f"{op}: B has shape {tuple(B.shape)}, expected [K, N] for A of {tuple(A.shape)}")
    codes = [code.to(A.device, torch.float32) for code in (fw_code, bw_code)]
    for name, code in zip(("fw_code", "bw_code"), codes, strict=True):
        check.equal(op, name, "size", code.numel(), check.CODES)
    sizes = [block_size(n) if size == -1 else size for size, n in ((bsz, B.shape[0]), (bsz2, B.shape[1]))]
    for name, size in zip(("bsz", "bsz2"), sizes, strict=True):
        check.one_of(op, name, size, check.BLOCKSIZES)
    return fill(op, "out", out, _Fp8.apply(A, B, *codes, *sizes, mixed))


def matmul_fp8_mixed(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    bsz: int = -1,
    bsz2: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """A [..., K] @ B [K, N] with both rounded to fw_code: A in blocks of bsz, B with one scale.

    In the backward pass the gradient is rounded to bw_code in blocks of bsz2 for that of A; that of B is exact.

    Args:
        fw_code, bw_code: 256 ascending values, as from create_fp8_map.
        bsz, bsz2: block sizes; by default such as suit K and N.

    Raises:
        ValueError, TypeError: a wrong argument, which the message names.
    """
    return _matmul("matmul_fp8_mixed", A, B, fw_code, bw_code, bsz, bsz2, out, True)


def matmul_fp8_global(
    A: Tensor,
    B: Tensor,
    fw_code: Tensor,
    bw_code: Tensor,
    bsz: int = -1,
    bsz2: int = -1,
    out: Tensor | None = None,
) -> Tensor:
    """As matmul_fp8_mixed, with one scale for each tensor, and a gradient of B from the rounded tensors.

    bsz and bsz2 are accepted, so that one call serves both.
    """
    return _matmul("matmul_fp8_global", A, B, fw_code, bw_code, bsz, bsz2, out, False)


def switchback_bnb(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    state: MatmulLtState | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """y = A [..., K] @ B [N, K]^T + bias in int8, with the gradient of B in floats: bitsandbytes.matmul."""
    return matmul(A, B, out, state, threshold, bias)
