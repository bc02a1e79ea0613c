"""A self-check of one device: each kind of operation once, against plain torch arithmetic on the CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import functional as F
from ..nn import Linear4bit, Linear8bitLt
from ..optim import AdamW, AdamW8bit

_SEED = 20261130
_ROWS, _COLUMNS, _OUTPUTS = 5, 192, 70  # no multiple of any vector, whole blocks


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED))


def _expect(what: str, found: float, limit: float) -> None:
    if not found <= limit:  # also NaN
        raise ArithmeticError(f"{what} is {found:.3g}, expected at most {limit:.3g}")


def _error(found: Tensor, wanted: Tensor) -> float:
    """max |found - wanted|, by the largest |wanted|."""
    return ((found.double().cpu() - wanted).abs().max() / wanted.abs().max()).item()


def _quantize_4bit(device: str) -> None:
    x = _normal(_OUTPUTS, _COLUMNS)
    for quant_type, gap in (("nf4", 0.1520), ("fp4", 0.1667)):  # half the largest distance of two values
        packed, state = F.quantize_4bit(x.to(device), quant_type=quant_type, compress_statistics=True)
        y = F.dequantize_4bit(packed, state)
        scales = x.view(-1, 64).abs().amax(1, keepdim=True)
        _expect(
            f"the error of {quant_type} in units of a block's scale",
            ((y.cpu() - x).view(-1, 64) / scales).abs().max().item(),
            gap * 1.03,
        )


def _quantize_blockwise(device: str) -> None:
    x = _normal(3000)
    codes, state = F.quantize_blockwise(x.to(device), blocksize=256)
    _expect("the error of 8-bit blocks", _error(F.dequantize_blockwise(codes, state), x.double()), 0.02)


def _linear_4bit(device: str) -> None:
    x = _normal(_ROWS, _COLUMNS)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        layer = Linear4bit(_COLUMNS, _OUTPUTS, quant_type="nf4", compute_dtype=dtype).to(device)
        weight = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double().cpu()
        given = x.to(dtype)
        wanted = given.double() @ weight.t() + layer.bias.to(dtype).double().cpu()
        _expect(f"the error of Linear4bit in {dtype}", _error(layer(given.to(device)).detach(), wanted), limit)


def _linear_8bit(device: str) -> None:
    x = _normal(_ROWS, _COLUMNS).half()
    layer = Linear8bitLt(_COLUMNS, _OUTPUTS, has_fp16_weights=False, threshold=6.0)
    wanted = x.double() @ layer.weight.data.double().t() + layer.bias.double()
    _expect("the error of Linear8bitLt", _error(layer.to(device)(x.to(device)).detach(), wanted.detach()), 0.03)


def _optimizers(device: str) -> None:
    start, grad = _normal(4096), _normal(4096).flip(0)
    wanted = torch.nn.Parameter(start.clone())
    wanted.grad = grad
    torch.optim.AdamW([wanted], lr=1e-3).step()
    for kind, limit in ((AdamW, 1e-5), (AdamW8bit, 1e-5)):  # a first step does not see the rounding of its states
        p = torch.nn.Parameter(start.to(device, copy=True))
        p.grad = grad.to(device)
        kind([p], lr=1e-3, weight_decay=1e-2).step()
        _expect(f"the error of a step of {kind.__name__}", _error(p.detach(), wanted.detach().double()), limit)


CHECKS: dict[str, Callable[[str], None]] = {
    "4-bit quantization": _quantize_4bit,
    "8-bit blockwise quantization": _quantize_blockwise,
    "4-bit product": _linear_4bit,
    "int8 product": _linear_8bit,
    "optimizer step": _optimizers,
}


def self_check(device: str) -> dict[str, str]:
    """Runs every check on a device of torch; for each its error, "" if there is none."""
    results = {}
    for name, check in CHECKS.items():
        try:
            check(device)
        except Exception as error:  # noqa: BLE001  # whatever it is, it is what the user wants to see
            results[name] = f"{type(error).__name__}: {error}"
        else:
            results[name] = ""
    return results
