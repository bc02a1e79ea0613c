"""bitsandbytes.research: products rounded as 8-bit floating point would, and SwitchBack."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference as ref
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.research import matmul_fp8_global, matmul_fp8_mixed, nn, switchback_bnb

FW, BW = F.create_fp8_map(True, 4, 3, 8), F.create_fp8_map(True, 5, 2, 8)
PRODUCTS = pytest.mark.parametrize("product", [matmul_fp8_mixed, matmul_fp8_global], ids=lambda f: f.__name__)


def nearest(x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """x rounded to the nearest value of code times its largest magnitude, plainly."""
    scale = x.abs().max()
    return code[(x.double()[..., None] / scale - code.double()).abs().argmin(-1)] * scale


@PRODUCTS
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 100), (0, 64)])
def test_products_and_gradients(product: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> None:
    a, b = torch.randn(shape, requires_grad=True), torch.randn(shape[-1], 48, requires_grad=True)
    y = product(a, b, FW, BW, bsz=64, bsz2=64)
    assert y.shape == (*shape[:-1], 48)
    grad = torch.randn_like(y)
    grads = torch.autograd.grad(y, (a, b), grad)
    assert grads[0].shape == a.shape and grads[1].shape == b.shape
    if not a.numel():
        return
    exact = a.double() @ b.double()
    expected = torch.autograd.grad(exact, (a, b), grad.double())
    assert 0.001 < ref.relative_error(y, exact) < 0.06, "3 bits of fraction"
    assert 0.001 < ref.relative_error(grads[0], expected[0]) < 0.12, "2 bits of fraction"
    mixed = product is matmul_fp8_mixed
    assert ref.relative_error(grads[1], expected[1]) < (1e-6 if mixed else 0.12)
    if not mixed:
        ra, rb, rg = nearest(a.detach(), FW), nearest(b.detach(), FW), nearest(grad, BW)
        assert ref.relative_error(y, ra.double() @ rb.double()) < 1e-4
        assert ref.relative_error(grads[0], rg.double() @ rb.double().t()) < 1e-4


@PRODUCTS
def test_out_and_dtype(product: Callable[..., torch.Tensor]) -> None:
    a, b = torch.randn(3, 32).bfloat16(), torch.randn(32, 8).bfloat16()
    y, out = product(a, b, FW, BW), torch.empty(3, 8, dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16 and product(a, b, FW, BW, out=out) is out and torch.equal(out, y)
    assert torch.equal(product(a, b, FW, BW, 64, 64), y), "block sizes that suit the operands"


@PRODUCTS
def test_wrong_arguments(product: Callable[..., torch.Tensor]) -> None:
    a, b, name = torch.randn(3, 32), torch.randn(32, 8), product.__name__
    for arguments, message in (
        ((None, b, FW, BW), "A is NoneType"),
        ((a, b.t(), FW, BW), "B has shape"),
        ((a, b.half(), FW, BW), "B has dtype"),
        ((a, b, FW[:7], BW), "fw_code has size 7"),
        ((a, b, FW, BW, 65), "bsz is 65"),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"^{name}: {message}.*expected"):
            product(*arguments)


@pytest.mark.parametrize("layer", [nn.LinearFP8Mixed, nn.LinearFP8Global])
def test_layers_learn(layer: type[torch.nn.Linear]) -> None:
    torch.manual_seed(1)
    module = layer(16, 4)
    assert isinstance(module, torch.nn.Linear) and (module.bsz, layer(4097, 65).bsz2) == (64, 128)
    assert set(module.state_dict()) == {"weight", "bias"}
    assert ref.trained(module, 150) < 0.02


def test_switchback() -> None:
    a, b, bias = torch.randn(5, 64), torch.randn(16, 64), torch.randn(16)
    assert torch.equal(switchback_bnb(a, b, bias=bias), bnb.matmul(a, b, bias=bias))
    assert torch.equal(
        switchback_bnb(a, b, None, bias, bnb.MatmulLtState(), 1.5), bnb.matmul(a, b, None, None, 1.5, bias)
    )
