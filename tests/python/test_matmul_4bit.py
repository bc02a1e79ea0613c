"""matmul_4bit and Linear4bit: error to float64, gradients, shapes, types, autocast. The stored weight never changes."""

from __future__ import annotations

import copy

import pytest
import reference as ref
import torch

import bitsandbytes as bnb
import bitsandbytes.functional as F

MAX_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 3e-3}
SHAPES = [
    (64, 64),
    (192, 256),
    (77, 129),
    (3, 4100),
]  # (out, in): blocks that run over the ends of rows, a last block that is short


def layer(
    n: int, k: int, dtype: torch.dtype, quant_type: str = "nf4", nested: bool = False, bias: bool = True, **options
) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(
        k, n, bias=bias, compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type, **options
    )
    return linear.to(dtype).to("cpu")


def weight_of(linear: bnb.nn.Linear4bit) -> torch.Tensor:
    return F.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


def exact(x: torch.Tensor, linear: bnb.nn.Linear4bit) -> torch.Tensor:
    """In float64, from the weight as dequantize_4bit gives it."""
    y = x.double() @ weight_of(linear).double().t()
    return y if linear.bias is None else y + linear.bias.double()


@pytest.mark.parametrize("m", [1, 2, 5, 33, 130])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize(
    ("quant_type", "nested", "bias"), [("nf4", False, True), ("nf4", True, False), ("fp4", True, True)]
)
def test_error_to_float64(m, shape, dtype, quant_type, nested, bias) -> None:
    linear = layer(*shape, dtype, quant_type, nested, bias)
    x = torch.randn(m, shape[1]).to(dtype)
    with torch.no_grad():
        y = linear(x)
    assert y.dtype == dtype and y.shape == (m, shape[0])
    assert ref.relative_error(y, exact(x, linear)) < MAX_ERROR[dtype]


@pytest.mark.parametrize("blocksize", ref.BLOCKSIZES)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_every_blocksize(blocksize: int, dtype: torch.dtype) -> None:
    packed, state = F.quantize_4bit(torch.randn(40, 300).to(dtype), blocksize=blocksize, quant_type="nf4")
    w = F.dequantize_4bit(packed, state).double()
    for m in (1, 4, 40):
        x = torch.randn(m, 300).to(dtype)
        y = bnb.matmul_4bit(x, packed.t(), state)
        assert ref.relative_error(y, x.double() @ w.t()) < MAX_ERROR[dtype]


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (2, 1, 4), (0,), (3, 0)], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_shapes(batch: tuple[int, ...], grad: bool) -> None:
    linear = layer(24, 96, torch.float32)
    x = torch.randn(*batch, 96, requires_grad=grad)
    y = linear(x)
    assert y.shape == (*batch, 24)
    if y.numel():
        assert ref.relative_error(y, exact(x, linear)) < 1e-6
    if grad:
        y.sum().backward()
        assert x.grad.shape == x.shape and linear.bias.grad.shape == (24,)


def test_layouts_of_x() -> None:
    linear = layer(24, 96, torch.float32)
    x = torch.randn(5, 96)
    y = linear(x).detach()
    spread = torch.randn(5, 96, 2)
    spread[..., 0] = x
    for view in (x.t().contiguous().t(), spread[..., 0], torch.cat([x, x])[5:]):
        assert torch.equal(linear(view), y)
    assert torch.equal(linear(x[2:3].expand(7, 96)), y[2:3].expand(7, 24))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("storage", ref.STORAGES, ids=str)
def test_matmul_4bit_takes_any_storage(storage: torch.dtype, transposed: bool) -> None:
    w, x = torch.randn(32, 128), torch.randn(3, 128)
    packed, state = F.quantize_4bit(w, quant_type="nf4", quant_storage=storage)
    plain, plain_state = F.quantize_4bit(w, quant_type="nf4")
    y = bnb.matmul_4bit(x, packed.t() if transposed else packed, state)
    assert torch.equal(y, bnb.matmul_4bit(x, plain.t(), plain_state))


