"""A result depends on its inputs alone: not on the batch of a row, the number of threads or the instruction set."""

from __future__ import annotations

import hashlib

import pytest
import reference as ref
import torch
from process import run_python

import bitsandbytes as bnb
import bitsandbytes.functional as F

M = (1, 2, 3, 8, 17, 32, 33, 64, 128, 257)
THREADS = (1, 2, 3, 8)


def layer(n: int, k: int, dtype: torch.dtype, quant_type: str = "nf4", nested: bool = True) -> bnb.nn.Linear4bit:
    return (
        bnb.nn.Linear4bit(k, n, compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type)
        .to(dtype)
        .to("cpu")
        .eval()
    )


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(256, 512), (77, 129), (576, 1536)], ids=str)
@pytest.mark.usefixtures("deterministic")
@torch.no_grad()
def test_row_does_not_depend_on_its_batch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    linear = layer(*shape, dtype)
    x = torch.randn(max(M), shape[1]).to(dtype)
    rows = torch.cat([linear(row[None]) for row in x])
    for m in M:
        ref.assert_bits(linear(x[:m]), rows[:m])
        ref.assert_bits(linear(x[-m:]), rows[-m:])
    ref.assert_bits(linear(x[:6].view(2, 3, -1)).view(6, -1), rows[:6])
    ref.assert_bits(linear(x[0]), rows[0])


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@torch.no_grad()
def test_several_rows_do_not_depend_on_their_batch_by_default(dtype: torch.dtype) -> None:
    """A product of its own for a single row is all that deterministic algorithms turn off."""
    linear = layer(256, 512, dtype)
    x = torch.randn(max(M), 512).to(dtype)
    rows = torch.cat([linear(pair) for pair in x[:256].split(2)])
    for m in M[1:-1]:
        ref.assert_bits(linear(x[:m]), rows[:m])
    near = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}[dtype]
    single, together = linear(x[:1]).double(), rows[:1].double()
    assert (single - together).norm() <= 2 * near * together.norm()


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_row_does_not_depend_on_gradient_mode(dtype: torch.dtype) -> None:
    """Training and inference see the same forward."""
    linear = layer(96, 160, dtype)
    for m in (1, 5, 40):
        x = torch.randn(m, 160).to(dtype)
        with torch.no_grad():
            y = linear(x)
        ref.assert_bits(linear(x.requires_grad_()).detach(), y)


def results(seed: int = 0) -> dict[str, torch.Tensor]:
    """One of everything, of sizes that are split over threads."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for dtype in ref.FLOATS:
        w = torch.randn(384, 1000, generator=generator).to(dtype)
        x = torch.randn(40, 1000, generator=generator).to(dtype)
        for quant_type in ("nf4", "fp4"):
            packed, state = F.quantize_4bit(w, quant_type=quant_type, compress_statistics=True)
            key = f"{quant_type} {dtype} "
            found |= {key + "packed": packed, key + "absmax": state.absmax, key + "nested": state.state2.absmax}
            found[key + "weight"] = F.dequantize_4bit(packed, state)
            for m in (1, 3, 40):
                found[key + f"product {m}"] = bnb.matmul_4bit(x[:m], packed.t(), state)
        for name, code in (("dynamic", None), ("linear", F.create_linear_map())):
            codes, state = F.quantize_blockwise(w, code=code, blocksize=256)
            found |= {f"{name} {dtype} codes": codes, f"{name} {dtype} absmax": state.absmax}
            found[f"{name} {dtype} values"] = F.dequantize_blockwise(codes, state)
    return found


def digest(found: dict[str, torch.Tensor], products: bool) -> str:
    total = hashlib.sha256()
    for key, value in found.items():
        if products or "product" not in key:
            total.update(key.encode() + ref.raw(value).tobytes())
    return total.hexdigest()


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_threads() -> None:
    torch.set_num_threads(THREADS[0])
    expected = results()
    for count in THREADS[1:]:
        torch.set_num_threads(count)
        for key, value in results().items():
            assert (ref.raw(value) == ref.raw(expected[key])).all(), (key, count)


def test_every_isa_gives_equal_bytes(isas: list[str]) -> None:
    """Of quantize and dequantize. Each sums products in an order of its own: see test_products_of_every_isa."""
    code = "from test_invariance import *; print(digest(results(), products=False))"
    outcome = {}
    for isa in isas:
        run = run_python(code, BNB_FORCE_ISA=isa)
        assert run.returncode == 0, run.stderr
        outcome[isa] = run.stdout.strip()
    assert isas[-1] == "scalar" and len(set(outcome.values())) == 1, outcome


def test_products_of_every_isa(isas: list[str]) -> None:
    """Error to float64, row invariance and thread invariance under each instruction set."""
    code = """
from test_invariance import *
for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 3e-3)):
    for shape in ((96, 257), (64, 512)):
        linear = layer(*shape, dtype)
        w = F.dequantize_4bit(linear.weight.data, linear.weight.quant_state).double()
        x = torch.randn(70, shape[1]).to(dtype)
        y = linear(x).detach()
        error = ref.relative_error(y, x.double() @ w.t() + linear.bias.double())
        assert error < bound, (dtype, shape, error)
        error = ref.relative_error(linear(x[0]).detach(), x[0].double() @ w.t() + linear.bias.double())
        assert error < bound, (dtype, shape, error)
        torch.use_deterministic_algorithms(True)
        for m in (1, 2, 3, 8, 17, 33):
            ref.assert_bits(linear(x[:m]).detach(), y[:m])
        torch.set_num_threads(1)
        ref.assert_bits(linear(x).detach(), y)
        torch.set_num_threads(2)
        torch.use_deterministic_algorithms(False)
print("right")
"""
    for isa in isas:
        run = run_python(code, BNB_FORCE_ISA=isa)
        assert run.stdout.strip() == "right", (isa, run.stderr[-3000:])
