"""CUDA graphs of 4-bit layers, and a second GPU. ./dev gpu runs these; without a GPU they skip, as test_cuda does."""

from __future__ import annotations

import copy

import pytest
import torch
from process import run_python
from test_cuda import BATCHES, GPU, layer, ops

import bitsandbytes as bnb


@pytest.mark.parametrize("m", BATCHES)
@pytest.mark.parametrize("nested", [False, True])
def test_capture_in_a_graph(nested: bool, m: int) -> None:
    linear = layer(1024, 4096, torch.bfloat16, nested)
    x = torch.randn(m, 4096, device=GPU, dtype=torch.bfloat16)

    def step() -> tuple[torch.Tensor, ...]:
        y = linear(x)
        return y, *ops.quantize_4bit(y, 64, "nf4", torch.int32)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            for found, expected in zip(captured, step(), strict=True):
                assert torch.equal(found, expected)


CAPTURE = """
import torch, bitsandbytes as bnb
layer = bnb.nn.Linear4bit(4096, 1024, compute_dtype=torch.bfloat16, quant_type="nf4").to(torch.bfloat16).cuda()
x = torch.randn({m}, 4096, device="cuda", dtype=torch.bfloat16)
with torch.no_grad():
    layer(x[:1])  # one row, as the graph of a prompt has many
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    assert torch.equal(y, layer(x))
print("same")
"""


@pytest.mark.parametrize("m", [48, 512])
def test_capture_of_many_rows_after_one_row_only(m: int) -> None:
    """Nothing may be made for the first time in a capture, as the library's handle for many rows would be."""
    run = run_python(CAPTURE.format(m=m))
    assert run.stdout.split() == ["same"], run.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one() -> None:
    """Bytes, products of every size, int8 layers and optimizers: all that is kept for each device, and whose runtime
    is another one than torch's."""
    other = torch.device("cuda", 1)
    x = torch.randn(4096)
    expected = ops.quantize_4bit(x, 64, "nf4", torch.uint8)
    found = ops.quantize_4bit(x.to(other), 64, "nf4", torch.uint8)
    assert torch.cuda.current_device() == 0
    assert all(f.device == other and torch.equal(f.cpu(), e) for f, e in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"absmax is on cuda:0, expected cuda:1"):
        ops.dequantize_4bit(found[0], found[1].to("cuda:0"), 64, "nf4", [4096], torch.float32)

    here = layer(1024, 4096, torch.bfloat16, nested=True)
    eight = bnb.nn.Linear8bitLt(4096, 256, has_fp16_weights=False, threshold=6.0).to(GPU)
    for linear in (here, eight):
        twin = copy.deepcopy(linear).to(other)
        for m in BATCHES:
            a = torch.randn(m, 4096, device=GPU, dtype=torch.bfloat16)
            a[:, 7] = 8
            with torch.no_grad():
                y = twin(a.to(other))
                # The same kernels where both are of one kind.
                torch.testing.assert_close(y.to(GPU), linear(a), rtol=2e-2, atol=5e-2)
            assert y.device == other and torch.cuda.current_device() == 0

    for name in ("AdamW8bit", "LAMB"):
        weights = [torch.nn.Parameter(x.to(device)) for device in (GPU, other)]
        for w in weights:
            optimizer = getattr(bnb.optim, name)([w], lr=1e-2)
            for _ in range(3):
                w.grad = w.detach() * 2
                optimizer.step()
        assert torch.equal(weights[0].cpu(), weights[1].cpu()), name
    assert torch.cuda.current_device() == 0
