"""Optimizers on a CUDA GPU: the bytes of the CPU, graphs and streams.

./dev gpu runs these; without a GPU they are skipped, as test_cuda is. States in paged memory: test_cuda_paged.py.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import reference as ref
import torch
from test_cuda import GPU, assert_same, no_sync, there
from test_optim import SETS, N, every_rule, states, step, tensors

import bitsandbytes as bnb
import bitsandbytes.functional as F

ops = torch.ops.bitsandbytes
CLASSES = ("AdamW8bit", "AdamW", "Lion8bit", "AdEMAMix8bit", "LAMB", "LARS8bit", "RMSprop8bit", "Adagrad", "SGD8bit")


def moved(state: dict[str, Any]) -> dict[str, Any]:
    return {k: [t.to(GPU, copy=True) for t in v] if isinstance(v, list) else there(v) for k, v in state.items()}


def nasty(n: int) -> torch.Tensor:
    g = torch.randn(n) * 10.0 ** torch.randint(-8, 3, (n,))
    g[::7], g[3::50], g[5::60] = 0, float("nan"), float("-inf")
    return g


@pytest.mark.parametrize("bits", [32, 8])
@every_rule
def test_steps_have_the_bytes_of_the_cpu(rule: str, bits: int) -> None:
    for options, p_type, g_type in itertools.product(SETS, ref.FLOATS, ref.FLOATS):
        p, state = torch.randn(N).to(p_type), states(rule, N, bits)
        on_gpu, gpu_state = p.to(GPU, copy=True), moved(state)
        for t in range(1, 5):
            g, seed = nasty(N).to(g_type), None if t % 2 else t
            extra = options | {"seed": seed, "skip_zeros": t == 3, "offsets": [t], "gnorm_scales": [0.7]}
            step(rule, p, g, state, t, **extra)
            step(rule, on_gpu, g.to(GPU), gpu_state, t, **extra)
        assert_same((on_gpu, *tensors(gpu_state), *gpu_state["unorm"]), (p, *tensors(state), *state["unorm"]))


def test_views_at_any_address() -> None:
    for offset, bits in itertools.product((1, 3, 4), (32, 8)):
        p, state = torch.randn(5000), states("adam", 5000, bits)
        gpu_state = moved(state)
        on_gpu = torch.empty(5000 + offset, device=GPU)[offset:].copy_(p)
        g = torch.randn(5000)
        step("adam", p, g, state, 1)
        step("adam", on_gpu, g.to(GPU), gpu_state, 1)
        assert_same((on_gpu, *tensors(gpu_state)), (p, *tensors(state)))


def model(device: torch.device, dtype: torch.dtype = torch.bfloat16, width: int = 300) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(70, width), torch.nn.LayerNorm(width), torch.nn.Linear(width, 65)]
    return torch.nn.Sequential(*layers).to(dtype).to(device)


def set_gradients(module: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for p in module.parameters():
        p.grad = torch.randn(p.shape).to(p.dtype).to(p.device)


def assert_like_the_cpu(on_gpu: Any, on_cpu: Any) -> None:
    """Parameters and states of two optimizers."""
    for mine, other in zip(on_gpu.param_groups[0]["params"], on_cpu.param_groups[0]["params"], strict=True):
        assert_same(mine.data, other.data)
        for key, value in on_cpu.state[other].items():
            if isinstance(value, torch.Tensor):
                assert_same(on_gpu.state[mine][key], value)
            else:
                assert on_gpu.state[mine][key] == value


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_the_bytes_of_the_cpu(name: str) -> None:
    own = {"min_8bit_size": 1024, "weight_decay": 0.01} | (
        {"momentum": 0.9} if name.startswith(("LARS", "SGD")) else {}
    )
    mine, other = model(GPU), model(torch.device("cpu"))
    on_gpu, on_cpu = (getattr(bnb.optim, name)(m.parameters(), lr=1e-2, **own) for m in (mine, other))
    for t in range(20):
        for module, optimizer in ((mine, on_gpu), (other, on_cpu)):
            set_gradients(module, t)
            optimizer.step()
    assert_like_the_cpu(on_gpu, on_cpu)


def test_1000_steps_of_adamw8bit() -> None:
    p = torch.randn(10_000)
    mine, other = torch.nn.Parameter(p.to(GPU)), torch.nn.Parameter(p.clone())
    on_gpu, on_cpu = (bnb.optim.AdamW8bit([x], lr=1e-3) for x in (mine, other))
    for t in range(1000):
        torch.manual_seed(t)
        other.grad = torch.randn_like(other)
        mine.grad = other.grad.to(GPU)
        on_gpu.step()
        on_cpu.step()
    assert_like_the_cpu(on_gpu, on_cpu)


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_waits_for_the_device_or_allocates(name: str) -> None:
    module = model(GPU)
    set_gradients(module, 1)
    momentum = {"momentum": 0.9} if name.startswith(("LARS", "SGD")) else {}
    optimizer = getattr(bnb.optim, name)(module.parameters(), lr=1e-2, min_8bit_size=1024, **momentum)
    with no_sync():  # the first step included, which makes the states and brings their maps
        for _ in range(3):
            optimizer.step()
        held = torch.cuda.memory_reserved()
        for _ in range(3):
            optimizer.step()
    assert torch.cuda.memory_reserved() == held


@pytest.mark.parametrize("rule", ["adam", "ademamix", "momentum", "lamb"])
@pytest.mark.parametrize("bits", [32, 8])
def test_replays_of_a_graph_count_on(rule: str, bits: int) -> None:
    options = {"max_unorm": 0.05, "t_beta3": 4, "seed": 3}
    p, state = torch.randn(N).bfloat16(), states(rule, N, bits)
    on_gpu, gpu_state, g = p.to(GPU), moved(state), torch.empty(N, device=GPU)
    clock = torch.zeros(1, dtype=torch.int64, device=GPU)

    def call(*args: Any) -> None:
        ops.optimizer_step.default(*args, clock)

    gradients = [torch.randn(N) for _ in range(6)]
    g.copy_(gradients[0])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(rule, on_gpu, g, gpu_state, 1, call, **options)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(rule, on_gpu, g, gpu_state, 1, call, **options)
    for gradient in gradients[1:]:
        g.copy_(gradient)
        graph.replay()
    for t, gradient in enumerate(gradients, 1):
        step(rule, p, gradient, state, t, **options)
    assert clock.item() == len(gradients)
    assert_same((on_gpu, *tensors(gpu_state)), (p, *tensors(state)))


def check_captured_steps(name: str, width: int = 300) -> None:
    """One step, one captured and replayed four times: five of the CPU."""
    mine, other = model(GPU, width=width), model(torch.device("cpu"), width=width)
    on_gpu, on_cpu = (getattr(bnb.optim, name)(m.parameters(), lr=1e-2) for m in (mine, other))
    set_gradients(mine, 0)
    on_gpu.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        on_gpu.step()
    for _ in range(4):
        graph.replay()
    set_gradients(other, 0)
    for _ in range(5):
        on_cpu.step()
    for found, expected in zip(mine.parameters(), other.parameters(), strict=True):
        assert_same(found.data, expected.data)
    steps = {entry["step"] for entry in on_gpu.state_dict()["state"].values()}
    assert steps == {5}


@pytest.mark.parametrize("name", ["AdamW8bit", "AdEMAMix"])
def test_a_captured_step_of_a_class(name: str) -> None:
    check_captured_steps(name)


def test_gradients_from_another_stream() -> None:
    mine, other = model(GPU), model(torch.device("cpu"))
    set_gradients(other, 1)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            p.grad = q.grad.to(GPU)
        on_gpu = bnb.optim.AdamW(mine.parameters())
        on_gpu.step()
    side.synchronize()
    on_cpu = bnb.optim.AdamW(other.parameters())
    on_cpu.step()
    assert_like_the_cpu(on_gpu, on_cpu)


def test_devices_are_named() -> None:
    p, state = torch.randn(N, device=GPU), states("adam", N, 32)
    with pytest.raises(ValueError, match=r"optimizer_step: state1 is on cpu, expected cuda:0"):
        step("adam", p, torch.randn_like(p), state, 1)


def test_a_handle_of_cublas() -> None:
    assert F.CUBLAS_Context.get_instance().get_context(GPU).value
