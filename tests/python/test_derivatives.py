"""Derivatives of products with quantized weights, forward and backward, of any order, by every way that torch has: they
are those of x @ W^T + bias in float64 with the dequantized W. What has none raises."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference as ref
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes._ops import SCHEMAS
from bitsandbytes._ops_fourbit import linear_4bit_layout

ops = torch.ops.bitsandbytes
N, K = 8, 32
Product = Callable[..., Tensor]


def weights() -> Tensor:
    return (torch.randn(N, K) / 100).bfloat16().float()


def rows(m: int, outlier: bool = False) -> Tensor:
    """Activations that int8 codes hold exactly, each row alone and in a batch: so that y, and the derivatives that
    depend on it, are those of float64."""
    x = torch.randint(-127, 128, (m, K)).float()
    x[:, 3] = 127
    if outlier:
        x[0, 5] = 200  # / 32: above a threshold of 6
    return x / 32


class Case:
    """A product of x [.., K], bias [N] and, if it learns, the weight, with the weight that it stands for in float64."""

    def __init__(self, call: Product, weight: Tensor, learned: Tensor | None = None, outlier: bool = False) -> None:
        self.call, self.weight = call, weight.double()
        self.inputs = (rows(3, outlier), torch.randn(N) / 2, *([] if learned is None else [learned]))

    def exact(self, x: Tensor, bias: Tensor, learned: Tensor | None = None) -> Tensor:
        """The same product. The rounding of a weight that learns is an addition of constants."""
        weight = self.weight if learned is None else learned + (self.weight - learned.detach())
        return x @ weight.t() + bias


def functional_4bit(quant_type: str, nested: bool) -> Case:
    packed, state = F.quantize_4bit(weights(), quant_type=quant_type, compress_statistics=nested)
    return Case(lambda x, b: bnb.matmul_4bit(x, packed.t(), state, bias=b), F.dequantize_4bit(packed, state))


def transposed_4bit() -> Case:
    packed, state = F.quantize_4bit(weights().t().contiguous(), quant_type="nf4")
    return Case(lambda x, b: bnb.matmul_4bit(x, packed, state, bias=b), F.dequantize_4bit(packed, state).t())


def gemv_4bit() -> Case:
    packed, state = F.quantize_4bit(weights(), quant_type="fp4", blocksize=32)
    return Case(lambda x, b: F.gemv_4bit(x, packed, state=state) + b, F.dequantize_4bit(packed, state))


def linear_4bit(quant_type: str, nested: bool) -> Case:
    layer = bnb.nn.Linear4bit(K, N, quant_type=quant_type, compress_statistics=nested)
    layer.weight.data = weights()
    layer = layer.to("cpu")
    weight = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    return Case(lambda x, b: functional_call(layer, {"bias": b}, (x,)), weight)


def codes_of(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale, _ = F.int8_vectorwise_quant(weight)
    return codes, scale, F.int8_vectorwise_dequant(codes, scale)


def functional_int8(learns: bool, threshold: float) -> Case:
    weight = weights()
    codes, scale, rounded = codes_of(weight)

    def call(x: Tensor, bias: Tensor, weight: Tensor = codes) -> Tensor:
        state = bnb.MatmulLtState()
        state.has_fp16_weights, state.threshold = learns, threshold
        if not learns:
            state.CB, state.SCB = codes, scale
        return bnb.matmul(x, weight, state=state, bias=bias)

    return Case(call, rounded, weight if learns else None, threshold > 0)


def linear_int8(learns: bool, threshold: float) -> Case:
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=learns, threshold=threshold)
    layer.weight.data = weight = weights()
    layer = layer.to("cpu")

    def call(x: Tensor, bias: Tensor, *weight: Tensor) -> Tensor:
        return functional_call(layer, {"bias": bias} | ({"weight": weight[0]} if weight else {}), (x,))

    return Case(call, codes_of(weight)[2], weight if learns else None, threshold > 0)


def operator(name: str, nested: bool = False) -> Case:
    packed, state = F.quantize_4bit(weights(), quant_type="nf4", compress_statistics=nested)
    weight = F.dequantize_4bit(packed, state)
    second = state.state2
    stats = (state.absmax, second.code, state.offset) if nested else ()
    absmax = second.absmax if nested else state.absmax
    layout = linear_4bit_layout((N, K), 64, "nf4")
    codes, scale, rounded = codes_of(weights())
    return {
        "gemm_4bit": Case(lambda x, b: ops.gemm_4bit(x, packed, [N, K], absmax, 64, "nf4", b, *stats), weight),
        "gemv_4bit": Case(lambda x, b: ops.gemv_4bit(x, packed, [N, K], absmax, state.code, 64) + b, weight),
        "linear_4bit": Case(lambda x, b: ops.linear_4bit(x, packed, absmax, layout, b, *stats), weight),
        "int8_linear": Case(lambda x, b: ops.int8_linear(x, codes, scale, b), rounded),
    }[name]


MAKERS: dict[str, Callable[[], Case]] = {
    "matmul_4bit nf4": lambda: functional_4bit("nf4", False),
    "matmul_4bit fp4 nested": lambda: functional_4bit("fp4", True),
    "matmul_4bit [K, N]": transposed_4bit,
    "gemv_4bit": gemv_4bit,
    "Linear4bit nf4 nested": lambda: linear_4bit("nf4", True),
    "Linear4bit fp4": lambda: linear_4bit("fp4", False),
    **{
        f"{name}{' learned' * learns} threshold {threshold}": lambda make=make, learns=learns, threshold=threshold: (
            make(learns, threshold)
        )
        for name, make in (("matmul", functional_int8), ("Linear8bitLt", linear_int8))
        for learns in (False, True)
        for threshold in (0.0, 6.0)
    },
    "op gemm_4bit": lambda: operator("gemm_4bit"),
    "op gemm_4bit nested": lambda: operator("gemm_4bit", True),
    "op gemv_4bit": lambda: operator("gemv_4bit"),
    "op linear_4bit": lambda: operator("linear_4bit"),
    "op linear_4bit nested": lambda: operator("linear_4bit", True),
    "op int8_linear": lambda: operator("int8_linear"),
}


@pytest.fixture(params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    warnings.simplefilter("ignore", DeprecationWarning)
    return MAKERS[request.param]()


def tangents_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    gen = torch.Generator().manual_seed(1)
    return tuple(torch.randn(t.shape, generator=gen).to(t.dtype) for t in inputs)


def dual(f: Product, *inputs: Tensor) -> Any:
    """All inputs with a tangent, and each of them alone."""
    tangents = tangents_of(inputs)
    found = []
    with fwAD.dual_level():
        for which in range(-1, len(inputs)):
            made = [
                fwAD.make_dual(t, d) if which in (-1, i) else t
                for i, (t, d) in enumerate(zip(inputs, tangents, strict=True))
            ]
            found.append(fwAD.unpack_dual(f(*made)).tangent)
    return found


def forward_over_reverse(f: Product, *inputs: Tensor) -> Any:
    """Hessian times vector."""
    return jvp(grad(lambda *a: loss(f, *a), tuple(range(len(inputs)))), inputs, tangents_of(inputs))[1]


def reverse_over_forward(f: Product, *inputs: Tensor) -> Any:
    """The gradient of a dual tensor's tangent, without torch.func."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    with fwAD.dual_level():
        made = [fwAD.make_dual(t, d) for t, d in zip(leaves, tangents_of(inputs), strict=True)]
        tangent = fwAD.unpack_dual(f(*made).tanh()).tangent
    return torch.autograd.grad(tangent.square().sum(), leaves)


