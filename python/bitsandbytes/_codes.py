"""Code arithmetic in plain torch: the 4-bit maps as data, scales of blocks, nearest codes, stochastic rounding.

For the default backend, and for what is no operator. Written for exact bytes, not for speed.
"""

import functools

import torch
from torch import Tensor

from . import _checks as check

# fmt: off
_NF4 = (  # QLoRA, arXiv 2305.14314, appendix E: quantiles of the normal distribution
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
    0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
_FP4 = (  # sign, two exponent bits, one mantissa bit, scaled to a largest value of 1
    0.0, 0.0052083334885537624, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25,
    0.0, -0.0052083334885537624, -2 / 3, -1.0, -1 / 3, -0.5, -1 / 6, -0.25,
)

# Decision thresholds on t = x / absmax, ascending, part of the format and not all midpoints. A value takes the code at
# the number of thresholds strictly below t; NaN is above all of them.
THRESHOLDS = {
    "nf4": (
        -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
        -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
        0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
    ),
    "fp4": (
        -0.8333333730697632, -0.5833333730697632, -0.4166666865348816, -0.2916666865348816, -0.2083333432674408,
        -0.0859375, -0.0026041667442768812, 0.0, 0.0026041667442768812, 0.0859375, 0.2083333432674408,
        0.2916666865348816, 0.4166666865348816, 0.5833333730697632, 0.8333333730697632,
    ),
}
CODES_BY_THRESHOLD = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}
# fmt: on

_WORD = 0xFFFFFFFF

CODE = {name: torch.tensor(values, dtype=torch.float32) for name, values in (("nf4", _NF4), ("fp4", _FP4))}


@functools.cache
def code_of(quant_type: str, device: torch.device) -> Tensor:
    """The 16 values of a 4-bit format."""
    return CODE[quant_type].to(device)


def normalize(A: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    """t = x / absmax as rows of one block, the last one padded with zeros, and absmax; both in fp32."""
    n = A.numel()
    blocks = check.blocks(n, blocksize)
    x = A.reshape(-1).float()
    x = torch.nn.functional.pad(x, (0, blocks * blocksize - n)).view(blocks, blocksize)
    absmax = x.abs().amax(dim=1)
    # The floor makes t = 0 of a block of zeros. Infinity gives t = 0 and NaN, NaN gives NaN.
    return x * (1.0 / absmax.clamp(min=1e-38))[:, None], absmax


def quantize_4bit(t: Tensor, quant_type: str) -> Tensor:
    """The codes of t = x / absmax, uint8 each. NaN takes the last one."""
    below = torch.bucketize(t, t.new_tensor(THRESHOLDS[quant_type]))
    return torch.tensor(CODES_BY_THRESHOLD[quant_type], dtype=torch.uint8, device=t.device)[below]


def unpack(packed: Tensor) -> Tensor:
    """4-bit codes in order, high nibble first."""
    packed = packed.contiguous().view(-1).view(torch.uint8)
    return torch.stack((packed >> 4, packed & 15), dim=1).view(-1)


def dequantize(values: Tensor, codes: Tensor, absmax: Tensor, blocksize: int, n: int) -> Tensor:
    """values[code] * absmax of its block for the first n codes, in fp32 and flat."""
    blocksize = min(blocksize, max(n, 1))
    blocks = check.blocks(n, blocksize)
    x = torch.nn.functional.pad(values[codes[:n].int()], (0, blocks * blocksize - n)).view(blocks, blocksize)
    return (x * absmax.reshape(-1, 1)).view(-1)[:n]


def nearest_codes(t: Tensor, code: Tensor) -> Tensor:
    """The index of the nearest of 256 ascending values; a tie goes to the even one, NaN to the last. uint8."""
    middle = (code[1:] + code[:-1]) * 0.5
    codes = torch.bucketize(t.contiguous(), middle)  # NaN comes last
    at = middle[codes.clamp(max=len(middle) - 1)]
    codes += (t == at) & (codes % 2 == 1)
    return codes.to(torch.uint8)


def state_codes(x: Tensor, absmax: Tensor, qmap: Tensor, is_root: bool) -> Tensor:
    """The codes of blocks, the last dimension of x. A first moment below 0 never gets the code of 0, nor does a second
    moment (`is_root`) above 0."""
    codes = nearest_codes(x * (1 / absmax.clamp(min=1e-38))[..., None], qmap)
    values = qmap[codes.int()]
    if is_root:
        above = qmap[(codes.int() + 1).clamp(max=check.CODES - 1)]
        return codes + ((x > 0) & (values <= 0) & (above > 0)).to(torch.uint8)
    below = qmap[(codes.int() - 1).clamp(min=0)]
    return codes - ((x < 0) & (values >= 0) & (below < 0)).to(torch.uint8)


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
