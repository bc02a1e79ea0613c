"""Names of earlier versions of the package. Each works, and says once what to use instead."""

import functools
import warnings

import torch
from torch import Tensor

from .. import _checks as check
from .._codes import nearest_codes
from .blockwise import _as_code, _dynamic_map, fill


@functools.cache
def warn_once(name: str, instead: str) -> None:
    warnings.warn(f"{name} is deprecated and will be removed; {instead}.", FutureWarning, stacklevel=3)


def _code(op: str, code: Tensor | None, device: torch.device) -> Tensor:
    return _dynamic_map(device) if code is None else _as_code(op, code, device)


def quantize(A: Tensor, code: Tensor | None = None, out: Tensor | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Deprecated. quantize_blockwise with a single scale: the codes, uint8, and (absmax, code)."""
    warn_once("quantize", "use quantize_blockwise")
    check.tensor("quantize", "A", A)
    check.dtype("quantize", "A", A, *check.FLOATS)
    code = _code("quantize", code, A.device)
    x = A.float()
    absmax = x.abs().max() if x.numel() else x.new_zeros(())
    codes = nearest_codes(x / absmax.clamp(min=1e-38), code)
    return fill("quantize", "out", out, codes), (absmax, code)


def dequantize(
    A: Tensor,
    state: tuple[Tensor, Tensor] | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Deprecated. code[A] * absmax in fp32, with (absmax, code) from quantize, or absmax and a code of choice."""
    warn_once("dequantize", "use dequantize_blockwise")
    op = "dequantize"
    check.tensor(op, "A", A)
    if state is not None:
        if not isinstance(state, tuple | list) or len(state) != 2:
            raise TypeError(f"{op}: state is {type(state).__name__}, expected the pair (absmax, code)")
        absmax, code = state
    if absmax is None:
        raise ValueError(f"{op}: state and absmax are both None, expected one of them")
    check.tensor(op, "absmax", absmax)
    x = _values(op, A, _code(op, code, A.device))
    return fill(op, "out", out, x * absmax.to(A.device))


def _values(op: str, A: Tensor, code: Tensor) -> Tensor:
    check.dtype(op, "A", A, torch.uint8)
    return code.view(-1)[A.int()]


def quantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """Deprecated. The nearest of 256 ascending fp32 values in code to each element of A, whose scale is 1."""
    warn_once("quantize_no_absmax", "use quantize_blockwise")
    op = "quantize_no_absmax"
    check.tensor(op, "A", A)
    check.dtype(op, "A", A, *check.FLOATS)
    return fill(op, "out", out, nearest_codes(A.float(), _as_code(op, code, A.device)))


def dequantize_no_absmax(A: Tensor, code: Tensor, out: Tensor | None = None) -> Tensor:
    """Deprecated. code[A] in fp32."""
    warn_once("dequantize_no_absmax", "use dequantize_blockwise")
    op = "dequantize_no_absmax"
    check.tensor(op, "A", A)
    return fill(op, "out", out, _values(op, A, _as_code(op, code, A.device)))