def loss(f: Product, *inputs: Tensor) -> Tensor:
    return f(*inputs).tanh().square().sum()


def backward(f: Product, *inputs: Tensor) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(loss(f, *leaves), leaves)


def double_backward(f: Product, *inputs: Tensor) -> Any:
    """Of a penalty of the gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    grads = torch.autograd.grad(loss(f, *leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


def triple_backward(f: Product, *inputs: Tensor) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    g = torch.autograd.grad(loss(f, *leaves), leaves, create_graph=True)
    h = torch.autograd.grad(sum(t.square().sum() for t in g), leaves, create_graph=True)
    return torch.autograd.grad(sum(t.square().sum() for t in h), leaves)


def batched_backward(f: Product, *inputs: Tensor) -> Any:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = f(*leaves)
    seeds = torch.linspace(-1, 1, 4 * y.numel(), dtype=y.dtype).view(4, *y.shape)
    return torch.autograd.grad(y, leaves, seeds, is_grads_batched=True)


def over_rows(f: Product, *inputs: Tensor) -> Any:
    x, *rest = inputs
    one = lambda row, *rest: loss(f, row[None], *rest)  # noqa: E731
    return vmap(grad(one, (0, 1)), (0, *[None] * len(rest)))(x, *rest)


def ensemble(f: Product, *inputs: Tensor) -> Any:
    """x and bias have a batch each."""
    x, bias, *rest = inputs
    tangents = tangents_of((x, bias))

    def one(x: Tensor, bias: Tensor) -> Tensor:
        return jvp(lambda x, bias: f(x, bias, *rest).tanh(), (x, bias), tangents)[1]

    return vmap(one, (0, 1))(torch.stack([x, -x]), torch.stack([bias, -bias], 1))


WAYS: dict[str, Callable[..., Any]] = {
    "dual tensors": dual,
    "jvp": lambda f, *a: jvp(f, a, tangents_of(a))[1],
    "vjp": lambda f, *a: (lambda pair: pair[1](torch.ones_like(pair[0])))(vjp(f, *a)),
    "grad": lambda f, *a: grad(lambda *a: loss(f, *a), tuple(range(len(a))))(*a),
    "jacrev": lambda f, *a: jacrev(lambda *a: f(*a).sum(0), (0, 1))(*a),
    "jacfwd": lambda f, *a: jacfwd(lambda *a: f(*a).sum(0), (0, 1))(*a),
    "hessian": lambda f, x, *a: hessian(lambda row: loss(f, row[None], *a))(x[0]),
    "jacrev of jacfwd": lambda f, x, *a: jacrev(jacfwd(lambda row: loss(f, row[None], *a)))(x[0]),
    "jvp of grad": forward_over_reverse,
    "grad of dual": reverse_over_forward,
    "backward": backward,
    "double backward": double_backward,
    "triple backward": triple_backward,
    "batched backward": batched_backward,
    "vmap of grad": over_rows,
    "grad of vmap": lambda f, *a: grad(lambda x: vmap(lambda row: f(row[None], *a[1:])[0])(x).tanh().sum())(a[0]),
    "vmap of jvp": ensemble,
}


@pytest.mark.parametrize("way", WAYS)
def test_equals_float64(case: Case, way: str) -> None:
    found = WAYS[way](case.call, *case.inputs)
    expected = WAYS[way](case.exact, *(t.double() for t in case.inputs))
    leaves = torch.utils._pytree.tree_leaves
    for a, b in zip(leaves(found), leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        assert ref.relative_error(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tangents_and_gradients_of_16_bits(case: Case, dtype: torch.dtype) -> None:
    x, _, *learned = inputs = [t.to(dtype) for t in case.inputs]
    of_x, of_bias, *of_learned = tangents = tangents_of(inputs)
    y, tangent = jvp(case.call, tuple(inputs), tangents)
    expected = of_x.double() @ case.weight.t() + of_bias.double()
    if learned:
        expected += x.double() @ of_learned[0].double().t()
    assert y.dtype == tangent.dtype == dtype
    most = {torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert ref.relative_error(tangent, expected) < 3 * most
    grads = grad(lambda *a: case.call(*a).float().sum(), tuple(range(len(inputs))))(*inputs)
    ones = torch.ones(3, N).double()
    for found, exact in zip(grads, (ones @ case.weight, ones.sum(0), ones.t() @ x.double()), strict=False):
        assert found.dtype == dtype
        assert ref.relative_error(found, exact) < 3 * most


# ---- what is not differentiable


def test_what_has_no_derivative_raises() -> None:
    """Each operator, with a tangent or a gradient for an argument that has none: an error, never a zero."""
    packed, state = F.quantize_4bit(weights(), quant_type="nf4")
    codes8, state8 = F.quantize_blockwise(weights())
    codes, scale, _ = F.int8_vectorwise_quant(weights())
    x = rows(3)
    xc, xs, _ = F.int8_vectorwise_quant(x)
    sums = F.int8_linear_matmul(xc, codes)
    layout = linear_4bit_layout((N, K), 64, "nf4")
    layout_of = {"gemm_4bit": ("absmax", (x, packed, [N, K], state.absmax, 64, "nf4"))}
    cases = layout_of | {
        "gemv_4bit": ("absmax", (x, packed, [N, K], state.absmax, state.code, 64)),
        "gemv_4bit.out": ("A", (x, packed, [N, K], state.absmax, state.code, 64, torch.empty(3, N))),
        "linear_4bit": ("absmax", (x, packed, state.absmax, layout)),
        "int8_linear": ("SCB", (x, codes, scale)),
        "dequantize_4bit": ("absmax", (packed, state.absmax, 64, "nf4", [N, K], torch.float32)),
        "dequantize_4bit.out": ("absmax", (packed, state.absmax, 64, "nf4", [N, K], torch.float32, torch.empty(N, K))),
        "dequantize_blockwise": ("absmax", (codes8, state8.absmax, state8.code, 4096, torch.float32)),
        "int8_vectorwise_dequant": ("stats", (codes, scale)),
        "int8_mm_dequant": ("row_stats", (sums, xs, scale)),
        "int8_scaled_mm": ("col_stats", (xc, codes, xs, scale)),
        "int8_mixed_scaled_mm": ("A", (x, xc, codes, xs, scale)),
    }
    constants = {
        "quantize_4bit": ("A", (x, 64, "nf4", torch.uint8)),
        "quantize_blockwise": ("A", (x, state8.code, 256)),
        "int8_vectorwise_quant": ("A", (x, 0.0)),
        "int8_double_quant": ("A", (x, 0.0)),
    }
    for name, (argument, args) in (cases | constants).items():
        packet, _, which = name.partition(".")
        op = getattr(getattr(ops, packet), which or "default")
        place = [a.name for a in op._schema.arguments].index(argument)

        def call(t: Tensor, op: Any = op, args: Any = args, place: int = place) -> Tensor:
            found = op(*args[:place], t, *args[place + 1 :])
            if isinstance(found, tuple):
                return found[op._schema.name.rpartition("::")[2] in constants]
            return args[-1] if found is None else found

        value = args[place]
        text = rf"{packet}\S*: {argument} has a (tangent|gradient), expected"
        with fwAD.dual_level(), pytest.raises(NotImplementedError, match=text):
            call(fwAD.make_dual(value, torch.ones_like(value)))
        with pytest.raises(NotImplementedError, match=text):
            jvp(call, (value,), (torch.ones_like(value),))
        if name in constants:
            assert not any(t.requires_grad for t in op(value.clone().requires_grad_(), *args[1:]) if t is not None)
            continue
        with pytest.raises(NotImplementedError, match=text):
            call(value.clone().requires_grad_()).sum().backward()
        with pytest.raises(NotImplementedError, match=text):
            grad(lambda t: call(t).sum())(value)


def test_every_operator_is_asked() -> None:
    """No operator but those that step a parameter in place, and those below autograd, lacks what raises above."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    without = {name for name in SCHEMAS if not has_kernel(f"bitsandbytes::{name}", "Autograd")}
    below = {"linear_4bit.forward", "linear_4bit.nested_forward", "int8_linear.forward"}
    assert without == below | {name for name in SCHEMAS if name.startswith("optimizer")}


