"""What public programs do with the C functions, several calls in a row."""

from __future__ import annotations

import ctypes as ct
from typing import Any

import torch
from c_symbol_cases import ERROR, STREAM, i32, near, ptr, same, values

import bitsandbytes.functional as F


def nested_weight(lib: Any, device: str) -> None:
    """The calls by which unsloth and axolotl dequantize a weight with nested statistics, and multiply a row with it."""
    n, k = 64, 512
    w = values(n, k, dtype=torch.bfloat16).to(device)
    packed, state = F.quantize_4bit(w, compress_statistics=True, quant_type="nf4", blocksize=64)
    stream = F._get_tensor_stream(packed) if device == "cuda" else STREAM
    absmax, out = torch.empty(state.absmax.shape, device=device), torch.empty_like(w)
    inner, blocks = state.state2, state.absmax.numel()
    pointers = ptr(inner.code), ptr(state.absmax), ptr(inner.absmax), ptr(absmax)
    lib.cdequantize_blockwise_fp32(*pointers, ct.c_int(inner.blocksize), ct.c_int(blocks), stream)
    absmax += state.offset
    pointers = None, ptr(packed), ptr(absmax), ptr(out)
    lib.cdequantize_blockwise_bf16_nf4(*pointers, ct.c_int(state.blocksize), ct.c_int(out.numel()), stream)
    same(out, F.dequantize_4bit(packed, state))
    x, y = values(1, k, seed=1, dtype=torch.bfloat16).to(device), torch.empty(1, n, dtype=torch.bfloat16, device=device)
    pointers = ptr(x), ptr(packed), ptr(absmax), ptr(state.code), ptr(y)
    sizes = i32(n), i32(1), i32(k)
    lib.cgemm_4bit_inference_naive_bf16(*sizes, *pointers, i32(n), i32(k // 2), i32(n), i32(64), stream)
    near(y, x.double() @ out.double().t(), ERROR[torch.bfloat16])
