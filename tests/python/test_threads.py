"""One layer called by many threads at once, first calls included; optimizers of disjoint parameters side by side."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import reference as ref
import torch

import bitsandbytes as bnb
from bitsandbytes import nn

THREADS = 8
FRESH = 200


@pytest.fixture(autouse=True)
def eager_switches() -> Iterator[None]:
    """Threads change places often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(pool: ThreadPoolExecutor, calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of calls that begin at the same moment."""
    barrier = threading.Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    return list(pool.map(begin, calls))


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as threads:
        yield threads


def int8_replaced(k: int, n: int, **options: Any) -> nn.Linear8bitLt:
    """Its state has yet to follow another weight."""
    layer = nn.Linear8bitLt(k, n, has_fp16_weights=False, **options).to("cpu")
    layer.weight = nn.Int8Params(torch.randn(n, k), requires_grad=False).to("cpu")
    return layer


def int8_written(k: int, n: int) -> nn.Linear8bitLt:
    layer = nn.Linear8bitLt(k, n, has_fp16_weights=False).to("cpu")
    layer.weight.__dict__["CB"] = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    layer.state.SCB = torch.rand(n)
    return layer


def int8_handed_over(k: int, n: int) -> nn.Linear8bitLt:
    layer = nn.Linear8bitLt(k, n, has_fp16_weights=False).to("cpu")
    layer.weight.CB = layer.weight.SCB = None
    layer.state.CB = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    return layer


def tied(layer: Any) -> Any:
    layer.weight = torch.nn.Parameter(torch.randn(layer.out_features, layer.in_features))
    return layer


LAYERS: dict[str, Callable[[], Any]] = {
    "int8": lambda: nn.Linear8bitLt(32, 16, has_fp16_weights=False).to("cpu"),
    "int8, outliers": lambda: nn.Linear8bitLt(32, 16, has_fp16_weights=False, threshold=1.0).to("cpu"),
    "int8, never moved": lambda: nn.Linear8bitLt(32, 16, has_fp16_weights=False),
    "int8, another weight": lambda: int8_replaced(32, 16),
    "int8, another weight, outliers": lambda: int8_replaced(32, 16, threshold=1.0),
    "int8, written codes": lambda: int8_written(32, 16),
    "int8, handed over": lambda: int8_handed_over(32, 16),
    "int8, tied": lambda: tied(nn.Linear8bitLt(32, 16, has_fp16_weights=False)),
    "floats": lambda: nn.Linear8bitLt(32, 16),
    "floats, outliers": lambda: nn.Linear8bitLt(32, 16, threshold=1.0),
    "4 bits": lambda: nn.Linear4bit(32, 16, quant_type="nf4").to("cpu"),
    "4 bits, nested": lambda: nn.LinearFP4(32, 16, compress_statistics=True).to("cpu"),
    "4 bits, bf16": lambda: nn.LinearNF4(32, 16, compute_dtype=torch.bfloat16).to("cpu"),
    "4 bits, tied": lambda: tied(nn.Linear4bit(32, 16)),
}


def outputs(layer: Any, x: torch.Tensor, training: bool) -> tuple[torch.Tensor, ...]:
    if not training:
        with torch.no_grad():
            return (layer(x),)
    x = x.clone().requires_grad_()
    y = layer(x)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    return y.detach(), grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("kind", LAYERS)
def test_first_calls_of_fresh_layers(kind: str, training: bool, dtype: torch.dtype, pool: ThreadPoolExecutor) -> None:
    xs = [torch.randn(1 + i % 3, 32).mul(2).to(dtype) for i in range(THREADS)]
    for _ in range(FRESH // 4):  # 200 of each kind in all
        layer = LAYERS[kind]().train(training)
        state = torch.get_rng_state()
        found = together(pool, [lambda x=x, layer=layer: outputs(layer, x, training) for x in xs])
        torch.set_rng_state(state)
        for x, y in zip(xs, found, strict=True):
            for a, b in zip(y, outputs(layer, x, training), strict=True):
                ref.assert_bits(a, b)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_state_of_matmul_is_shared(training: bool, pool: ThreadPoolExecutor) -> None:
    """Floats quantized once for a state that all threads use."""
    for _ in range(FRESH // 2):
        w, state = torch.randn(16, 32), bnb.MatmulLtState()
        state.has_fp16_weights, state.is_training = False, training
        xs = [torch.randn(2, 32) for _ in range(THREADS)]
        found = together(pool, [lambda x=x, w=w, state=state: bnb.matmul(x, w, state=state) for x in xs])
        for x, y in zip(xs, found, strict=True):
            ref.assert_bits(y, bnb.matmul(x, w))


@pytest.mark.parametrize("make", [nn.Embedding8bit, nn.EmbeddingNF4, nn.EmbeddingFP4])
def test_embeddings(make: Any, pool: ThreadPoolExecutor) -> None:
    table = make(40, 64).to("cpu")
    indices = [torch.randint(0, 40, (5,)) for _ in range(THREADS)]
    for index, rows in zip(indices, together(pool, [lambda i=i: table(i) for i in indices]), strict=True):
        ref.assert_bits(rows.detach(), table(index).detach())


OPTIMIZERS = [
    name for name, found in vars(bnb.optim).items() if isinstance(found, type) and name != "GlobalOptimManager"
]


def stepped(name: str, seed: int) -> list[torch.Tensor]:
    """Parameters after three steps of an optimizer of their own."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (8192 + 8 * seed, 33)]
    options = {"lr": 1e-2, "momentum": 0.9} if name.startswith(("SGD", "LARS")) else {}
    optimizer = getattr(bnb.optim, name)(parameters, **options)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach() for p in parameters]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_disjoint_parameters(name: str, pool: ThreadPoolExecutor) -> None:
    expected = [stepped(name, seed) for seed in range(THREADS)]
    for _ in range(3):
        found = together(pool, [lambda seed=seed: stepped(name, seed) for seed in range(THREADS)])
        for a, b in zip(found, expected, strict=True):
            for p, q in zip(a, b, strict=True):
                ref.assert_bits(p, q)