def test_states_keep_nothing_of_a_transform() -> None:
    """A layer that was differentiated by torch.func works afterwards as before."""
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=True)
    x = rows(3)
    expected = layer(x).detach()
    vmap(grad(lambda row: layer(row[None]).sum()))(x)
    jvp(lambda w: functional_call(layer, {"weight": w}, (x,)), (layer.weight.detach(),), (torch.ones(N, K),))
    state = layer.state
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (state.CB, state.SCB) if t is not None)
    ref.assert_bits(layer(x).detach(), expected)


def test_derivatives_beside_no_grad() -> None:
    """Forward mode counts under no_grad too; requires_grad does not."""
    case = operator("gemm_4bit")
    x, bias = case.inputs
    with torch.no_grad(), fwAD.dual_level():
        assert fwAD.unpack_dual(case.call(fwAD.make_dual(x, x), bias)).tangent is not None
    with torch.no_grad():
        assert not case.call(x.clone().requires_grad_(), bias).requires_grad


def test_gradients_of_embeddings_end_at_the_table() -> None:
    """Indices have no derivative, tables are codes: but what follows an embedding differentiates by itself."""
    index, scale = torch.tensor([[1, 5], [0, 15]]), torch.randn(64)
    for cls in (bnb.nn.Embedding4bit, bnb.nn.Embedding8bit):
        table = cls(16, 64).to("cpu")
        _, tangent = jvp(lambda s, table=table: table(index) * s, (scale,), (torch.ones(64),))
        ref.assert_bits(tangent, table(index))
        assert torch.equal(vmap(table)(index), table(index))
        assert not table(index).requires_grad


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_torch_func_and_compile(where: str) -> None:
    torch._dynamo.reset()
    layer = bnb.nn.Linear4bit(K, N, quant_type="nf4").to("cpu")
    x = rows(3)
    call = torch.compile(layer, backend="aot_eager") if where == "inside" else layer
    transformed = lambda x: jvp(call, (x,), (x / 2,))  # noqa: E731
    if where == "outside":
        transformed = torch.compile(transformed, backend="aot_eager")
    found, expected = transformed(x), jvp(layer, (x,), (x / 2,))
    for a, b in zip(found, expected, strict=True):
        ref.assert_bits(a.detach(), b.detach())


