"""Layers and parameters of 4 bits: when they quantize; copies, moves, pickles, state dicts and wrappers."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import reference as ref
import torch
from test_default_backend import on_other_device

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit

KINDS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
every_kind = pytest.mark.parametrize(("quant_type", "nested"), KINDS)
every_storage = pytest.mark.parametrize("storage", ref.STORAGES, ids=str)


def fresh(
    quant_type: str = "nf4", nested: bool = True, storage: torch.dtype = torch.uint8, bias: bool = True
) -> Linear4bit:
    options = {"compress_statistics": nested, "quant_type": quant_type, "quant_storage": storage}
    return Linear4bit(96, 40, bias=bias, compute_dtype=torch.float32, **options)


def made(*args: Any, **kwargs: Any) -> Linear4bit:
    return fresh(*args, **kwargs).to("cpu")


def weight_of(layer: Any) -> torch.Tensor:
    return F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def assert_same_layer(found: Linear4bit, expected: Linear4bit) -> None:
    a, b = found.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    for key, value in b.items():
        assert a[key].dtype == value.dtype and (ref.raw(a[key]) == ref.raw(value)).all(), key
    assert type(found.weight) is Params4bit and found.weight.quant_state == expected.weight.quant_state
    x = torch.linspace(-1, 1, 96)
    ref.assert_bits(found(x), expected(x))


# ---- when a weight is quantized


@every_storage
@every_kind
def test_first_move_quantizes(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    layer = fresh(quant_type, nested, storage)
    original, parameter = layer.weight.data.clone(), layer.weight
    assert not layer.weight.bnb_quantized and layer.weight.quant_state is None and layer.weight.dtype == torch.float32
    layer.to(torch.bfloat16)
    assert not layer.weight.bnb_quantized and layer.weight.dtype == torch.bfloat16, "a dtype alone does not quantize"
    layer.to("cpu")
    assert (
        layer.weight.bnb_quantized
        and layer.weight.dtype == storage
        and layer.weight.shape == (40 * 48 // storage.itemsize, 1)
    )
    assert layer.quant_state is layer.weight.quant_state and layer.weight.quant_state.nested == nested
    expected, state = F.quantize_4bit(
        original.bfloat16(), compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    assert (ref.raw(layer.weight) == ref.raw(expected)).all() and layer.weight.quant_state == state
    assert parameter.requires_grad is False


def test_unquantized_layer_says_what_to_do() -> None:
    for layer, x in (
        (fresh(), torch.ones(96)),
        (bnb.nn.EmbeddingNF4(4, 64), torch.tensor([1])),
        (bnb.nn.Embedding8bit(4, 64), torch.tensor([1])),
    ):
        with pytest.raises(RuntimeError, match=r"weight is not quantized, expected \.to\(device\)"):
            layer(x)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float16),
        lambda m: m.to("cpu", torch.float16),
    ],
)
@every_storage
def test_casting_a_module_leaves_packed_bytes_alone(cast: Any, storage: torch.dtype) -> None:
    layer = made(storage=storage)
    before = ref.raw(layer.weight).copy()
    cast(layer)
    assert layer.weight.dtype == storage and (ref.raw(layer.weight) == before).all()


def test_moving_again_keeps_the_bytes() -> None:
    layer = made(bias=False)
    expected = copy.deepcopy(layer)
    for move in (
        lambda: layer.to("cpu"),
        layer.cpu,
        lambda: layer.to(device="cpu", dtype=torch.float16),
        lambda: layer.to(torch.float32),
    ):
        move()
        assert_same_layer(layer, expected)


def test_meta_and_back() -> None:
    layer = made()
    moved = layer.weight.to("meta")
    assert moved.is_meta and type(moved) is Params4bit and not layer.weight.quant_state.absmax.is_meta
    back = Params4bit(layer.weight.data, requires_grad=False, **moved.__dict__).to("cpu")
    assert back.quant_state == layer.weight.quant_state
    on_meta = Linear4bit(96, 40, device="meta")
    assert on_meta.weight.is_meta and not on_meta.weight.bnb_quantized
    on_meta.weight = Params4bit(torch.randn(40, 96), requires_grad=False, **on_meta.weight.__dict__).to("cpu")
    assert on_meta.weight.bnb_quantized and on_meta.quant_state is on_meta.weight.quant_state


@pytest.mark.parametrize("name", ["quant_type", "quant_storage", "compute_dtype"])
def test_wrong_options_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Linear4bit(8, 8, **{name: "int3" if name == "quant_type" else torch.complex64})


# ---- copies


@every_storage
@every_kind
def test_copies_of_a_layer(quant_type: str, nested: bool, storage: torch.dtype) -> None:
    layer = made(quant_type, nested, storage)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False))
    for found in copies:
        assert_same_layer(found, layer)
        assert found.weight.data_ptr() != layer.weight.data_ptr()
        assert found.weight.module is found and found.quant_state is found.weight.quant_state is not layer.quant_state


def test_copy_of_a_fresh_layer_quantizes_for_itself() -> None:
    layer = fresh()
    found = copy.deepcopy(layer).to("cpu")
    assert (
        found.quant_state is found.weight.quant_state and layer.quant_state is None and not layer.weight.bnb_quantized
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_copies_of_a_parameter(quantized: bool) -> None:
    layer = made() if quantized else fresh()
    weight = layer.weight
    weight.note = "kept"
    for found in (
        copy.copy(weight),
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        Params4bit(weight.data, **weight.__dict__),
    ):
        assert (
            type(found) is Params4bit
            and torch.equal(found.data, weight.data)
            and found.quant_state == weight.quant_state
        )
        fields = ("blocksize", "compress_statistics", "quant_type", "quant_storage", "bnb_quantized", "requires_grad")
        assert all(getattr(found, f) == getattr(weight, f) for f in fields)
    assert copy.copy(weight).quant_state is weight.quant_state and copy.copy(weight).data_ptr() == weight.data_ptr()
    assert copy.deepcopy(weight).data_ptr() != weight.data_ptr() and copy.deepcopy(weight).module is layer
    assert copy.copy(weight).note == copy.deepcopy(weight).note == "kept"


def test_deepcopy_keeps_weights_tied() -> None:
    a, b = made(), made()
    b.weight = a.weight
    c, d = copy.deepcopy(torch.nn.ModuleList([a, b]))
    assert c.weight is d.weight and c.weight is not a.weight


def test_merging_as_peft_does() -> None:
    """Dequantize, add, and quantize again with what __dict__ says."""
    layer = made()
    merged = weight_of(layer) + 0.5
    kwargs = dict(layer.weight.__dict__, bnb_quantized=False, requires_grad=False)
    kwargs = {k: v for k, v in kwargs.items() if not k.startswith("_") and k != "data"}
    layer.weight = Params4bit(merged.to("cpu"), **kwargs).to("cpu")
    expected, state = F.quantize_4bit(merged, quant_type="nf4", compress_statistics=True)
    assert torch.equal(layer.weight.data, expected) and layer.weight.quant_state == state


def test_requantizing_keeps_the_options() -> None:
    data = torch.randn(40, 96)
    weight = Params4bit(
        data, blocksize=128, quant_type="nf4", quant_storage=torch.float16, compress_statistics=False
    ).to("cpu")
    assert (
        weight.quant_state.blocksize == weight.blocksize == 128
        and weight.dtype == torch.float16
        and not weight.quant_state.nested
    )
    assert Params4bit().shape == (0,)


# ---- splitting, and the attributes that FSDP reads


def test_chunk_and_split_keep_the_state() -> None:
    weight = made().weight
    for parts in (
        torch.chunk(weight, 2),
        weight.chunk(2),
        torch.split(weight, 960),
        weight.split(960),
        torch.split(weight, [960, 960], dim=0),
    ):
        assert isinstance(parts, tuple) and len(parts) == 2
        for part in parts:
            assert (
                type(part) is Params4bit
                and part.quant_state is weight.quant_state
                and part.bnb_quantized
                and part.shape == (960, 1)
            )
        assert torch.equal(torch.cat([p.data for p in parts]), weight.data)
    for plain in (weight.t(), weight.detach(), weight.data, weight.view(-1), weight.clone()):
        assert type(plain) is torch.Tensor


@every_kind
def test_attributes_follow_the_keys_of_the_state_dict(quant_type: str, nested: bool) -> None:
    layer = made(quant_type, nested)
    for key, value in layer.state_dict().items():
        found = layer
        for name in key.split("."):
            found = getattr(found, name)
        assert torch.equal(found, value), key
    state = layer.weight.quant_state
    assert layer.weight.offset is state.offset and layer.weight.state2 is state.state2
    assert hasattr(layer.weight, "nested_blocksize") == hasattr(layer.weight, "nested_dtype") == nested
    assert not hasattr(fresh().weight, "absmax") and not hasattr(layer.weight, "surprise")


def test_parameters_that_became_plain_tensors() -> None:
    """FSDP puts plain views of its flat buffer in the place of parameters."""
    layer = made()
    expected = copy.deepcopy(layer)
    plain = {name: parameter.data.clone() for name, parameter in layer.named_parameters()}
    for name, value in plain.items():
        delattr(layer, name)
        setattr(layer, name, value)
    x = torch.randn(3, 96)
    ref.assert_bits(layer(x), expected(x))
    bnb.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    assert type(layer.weight) is Params4bit and layer.weight.quant_state == expected.weight.quant_state
    assert torch.equal(layer.weight.data, expected.weight.data)


def test_functional_call_uses_the_weight_it_is_given() -> None:
    layer, other = made(bias=False), made(bias=False)
    x = torch.randn(3, 96)
    ref.assert_bits(torch.func.functional_call(layer, {"weight": other.weight}, (x,)), other(x))


# ---- state dicts


@every_storage
@every_kind
@pytest.mark.parametrize("target", ["fresh", "quantized", "meta"])
def test_loads_its_own_state(quant_type: str, nested: bool, storage: torch.dtype, target: str) -> None:
    layer = made(quant_type, nested, storage)
    into = fresh("fp4" if quant_type == "nf4" else "nf4", not nested)  # what the layer was made with gives way
    into = into.to("cpu") if target == "quantized" else into.to("meta") if target == "meta" else into
    parameter = into.weight
    result = into.load_state_dict(layer.state_dict(), strict=True, assign=target == "meta")
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_layer(into, layer)
    assert (into.weight is parameter) == (target != "meta") and into.quant_state is into.weight.quant_state
    if target != "meta":
        assert into.weight.data_ptr() != layer.weight.data_ptr()
    assert (
        into.weight.quant_type == quant_type
        and into.weight.compress_statistics == nested
        and into.weight.quant_storage == storage
    )


def test_loads_into_a_model() -> None:
    def model() -> torch.nn.Module:
        return torch.nn.Sequential(fresh(), torch.nn.LayerNorm(40), torch.nn.ModuleDict({"weight": Linear4bit(40, 24)}))

    source, target = model().to("cpu"), model()
    target.load_state_dict(source.state_dict(), strict=True)
    assert_same_layer(target[0], source[0])
    assert torch.equal(weight_of(target[2]["weight"]), weight_of(source[2]["weight"]))
    state = source.state_dict()
    assert [k for k in state if k.endswith("nested_absmax")] == [
        "0.weight.nested_absmax",
        "2.weight.weight.nested_absmax",
    ]


def test_unquantized_weights_load_and_are_quantized_after() -> None:
    layer, weight = fresh(), torch.randn(40, 96)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(40)})
    expected, state = F.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    layer.to("cpu")
    assert torch.equal(layer.weight.data, expected) and layer.weight.quant_state == state


STATE_ERRORS: dict[str, Any] = {
    "size mismatch": lambda d: Linear4bit(64, 40, compute_dtype=torch.float32).to("cpu").state_dict(),
    "absmax": lambda d: {k: v for k, v in d.items() if k != "weight.absmax"},
    "Missing key": lambda d: {k: v for k, v in d.items() if k != "bias"},
    "Unexpected key": lambda d: d | {"surprise": torch.ones(1)},
    "Missing key.*weight": lambda d: {k: v for k, v in d.items() if k != "weight"},
}


@pytest.mark.parametrize("message", STATE_ERRORS)
def test_wrong_states_are_refused(message: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        fresh().load_state_dict(STATE_ERRORS[message](made().state_dict()), strict=True)


def test_compute_dtype_is_settled_by_the_first_input() -> None:
    for dtype, expected in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, None)):
        layer = Linear4bit(96, 40).to("cpu")
        assert layer(torch.randn(2, 96, dtype=dtype)).dtype == dtype
        assert layer.compute_dtype == expected and layer.compute_type_is_set and layer.bias.dtype == dtype


# ---- embeddings


@pytest.mark.parametrize("dim", [64, 128, 96, 50])
@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@every_storage
def test_embedding_4bit(dim: int, dtype: torch.dtype, quant_type: str, storage: torch.dtype) -> None:
    """The rows of the dequantized table, to the bit, whole blocks or not."""
    layer = bnb.nn.Embedding4bit(12, dim, dtype=dtype, quant_type=quant_type, quant_storage=storage).to("cpu")
    index = torch.tensor([[0, 11, 3], [3, 7, 1]])
    found = layer(index)
    assert found.dtype == dtype and not found.requires_grad
    ref.assert_bits(found, weight_of(layer)[index])
    assert layer(index[:, :0]).shape == (2, 0, dim)
    for wrong in (torch.tensor([12]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            layer(wrong)


@pytest.mark.parametrize("dtype", ref.FLOATS, ids=str)
def test_embedding_8bit(dtype: torch.dtype) -> None:
    layer = bnb.nn.Embedding8bit(12, 50, dtype=dtype)
    original = layer.weight.data.clone().float()
    original[4] = 0
    layer.weight.data[4] = 0
    layer.to("cpu")
    scale = original.abs().amax(1)
    assert layer.weight.dtype == torch.int8 and torch.equal(layer.weight.SCB, scale)
    assert layer.weight.CB.data_ptr() == layer.weight.data_ptr()
    index = torch.arange(12).view(3, 4)
    found = layer(index)
    assert found.dtype == dtype
    ref.assert_bits(found, (layer.weight.data * (scale / 127)[:, None]).to(dtype)[index])
    assert ((found.view(12, 50).float() - original).abs() <= scale[:, None] / 127 * 0.51 + original.abs() * 2**-8).all()
    clone = copy.deepcopy(layer)
    assert (
        torch.equal(clone(index), found)
        and clone.weight.CB.data_ptr() == clone.weight.data_ptr() != layer.weight.data_ptr()
    )
    assert torch.equal(pickle.loads(pickle.dumps(layer))(index), found)
    assert torch.equal(layer.half()(index), found), "casting the module leaves the codes alone"


def test_embeddings_are_not_saved() -> None:
    for layer in (bnb.nn.EmbeddingNF4(4, 64), bnb.nn.EmbeddingFP4(4, 64), bnb.nn.Embedding8bit(4, 64)):
        with pytest.raises(NotImplementedError):
            layer.state_dict()


def test_int8_params_with_16_bit_weights_stay() -> None:
    weight = Int8Params(torch.randn(3, 4), has_fp16_weights=True).to("cpu")
    assert weight.dtype == torch.float32 and weight.CB is None and weight.requires_grad


# ---- wrong arguments


BAD_CALLS: dict[str, tuple[str, Any]] = {
    "blocksize is 48": ("quantize_4bit", lambda x: (x, 48, "nf4", torch.uint8)),
    "quant_type is 'int4'": ("quantize_4bit", lambda x: (x, 64, "int4", torch.uint8)),
    "quant_storage is torch.bool": ("quantize_4bit", lambda x: (x, 64, "nf4", torch.bool)),
    "A has dtype float64": ("quantize_4bit", lambda x: (x.double(), 64, "nf4", torch.uint8)),
    "code has size 16": ("quantize_blockwise", lambda x: (x, x[:16], 64)),
    "absmax has 0 elements": ("dequantize_4bit", lambda x: (x.byte()[:64], x[:0], 64, "nf4", [4, 32], torch.float32)),
    "absmax has 128 elements, expected 2": (
        "dequantize_4bit",
        lambda x: (x.byte()[:64], x, 64, "nf4", [4, 32], torch.float32),
    ),
    "A has 128 bytes, expected 64": (
        "dequantize_4bit",
        lambda x: (x.byte(), x[:2], 64, "nf4", [4, 32], torch.float32),
    ),
    "A has 10 bytes": ("dequantize_4bit", lambda x: (x.byte()[:10], x, 64, "nf4", [4, 32], torch.float32)),
    "dtype is torch.float64": ("dequantize_4bit", lambda x: (x.byte(), x, 64, "nf4", [4, 32], torch.float64)),
    r"shape is \[-4, -32\]": ("dequantize_4bit", lambda x: (x.byte(), x, 64, "nf4", [-4, -32], torch.float32)),
    "A has a last dimension of 128": ("gemm_4bit", lambda x: (x, x.byte(), [2, 64], x, 64, "nf4")),
    r"shapeB is \[64\]": ("gemm_4bit", lambda x: (x, x.byte(), [64], x, 64, "nf4")),
    "bias has size 128": ("gemm_4bit", lambda x: (x, x.byte(), [2, 128], x[:4], 64, "nf4", x)),
    "absmax_8bit is given": ("gemm_4bit", lambda x: (x, x.byte(), [2, 128], x[:4], 64, "nf4", None, x.byte())),
    "absmax_code is given": ("gemm_4bit", lambda x: (x, x.byte(), [2, 128], x[:4], 64, "nf4", None, None, x)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
@pytest.mark.parametrize("device", ["meta", "other"])
def test_wrong_arguments_are_named(message: str, device: str) -> None:
    """By fakes and by the default backend in the same words."""
    name, make = BAD_CALLS[message]
    x = torch.ones(128)
    with pytest.raises(ValueError, match=message):
        if device == "other":
            args = make(x)
            on_other_device(name, *args, *[None] * (10 - len(args) if name == "gemm_4bit" else 0))
        else:
            getattr(torch.ops.bitsandbytes, name)(*make(x.to("meta")))


def test_float64_input_is_computed_in_float32() -> None:
    linear = bnb.nn.Linear4bit(128, 64, quant_type="nf4").to("cpu")
    x = torch.randn(3, 128, dtype=torch.float64)
    y = linear(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, linear(x.float()).double())