def test_matmul_4bit_out() -> None:
    packed, state = F.quantize_4bit(torch.randn(32, 128), quant_type="nf4")
    for m in (1, 4):
        x, out = torch.randn(m, 128), torch.empty(m, 32)
        assert bnb.matmul_4bit(x, packed.t(), state, out=out) is out
        assert torch.equal(out, bnb.matmul_4bit(x, packed.t(), state))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_weight_that_was_quantized_from_its_transpose(dtype: torch.dtype, nested: bool, flat: bool) -> None:
    """A @ W of a state [K, N], as in the released package; a square one is [N, K]."""
    packed, state = F.quantize_4bit(torch.randn(64, 96).to(dtype), quant_type="nf4", compress_statistics=nested)
    w = F.dequantize_4bit(packed, state).double()
    packed = packed.t() if flat else packed
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    bias = torch.randn(96).to(dtype).requires_grad_()
    out, seed = torch.empty(2, 5, 96, dtype=dtype), torch.randn(2, 5, 96).to(dtype)
    with pytest.warns(DeprecationWarning, match=r"quantized from a \[K, N\] tensor .*shape=\[64, 96\]"):
        y = bnb.matmul_4bit(x, packed, state, bias=bias)
        assert bnb.matmul_4bit(x.detach(), packed, state, out=out, bias=bias.detach()) is out
    assert torch.equal(out, y)
    assert y.dtype == dtype and ref.relative_error(y, x.double() @ w + bias.double()) < 2 * MAX_ERROR[dtype]
    y.backward(seed)
    assert ref.relative_error(x.grad, seed.double() @ w.t()) < 2 * MAX_ERROR[dtype]
    assert ref.relative_error(bias.grad, seed.double().sum((0, 1))) < 2 * MAX_ERROR[dtype]
    assert bnb.matmul_4bit(x[:, :0], packed, state).shape == (2, 0, 96)


def test_square_and_wrong_shapes_are_not_taken_for_a_transpose(recwarn: pytest.WarningsRecorder) -> None:
    packed, state = F.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    x = torch.randn(3, 64)
    w = F.dequantize_4bit(packed, state).double()
    assert ref.relative_error(bnb.matmul_4bit(x, packed, state), x.double() @ w.t()) < 1e-6
    packed, state = F.quantize_4bit(torch.randn(64, 96), quant_type="nf4")
    with pytest.raises((ValueError, RuntimeError), match=r"4bit: A \S+ .*32"):
        bnb.matmul_4bit(torch.randn(3, 32), packed, state)
    assert not recwarn.list


# ---- gradients


@pytest.mark.parametrize("m", [1, 7, 65])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("fp4", False)])
def test_gradients(m: int, dtype: torch.dtype, quant_type: str, nested: bool) -> None:
    linear = layer(72, 136, dtype, quant_type, nested)
    x = torch.randn(m, 136).to(dtype).requires_grad_()
    seed = torch.randn(m, 72).to(dtype)
    linear(x).backward(seed)
    w = weight_of(linear).double()
    assert x.grad.dtype == dtype
    assert ref.relative_error(x.grad, seed.double() @ w) < MAX_ERROR[dtype]
    assert ref.relative_error(linear.bias.grad, seed.double().sum(0)) < MAX_ERROR[dtype]
    assert linear.weight.grad is None


def test_gradient_of_3d_input_and_frozen_bias() -> None:
    linear = layer(40, 64, torch.float32)
    linear.bias.requires_grad_(False)
    x = torch.randn(2, 3, 64, requires_grad=True)
    seed = torch.randn(2, 3, 40)
    linear(x).backward(seed)
    assert ref.relative_error(x.grad, seed.double() @ weight_of(linear).double()) < 1e-6
    assert linear.bias.grad is None


def test_gradient_with_checkpointing_and_of_bias_alone() -> None:
    linear = layer(40, 64, torch.float32)
    x = torch.randn(4, 64)
    linear(x).sum().backward()
    assert torch.equal(linear.bias.grad, torch.full((40,), 4.0))
    grads = []
    for use in (False, True):
        z = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(linear, z, use_reentrant=False) if use else linear(z)
        y.square().sum().backward()
        grads.append(z.grad)
    assert torch.equal(*grads)


# ---- types


