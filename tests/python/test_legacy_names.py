"""Names that other projects reach through the released package, beside the C functions (test_c_symbols.py)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F


def test_elementwise_functions_change_their_first_argument() -> None:
    a, b, codes = torch.randn(3, 5), torch.randn(3, 5), torch.zeros(7, dtype=torch.uint8)
    product = a * b
    F._mul(a, b)
    assert torch.equal(a, product)
    F.fill(a, 2.5)
    F.fill(codes, 200)
    assert (a == 2.5).all() and (codes == 200).all()
    F.elementwise_func("arange", a, None, 0)
    assert torch.equal(a, torch.arange(15.0).view(3, 5))
    for name, x in (("fill", a.double()), ("_mul", codes), ("sine", a)):
        with pytest.raises(NotImplementedError, match=f"Function not implemented: {name} of {x.dtype}"):
            F.elementwise_func(name, x, x, 1)


I8 = {"dtype": torch.int8}
PRODUCTS: list[tuple[Any, ...]] = [
    ((4, 6), (6, 3), None, False, False, (4, 3)),
    ((6, 4), (6, 3), None, True, False, (4, 3)),
    ((4, 6), (3, 6), None, False, True, (4, 3)),
    ((6, 4), (3, 6), None, True, True, (4, 3)),
    ((2, 4, 6), (6, 3), None, False, False, (2, 4, 3)),
    ((2, 4, 6), (2, 6, 3), None, False, False, (2, 4, 3)),
    ((2, 5, 4), (2, 5, 3), (4, 3), False, False, (4, 3)),  # a gradient of weights
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("a", "b", "out", "ta", "tb", "shape"), PRODUCTS)
def test_check_matmul(a: Any, b: Any, out: Any, ta: bool, tb: bool, shape: Any) -> None:
    made = torch.empty(*out, dtype=torch.int32) if out else None
    assert tuple(F.check_matmul(torch.empty(a, **I8), torch.empty(b, **I8), made, ta, tb)) == shape
    with pytest.raises(TypeError, match=r"Expected torch\.int8 input tensors A and B, but got torch\.float32"):
        F.check_matmul(torch.empty(a), torch.empty(b, **I8), made, ta, tb)
    with pytest.raises(ValueError, match="B has shape"):
        F.check_matmul(torch.empty(a, **I8), torch.empty(*b[:-2], 9, 9, **I8), made, ta, tb)
    assert F.check_matmul(torch.empty(a), torch.empty(b), None, ta, tb, torch.float32) if out is None else True


def test_deprecated_products_warn_each_time() -> None:
    a, b = torch.ones(2, 3, 4, **I8), torch.ones(2, 4, 5, **I8)
    check = lambda: F.check_matmul(a, b, None, False, False)  # noqa: E731
    for call in (lambda: F.igemm(a[0], b[0]), lambda: F.batched_igemm(a, b), check):
        for _ in range(2):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                call()
            assert [w.category for w in caught] == [FutureWarning] and caught[0].filename == __file__


def test_contexts_and_streams() -> None:
    with pytest.raises(RuntimeError, match="get_instance"):
        F.Cusparse_Context()
    if F.lib.compiled_with_cuda:
        assert F.Cusparse_Context.get_instance().context.value
    else:
        with pytest.raises(RuntimeError, match="'get_cusparse' not available"):
            F.Cusparse_Context.get_instance()
        assert F.Cusparse_Context._instance is None
    if torch.cuda.is_available():
        x = torch.ones(1, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()) as _:
            assert F._get_tensor_stream(x).value == torch.cuda.current_stream().cuda_stream
        with F._cuda_device_of(x):
            assert torch.cuda.current_device() == x.get_device()


def test_modules_that_others_take_names_from() -> None:
    from bitsandbytes.nn import modules

    assert modules.GlobalOptimManager is bnb.optim.GlobalOptimManager
    assert modules.QuantState is F.QuantState and F.QuantState.__module__ == "bitsandbytes.functional"
    assert modules.OutlierTracer is bnb.utils.OutlierTracer
    assert modules.has_avx512bf16 is F.has_avx512bf16 and F.C == 127.0
    assert bnb.__pdoc__["optim.optimizer.MockArgs"] is False


@pytest.mark.parametrize("schedule", [{}, {"t_alpha": 5, "t_beta3": 7}], ids=["constant", "scheduled"])
def test_reference_ademamix_is_the_paper_and_our_optimizer(schedule: dict[str, int]) -> None:
    """In fp64 it is what AdEMAMix computes in fp32; several parameters do not share a schedule's progress."""
    from bitsandbytes.optim.ademamix import _ReferenceAdEMAMix

    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(300, generator=generator) for _ in range(2)]
    exact = [torch.nn.Parameter(x.double()) for x in start]
    ours = [torch.nn.Parameter(x.clone()) for x in start]
    options = {"lr": 1e-2, "betas": (0.9, 0.99, 0.999), "weight_decay": 0.1, **schedule}
    optimizers = _ReferenceAdEMAMix(exact, **options), bnb.optim.AdEMAMix32bit(ours, **options)
    for _ in range(10):
        for p, q in zip(exact, ours, strict=True):
            q.grad = torch.randn(300, generator=generator)
            p.grad = q.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    for p, q, x in zip(exact, ours, start, strict=True):
        torch.testing.assert_close(q.double(), p, rtol=1e-5, atol=1e-6)
        assert (p - x.double()).abs().max() > 0.05
    assert optimizers[0].state[exact[0]]["m1_m2"].shape == (2, 300)
    assert optimizers[0].step(lambda: 7) == 7