@pytest.mark.parametrize("kind", ["4bit", "8bit", "8bit floats"])
@pytest.mark.parametrize("shape", [(K,), (1, K), (3, K)], ids=str)
def test_forward_over_backward_without_torch_func(kind: str, shape: tuple[int, ...]) -> None:
    """A tangent that is batched while its tensor is not: 1-d products of torch itself fail for these."""
    layer: Any = bnb.nn.Linear4bit(K, N, quant_type="nf4")
    if kind != "4bit":
        layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=kind == "8bit floats")
    layer.to("cpu")
    x = torch.randn(shape)
    cubes = lambda x: (layer(x) ** 3).sum()  # noqa: E731
    options = {"vectorize": True, "outer_jacobian_strategy": "forward-mode"}
    found = torch.autograd.functional.hessian(cubes, x, **options)
    torch.testing.assert_close(found, torch.autograd.functional.hessian(cubes, x))


@pytest.mark.parametrize("make", [bnb.nn.Linear4bit, lambda k, n: bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False)])
def test_weights_without_their_scales(make: Any) -> None:
    """What torch.func gives in place of a weight is codes alone: the scales are the layer's, or it is an error."""
    first, second = make(K, N).to("cpu"), make(K, N).to("cpu")
    x = rows(3)
    codes = {"weight": first.weight.detach(), "bias": torch.zeros(N)}
    expected = functional_call(first, {"bias": torch.zeros(N)}, (x,))
    ref.assert_bits(functional_call(first, codes, (x,)), expected)
    ref.assert_bits(torch.func.functionalize(lambda x: functional_call(first, codes, (x,)))(x), expected)
    stacked = torch.func.stack_module_state([first, second])
    with pytest.raises(RuntimeError, match=r"weight is a batch of vmap and its scales are not"):
        vmap(lambda p, b: functional_call(first, (p, b), (x,)))(*stacked)
    ref.assert_bits(first(x).detach(), functional_call(first, {}, (x,)).detach())


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool) -> None:
    layer = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False).to("cpu")
    x = rows(3)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    ref.assert_bits(exported(x).detach(), layer(x).detach())
    assert type(layer.state.CB) is torch.Tensor and layer.state.CB.data_ptr() == layer.weight.data_ptr()


@pytest.mark.parametrize("make", [bnb.nn.Linear4bit, lambda k, n: bnb.nn.Linear8bitLt(k, n, has_fp16_weights=False)])
def test_a_weight_that_moves_to_where_it_is_outlives_a_transform(make: Any) -> None:
    """As PEFT moves it in a forward with DoRA."""
    layer, x = make(K, N).to("cpu"), rows(3)
    expected = layer(x).detach()

    def call(x: Tensor) -> Tensor:
        layer.weight = layer.weight.to("cpu")
        return layer(x)

    ref.assert_bits(jvp(call, (x,), (x,))[0].detach(), expected)
    grad(lambda x: call(x).sum())(x)
    ref.assert_bits(layer(x).detach(), expected)
