"""4-bit and block-wise quantization in plain torch, for any device that has no kernel of its own (docs/NUMERICS.md)."""

from typing import Any

import torch
from torch import Tensor

from ... import _checks as check
from ..._codes import code_of, dequantize, nearest_codes, normalize, quantize_4bit, unpack
from ..._ops_fourbit import (
    Dequantize4bit,
    DequantizeBlockwise,
    Gemm4bit,
    Gemv4bit,
    check_dequantize_4bit,
    check_dequantize_blockwise,
    check_gemm_4bit,
    check_gemv_4bit,
    check_quantize_4bit,
    check_quantize_blockwise,
    read_linear_4bit,
    weight_of_gemm_4bit,
    weight_of_gemv_4bit,
)
from ..utils import default_kernel

_ops = torch.ops.bitsandbytes


@default_kernel("bitsandbytes::quantize_4bit")
def _(A: Tensor, blocksize: int, quant_type: str, quant_storage: torch.dtype) -> tuple[Tensor, Tensor]:
    rows = check_quantize_4bit(A, blocksize, quant_type, quant_storage)
    t, absmax = normalize(A, blocksize)
    pairs = quantize_4bit(t, quant_type).view(-1)[: A.numel() + A.numel() % 2].view(-1, 2)
    packed = pairs[:, 0] << 4 | pairs[:, 1]
    packed = torch.nn.functional.pad(packed, (0, rows * quant_storage.itemsize - len(packed)))
    return packed.view(quant_storage).view(rows, 1), absmax


@default_kernel("bitsandbytes::dequantize_4bit")
def _(*arguments: Any) -> Tensor:
    d = Dequantize4bit(*arguments)
    n = check_dequantize_4bit(d)
    values = code_of(d.quant_type, d.A.device)
    return dequantize(values, unpack(d.A), d.absmax, d.blocksize, n).to(d.dtype).view(tuple(d.shape))


@default_kernel("bitsandbytes::dequantize_4bit.out")
def _(*arguments: Any) -> None:
    d, out = Dequantize4bit(*arguments[:-1]), arguments[-1]
    check.out_like("dequantize_4bit", out, d.shape, d.dtype, d.A.device)
    out.copy_(_ops.dequantize_4bit.default(*d))


@default_kernel("bitsandbytes::quantize_blockwise")
def _(A: Tensor, code: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    check_quantize_blockwise(A, code, blocksize)
    code = code.reshape(-1)
    if not bool((code[1:] >= code[:-1]).all()):
        raise ValueError("quantize_blockwise: code is not in ascending order, expected a sorted map without NaN")
    t, absmax = normalize(A, min(blocksize, max(A.numel(), 1)))  # a block longer than A is A
    return nearest_codes(t, code).view(-1)[: A.numel()].view(A.shape), absmax


@default_kernel("bitsandbytes::dequantize_blockwise")
def _(*arguments: Any) -> Tensor:
    d = DequantizeBlockwise(*arguments)
    check_dequantize_blockwise(d)
    x = dequantize(d.code.reshape(-1), d.A.reshape(-1), d.absmax, d.blocksize, d.A.numel())
    return x.to(d.dtype).view(d.A.shape)


@default_kernel("bitsandbytes::dequantize_blockwise.out")
def _(*arguments: Any) -> None:
    d, out = DequantizeBlockwise(*arguments[:-1]), arguments[-1]
    check.out_like("dequantize_blockwise", out, d.A.shape, d.dtype, d.A.device)
    out.copy_(_ops.dequantize_blockwise.default(*d))


@default_kernel("bitsandbytes::gemv_4bit")
def _(*arguments: Any) -> Tensor:
    g = Gemv4bit(*arguments)
    check_gemv_4bit(g)
    return torch.nn.functional.linear(g.A, weight_of_gemv_4bit(g, g.A.dtype))


@default_kernel("bitsandbytes::gemv_4bit.out")
def _(*arguments: Any) -> None:
    g, out = Gemv4bit(*arguments[:-1]), arguments[-1]
    check_gemv_4bit(g)
    check.out_like("gemv_4bit", out, g.shape, g.A.dtype, g.A.device)
    out.copy_(_ops.gemv_4bit.default(*g))


@default_kernel("bitsandbytes::gemm_4bit")
def _(*arguments: Any) -> Tensor:
    g = Gemm4bit(*arguments)
    check_gemm_4bit(g)
    bias = None if g.bias is None else g.bias.to(g.A.dtype)
    return torch.nn.functional.linear(g.A, weight_of_gemm_4bit(g, g.A.dtype), bias)


def linear_4bit(*arguments: Any) -> Tensor:
    # Through the dispatcher: backends of other projects have a gemm_4bit.
    result: Tensor = _ops.gemm_4bit.default(*read_linear_4bit(*arguments))
    return result


for _name in ("linear_4bit", "linear_4bit.nested", "linear_4bit.forward", "linear_4bit.nested_forward"):
    default_kernel(f"bitsandbytes::{_name}")(linear_4bit)