@pytest.mark.parametrize("x_dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("compute", ref.FLOATS, ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_compute_dtype(x_dtype: torch.dtype, compute: torch.dtype, grad: bool) -> None:
    """The product is in compute_dtype, the result has the type of x."""
    linear = layer(32, 64, torch.float32, bias=True)
    linear.compute_dtype, linear.compute_type_is_set = compute, True
    x = torch.randn(5, 64).to(x_dtype).requires_grad_(grad)
    y = linear(x)
    assert y.dtype == x_dtype
    error = ref.relative_error(y, exact(x, linear))
    assert error < MAX_ERROR[torch.bfloat16] * 1.5
    if torch.bfloat16 in (compute, x_dtype):
        assert error > 1e-4, "not rounded to bfloat16"
    elif compute == x_dtype == torch.float32:
        assert error < 1e-6


@pytest.mark.parametrize("bias_dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 9])
def test_bias_dtypes(m: int, dtype: torch.dtype, bias_dtype: torch.dtype) -> None:
    linear = layer(32, 64, dtype)
    linear.bias.data = linear.bias.data.to(bias_dtype)
    x = torch.randn(m, 64).to(dtype)
    y = linear(x)
    assert y.dtype == dtype
    assert (
        ref.relative_error(y, exact(x, linear))
        < MAX_ERROR[torch.bfloat16 if torch.bfloat16 in (dtype, bias_dtype) else torch.float16]
    )


@pytest.mark.parametrize("m", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype: torch.dtype, m: int) -> None:
    """Gradients have the types of their tensors. A compute_dtype that was set stays, as in the released package."""
    linear = layer(32, 64, torch.float32)
    before = copy.deepcopy(linear)
    x = torch.randn(m, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = torch.nn.Sequential(linear, torch.nn.Identity())(x)
        loss = y.float().sum()
    loss.backward()
    assert ref.relative_error(y, exact(x, linear)) < 2 * MAX_ERROR[dtype]
    assert x.grad.dtype == torch.float32 and linear.bias.grad.dtype == torch.float32
    assert ref.relative_error(x.grad, torch.ones(m, 32).double() @ weight_of(linear).double()) < 2 * MAX_ERROR[dtype]
    assert torch.equal(linear.weight, before.weight)


# ---- the stored weight


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_forward_never_changes_the_weight(dtype, quant_type, nested, storage) -> None:
    """The released CPU package repacks on the first forward after eval(), and dequantize_4bit is then wrong."""
    linear = layer(64, 128, dtype, quant_type, nested, quant_storage=storage)
    bytes_before, weight_before = ref.raw(linear.weight).copy(), weight_of(linear).clone()
    state_before = {k: v.clone() for k, v in linear.state_dict().items()}
    address = linear.weight.data_ptr()
    linear.eval()
    with torch.no_grad():
        for m in (1, 2, 64):
            linear(torch.randn(m, 128).to(dtype))
    linear.train()
    linear(torch.randn(3, 128).to(dtype).requires_grad_()).sum().backward()
    assert (ref.raw(linear.weight) == bytes_before).all() and linear.weight.data_ptr() == address
    ref.assert_bits(weight_of(linear), weight_before)
    state = linear.state_dict()
    assert state.keys() == state_before.keys()
    for key, value in state.items():
        ref.assert_bits(value, state_before[key])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_more_weights_than_31_bits_count(dtype: torch.dtype) -> None:
    """2^31 + 1024 weights, 1 GiB of codes: the last columns are those of a product with the last rows alone."""
    n, k, last = 2**21 + 1, 1024, 5
    gemm = torch.ops.bitsandbytes.gemm_4bit
    packed = torch.randint(0, 256, (n * k // 2, 1), dtype=torch.uint8)
    absmax = torch.rand(n * k // 64)
    for m in (1, 3):
        x = torch.randn(m, k).to(dtype)
        y = gemm(x, packed, [n, k], absmax, 64, "nf4")
        tail = gemm(x, packed[-last * k // 2 :], [last, k], absmax[-last * k // 64 :], 64, "nf4")
        ref.assert_bits(y[:, -last:].contiguous(), tail)
        head = gemm(x, packed[: last * k // 2], [last, k], absmax[: last * k // 64], 64, "nf4")
        ref.assert_bits(y[:, :last].contiguous(), head)


@pytest.mark.parametrize("shape", [(5, 8), (8,), (0, 8), (2, 3, 8)])
def test_gradients_of_no_outputs_are_zero(shape: tuple[int, ...]) -> None:
    layer = bnb.nn.Linear4bit(8, 0, compute_dtype=torch.float32).to("cpu")
    x = torch.randn(shape, requires_grad=True)
    layer(x).sum().backward()
    ref.assert_bits(x.grad, torch.zeros(shape))
    assert layer.bias.grad is None or layer.bias.grad.shape == (0,)
