"""Block-wise quantization written plainly in numpy: what the library must give, bit for bit (docs/NUMERICS.md).

float16 and bfloat16 are computed as the float32 that equals them; rounding to the output type is torch's `.to(dtype)`.
"""

from __future__ import annotations

import numpy as np
import torch

NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
NF4_THRESHOLDS = np.array(
    [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984,
     -0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668,
     0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011],
    np.float32)  # fmt: skip
FP4_MAGNITUDES = np.array([0, 0.005208333333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25], np.float32)
FP4 = np.concatenate([FP4_MAGNITUDES, 0 - FP4_MAGNITUDES])  # codes 0 and 8 are both 0.0
_FP4_HALF = np.array(
    [0.0026041667442768812, 0.0859375, 0.2083333432674408, 0.2916666865348816, 0.4166666865348816, 0.5833333730697632,
     0.8333333730697632], np.float32)  # fmt: skip
FP4_THRESHOLDS = np.concatenate([-_FP4_HALF[::-1], np.zeros(1, np.float32), _FP4_HALF])
FP4_ORDER = np.array([11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3], np.uint8)  # tiny t > 0: code 8
THRESHOLDS = {"nf4": NF4_THRESHOLDS, "fp4": FP4_THRESHOLDS}
VALUES = {"nf4": NF4, "fp4": FP4}
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STORAGES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def floats(x: torch.Tensor) -> np.ndarray:
    """A tensor of any float type as flat float32."""
    return x.detach().resolve_neg().to(torch.float32).contiguous().numpy().reshape(-1)


def raw(x: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor."""
    return x.detach().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()


def blocks_of(n: int, blocksize: int) -> int:
    return -(-n // blocksize)


def scaled_blocks(x: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """t = x * (1 / absmax) of every element and the absmax of every block, each operation rounded to float32.

    The divisor is at least 1e-38, so that 1 / absmax is finite. It is 0 for infinity, and then inf * 0 is NaN.
    """
    n = x.size
    blocksize = min(blocksize, max(n, 1))
    padded = np.zeros(blocks_of(n, blocksize) * blocksize, np.float32)
    padded[:n] = x
    padded = padded.reshape(-1, blocksize)
    absmax = np.abs(padded).max(axis=1, initial=0)  # NaN wins
    with np.errstate(all="ignore"):
        t = padded * (np.float32(1) / np.maximum(absmax, np.float32(1e-38)))[:, None]
    return t.reshape(-1)[:n], absmax


def codes4(t: np.ndarray, quant_type: str) -> np.ndarray:
    """The code counts strict t > threshold; NaN is above every threshold."""
    below = np.searchsorted(THRESHOLDS[quant_type], t, side="left")
    return (FP4_ORDER[below] if quant_type == "fp4" else below).astype(np.uint8)


def quantize4(x: np.ndarray, quant_type: str, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed bytes, the first element of a pair in the high nibble, and absmax."""
    t, absmax = scaled_blocks(x, blocksize)
    codes = codes4(t, quant_type)
    if codes.size % 2:
        codes = np.append(codes, np.uint8(7 if quant_type == "nf4" else 0))
    return codes[0::2] << 4 | codes[1::2], absmax


def dequantize4(packed: np.ndarray, absmax: np.ndarray, quant_type: str, blocksize: int, n: int) -> np.ndarray:
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[:n]
    with np.errstate(all="ignore"):
        return VALUES[quant_type][codes] * np.repeat(absmax, blocksize)[:n]


def quantize8(x: np.ndarray, code: np.ndarray, blocksize: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of 256 ascending values by their float32 midpoints; a tie goes to the even code, NaN to the last."""
    t, absmax = scaled_blocks(x, blocksize)
    middle = ((code[:-1].astype(np.float64) + code[1:]) / 2).astype(np.float32)
    below, through = np.searchsorted(middle, t, side="left"), np.searchsorted(middle, t, side="right")
    return np.where(below % 2 == 0, below, through).astype(np.uint8), absmax


def dequantize8(codes: np.ndarray, absmax: np.ndarray, code: np.ndarray, blocksize: int) -> np.ndarray:
    with np.errstate(all="ignore"):
        return code[codes.reshape(-1)] * np.repeat(absmax, min(blocksize, max(codes.size, 1)))[: codes.size]


def int_bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a float tensor, all NaNs made equal."""
    x = torch.where(torch.isnan(x), torch.full_like(x, torch.nan), x).contiguous()
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal shape, type and bits (-0.0 is not 0.0, NaN is NaN)."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, (
        actual.shape,
        actual.dtype,
        expected.shape,
        expected.dtype,
    )
    if not actual.is_floating_point():
        assert torch.equal(actual, expected)
        return
    wrong = (int_bits(actual) != int_bits(expected)).nonzero()
    assert len(wrong) == 0, (
        f"{len(wrong)} of {actual.numel()} differ, first at {wrong[0].tolist()}: "
        f"{actual[tuple(wrong[0])].item()!r}, expected {expected[tuple(wrong[0])].item()!r}"
    )


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm, both in float64."""
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def trained(layer: torch.nn.Linear, steps: int) -> float:
    """Teaches a layer a random linear map; its last loss, over that of answering 0."""
    x = torch.randn(128, layer.in_features)
    target = x @ torch.randn(layer.in_features, layer.out_features)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(steps):
        loss = (layer(x) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (loss / target.pow(2).mean()).item()
