"""Operators and loaders take exactly as many bytes and scales as there are elements and blocks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from state_items import both_nestings, quantized, with_fields
from test_default_backend import on_other_device

import bitsandbytes as bnb
import bitsandbytes.functional as F
from bitsandbytes.nn import Linear4bit, Linear8bitLt, Params4bit
from bitsandbytes.nn.parametrize import replace_parameter_4bit, replace_parameter_4bit_prequantized

ops = torch.ops.bitsandbytes


def operator_calls() -> dict[str, tuple[list[Any], dict[int, str]]]:
    """Right arguments, and by their place the names of those whose size is given by the others."""
    n, k = 300, 96
    packed, state = quantized(False, n, k)
    nested_packed, nested = quantized(True, n, k)
    x, out = torch.randn(2, k), torch.empty(2, n)
    codes, state8 = F.quantize_blockwise(torch.randn(1000), blocksize=100)
    second = nested.state2
    product = [x, packed, [n, k], state.absmax, 64, "nf4", None, None, None, None]
    of_nested = [x, nested_packed, [n, k], second.absmax, 64, "nf4", None, nested.absmax, second.code, nested.offset]
    layout = bnb._ops_fourbit.linear_4bit_layout((n, k), 64, "nf4")
    whole = [packed, state.absmax, 64, "nf4", [n, k], torch.float32]
    blockwise = [codes, state8.absmax, state8.code, 100, torch.float32]
    vector = [x, packed, [n, k], state.absmax, state.code, 64]
    rows, scales, _ = F.int8_vectorwise_quant(torch.randn(6, k))
    return {
        "dequantize_4bit": (whole, {0: "A", 1: "absmax"}),
        "dequantize_4bit.out": ([*whole, torch.empty(n, k)], {0: "A", 1: "absmax"}),
        "gemm_4bit": (product, {1: "B", 3: "absmax"}),
        "gemm_4bit nested": (of_nested, {1: "B", 3: "absmax", 7: "absmax_8bit", 8: "absmax_code", 9: "absmax_offset"}),
        "linear_4bit": ([x, packed, state.absmax, layout, None], {1: "B", 2: "absmax"}),
        "linear_4bit.nested": (
            [x, nested_packed, second.absmax, layout, None, nested.absmax, second.code, nested.offset],
            {1: "B", 2: "absmax", 5: "absmax_8bit"},
        ),
        "gemv_4bit": (vector, {1: "B", 3: "absmax", 4: "code"}),
        "gemv_4bit.out": ([*vector, out], {1: "B", 3: "absmax"}),
        "dequantize_blockwise": (blockwise, {1: "absmax", 2: "code"}),
        "dequantize_blockwise.out": ([*blockwise, torch.empty(1000)], {1: "absmax", 2: "code"}),
        "int8_vectorwise_dequant": ([rows, scales], {1: "stats"}),
        "int8_linear": ([x, rows, scales, None, 0.0], {2: "SCB"}),
    }


@pytest.mark.parametrize("device", ["cpu", "meta", "other"])
@pytest.mark.parametrize("name", operator_calls())
def test_operators_take_exact_sizes_only(name: str, device: str) -> None:
    def call(args: list[Any]) -> Any:
        op, _, overload = name.split()[0].partition(".")
        if device == "other":
            return on_other_device(name.split()[0], *args)
        args = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        return getattr(getattr(ops, op), overload or "default")(*args)

    args, sized = operator_calls()[name]
    call(args)
    for at, argument in sized.items():
        right = args[at]
        flat = right.reshape(-1)
        for wrong in (torch.cat((flat, flat[:1])), flat[:-1], flat[: flat.numel() // 2], torch.cat((flat, flat))):
            with pytest.raises(ValueError, match=rf"{argument} (has|is) "):
                call([*args[:at], wrong, *args[at + 1 :]])
    if sized.get(1) == "B" or (sized.get(0) == "A" and "4bit" in name):  # a value cast of packed bytes doubles them
        at = 1 if sized.get(1) == "B" else 0
        with pytest.raises(ValueError, match=r"[AB] (has|is) \d+ bytes, expected"):
            call([*args[:at], args[at].to(torch.bfloat16), *args[at + 1 :]])


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_storage_items_are_filled_up(storage: torch.dtype) -> None:
    for n in (0, 1, 3, 15, 16, 17, 33, 100):
        x = torch.randn(n)
        packed, state = F.quantize_4bit(x, quant_storage=storage)
        F.dequantize_4bit(packed, state)
        with pytest.raises(ValueError, match=r"A (has|is)"):
            F.dequantize_4bit(torch.cat((packed, packed.new_zeros(1, 1))), state)


def longer(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat((packed, packed[:64]))


@both_nestings
def test_loaders_take_exact_sizes_only(nested: bool) -> None:
    packed, state = quantized(nested)
    stats = state.as_dict(packed=True)
    saved = {"weight": packed, **{f"weight.{k}": v for k, v in stats.items()}}
    for weight in (longer(packed), packed[:-1], packed.to(torch.bfloat16)):
        with pytest.raises(ValueError, match=r"data has \d+ bytes, expected 1920"):
            Params4bit.from_prequantized(weight, stats, device="cpu")
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=r"weight: .*\d+ bytes, expected 1920"):
                Linear4bit(96, 40, bias=False).load_state_dict({**saved, "weight": weight}, assign=assign)
        module = torch.nn.Linear(96, 40, bias=False)
        replace_parameter_4bit(module, "weight")
        with pytest.raises(RuntimeError, match=r"weight: .*\d+ bytes, expected 1920"):
            module.load_state_dict({**saved, "weight": weight})
        module = torch.nn.Linear(96, 40, bias=False)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        with pytest.raises(ValueError, match="weight has"):
            replace_parameter_4bit_prequantized(module, "weight", stats, torch.device("cpu"))
    for name in ("absmax", "nested_absmax", "quant_map", "nested_quant_map"):
        if name not in stats:
            continue
        for wrong in (torch.cat((stats[name], stats[name][:1])), stats[name][:-1]):
            with pytest.raises(RuntimeError, match=rf"weight: .*{name} has {wrong.numel()} elements"):
                Linear4bit(96, 40, bias=False).load_state_dict({**saved, f"weight.{name}": wrong})
    with pytest.raises(ValueError, match="absmax has 60 elements, expected 30"):
        F.QuantState.from_dict(with_fields(stats, blocksize=128), "cpu")


def test_int8_loaders_take_exact_sizes_only() -> None:
    layer = Linear8bitLt(32, 16, bias=False, has_fp16_weights=False).to("cpu")
    saved = layer.state_dict()
    for SCB in (saved["SCB"][:-1], torch.cat((saved["SCB"], saved["SCB"])), saved["SCB"][:0]):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match="SCB has shape"):
                copy.deepcopy(layer).load_state_dict({**saved, "SCB": SCB}, assign=assign)
    table = bnb.nn.Embedding8bit(12, 50).to("cpu")
    table.weight.SCB = table.weight.SCB.repeat(2)
    with pytest.raises(ValueError, match="SCB has 24 elements, expected 12"):
        table(torch.tensor([1]))
    table4 = bnb.nn.EmbeddingNF4(12, 64).to("cpu")
    for weight in (longer(table4.weight.data), table4.weight.data[:-1]):
        with pytest.raises(ValueError, match=r"weight has \d+ bytes, expected 384"):
            broken = copy.deepcopy(table4)
            broken.weight.data = weight
            broken(torch.tensor([1]))
