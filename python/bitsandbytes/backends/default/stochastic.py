"""Stochastic rounding to 16 bits in plain torch, by the random bits of src/common/stochastic.h."""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of a * b, for words in int64."""
    low, high = (a & 0xFFFF) * b, (a >> 16) * b
    carry = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (carry >> 16), (low & 0xFFFF) | (carry & 0xFFFF) << 16


def philox(key: int, low: Tensor, high: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011) at counters of 128 bits, `low` the lower half: four words each, [.., 4]."""
    k0, k1 = key & _WORD, key >> 32 & _WORD
    c0, c1 = low & _WORD, low >> 32 & _WORD
    c2, c3 = (torch.full_like(low, x) for x in (high & _WORD, high >> 32 & _WORD))
    for _ in range(10):
        (a_high, a_low), (b_high, b_low) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b_high ^ c1 ^ k0, b_low, a_high ^ c3 ^ k1, a_low
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return torch.stack((c0, c1, c2, c3), -1)


def rounded_stochastically(x: Tensor, dtype: torch.dtype, seed: int, step: int, offset: int) -> Tensor:
    """fp32 x, element 0 of which is number `offset` of the parameter, to one of its neighbours in bf16 or fp16."""
    first = offset // 4
    groups = torch.arange(first, (offset + x.numel() + 3) // 4, device=x.device)
    start = offset - 4 * first
    random = philox(seed, groups, step).view(-1)[start : start + x.numel()] >> 16
    bits = x.view(torch.int32).long() & _WORD
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        codes, plain = bits + random >> 16, magnitude > 0x7F800000
    else:
        tiny = ((magnitude.int().view(torch.float32).clamp(max=2.0**-14) * 2.0**40).long() + random) >> 16
        usual = magnitude - (112 << 23) + (random >> 3) >> 13
        codes = bits >> 16 & 0x8000 | torch.where(magnitude < 0x38800000, tiny, usual)
        plain = magnitude >= 0x47800000
    codes = (codes & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype)
    return torch.where(plain, x.to(dtype), codes)
