"""Derivatives of the operators themselves, of any order, forward and backward, also under torch.func.

A product y = A @ W^T + bias is linear in A and in bias, whatever its kernel rounds: gradients and tangents are products
of floats with the dequantized W. What has no derivative is an error where one is asked for, never a zero; codes and
scales that an operator makes are constants for the backward pass.

The private operators *.forward have none of this: they are for callers who looked at derivatives_wanted() first.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function

from ._ops import SCHEMAS
from ._ops_fourbit import Gemm4bit, Gemv4bit, read_linear_4bit, weight_of_gemm_4bit, weight_of_gemv_4bit
from ._ops_int8 import as_rows

_ops = torch.ops.bitsandbytes
_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active


def derivatives_wanted() -> bool:
    """Whether a transform of torch.func or forward-mode AD is on: tensors may then carry derivatives without
    requires_grad."""
    return _functorch_active() or forward_ad._current_level >= 0


def _weight_of_gemm_4bit(dtype: torch.dtype, args: Sequence[Any]) -> Tensor:
    return weight_of_gemm_4bit(Gemm4bit(*args), dtype)


def _weight_of_linear_4bit(dtype: torch.dtype, args: Sequence[Any]) -> Tensor:
    return weight_of_gemm_4bit(read_linear_4bit(*args), dtype)


def _weight_of_gemv_4bit(dtype: torch.dtype, args: Sequence[Any]) -> Tensor:
    return weight_of_gemv_4bit(Gemv4bit(*args), dtype)


def _weight_of_int8_linear(dtype: torch.dtype, args: Sequence[Any]) -> Tensor:
    _, CB, SCB, *_ = args
    return _ops.int8_vectorwise_dequant.default(CB, SCB).to(dtype)


# Operators A @ W^T + bias whose first argument is A: how to make W of their arguments, and which of them is bias.
_PRODUCTS: dict[str, tuple[Callable[[torch.dtype, Sequence[Any]], Tensor], int | None]] = {
    "gemm_4bit": (_weight_of_gemm_4bit, Gemm4bit._fields.index("bias")),
    "gemv_4bit": (_weight_of_gemv_4bit, None),
    "linear_4bit": (_weight_of_linear_4bit, 4),
    "linear_4bit.nested": (_weight_of_linear_4bit, 4),
    "int8_linear": (_weight_of_int8_linear, 3),
}
_MAKE_CONSTANTS = {"quantize_4bit", "quantize_blockwise", "int8_vectorwise_quant", "int8_double_quant"}


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(_ops, packet), overload or "default")


class _Rule(torch.autograd.function._SingleLevelFunction):
    """What one level of autograd does with an operator: torch.func peels its levels off one by one above this."""

    name: str
    op: Any
    makes_constants: bool

    @staticmethod
    def forward(rule: "type[_Rule]", keys: Any, *args: Any) -> Any:
        # The levels below this one still need their derivatives.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), _below_autograd():
            return rule.op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rule, _, *args = inputs
        ctx.rule, ctx.args = rule, args  # not saved: a weight may have been made under inference_mode
        ctx.set_materialize_grads(False)
        if rule.makes_constants:
            ctx.mark_non_differentiable(*(t for t in output if t is not None))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        rule, args = ctx.rule, ctx.args
        (grad, *_) = grads
        found: list[Tensor | None] = [None] * len(args)
        if grad is not None:
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
            rule.refuse("gradient", wanted)
            weight_of, bias = _PRODUCTS[rule.name]
            for i in wanted:
                if i == bias:
                    found[i] = as_rows(grad).sum(0, dtype=args[i].dtype).view(args[i].shape)
                else:
                    found[i] = (as_rows(grad) @ weight_of(grad.dtype, args)).view(args[i].shape)
        return None, None, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        rule, args = ctx.rule, ctx.args
        given = [i for i, t in enumerate(tangents[2:]) if isinstance(t, Tensor)]
        rule.refuse("tangent", given)
        weight_of, bias = _PRODUCTS[rule.name]
        A, weight = args[0], weight_of(args[0].dtype, args)
        tangent = A.new_zeros((*A.shape[:-1], weight.shape[0]))
        for i in given:
            t = tangents[2 + i].to(A.dtype)
            tangent = tangent + (t.view(-1) if i == bias else torch.matmul(t, weight.t()))
        return tangent

    @classmethod
    def refuse(cls, what: str, arguments: list[int]) -> None:
        """An error for the first of these arguments that the operator has no derivative for."""
        known = (0, _PRODUCTS[cls.name][1]) if cls.name in _PRODUCTS else ()
        for i in arguments:
            if i not in known:
                argument = cls.op._schema.arguments[i].name
                allowed = ", ".join(cls.op._schema.arguments[j].name for j in known if j is not None)
                expected = f"one for {allowed} only" if known else "a detached tensor, as it has no derivative"
                raise NotImplementedError(f"{cls.name}: {argument} has a {what}, expected {expected}")


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def _register(name: str) -> None:
    """An implementation for autograd, which costs a call that needs no derivative 5 us."""
    op = _overload(name)
    constants = name in _MAKE_CONSTANTS
    rule: Any = type(f"{name}_rule", (_Rule,), {"name": name, "op": op, "makes_constants": constants})
    mutates = op._schema.is_mutable

    def autograd(keys: Any, *args: Any) -> Any:
        learns = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if mutates:
            for i, value in enumerate(args):
                if _has_tangent(value):
                    rule.refuse("tangent", [i])
                if learns and isinstance(value, Tensor) and value.requires_grad:
                    rule.refuse("gradient", [i])
        elif derivatives_wanted() or (learns and not constants):
            with enable_single_level_autograd_function():
                return rule.apply(rule, keys, *args)
        with _below_autograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def _register_vmap(name: str) -> None:
    op = _overload(name)

    def batched(info: Any, dims: tuple[int | None, ...], *args: Any) -> Any:
        at = [dim if isinstance(dim, int) else None for dim in dims]  # of a list of sizes it is a list
        # With a threshold, an outlier in one row counts for all rows of its product.
        rows_are_alone = name in _PRODUCTS and not (name == "int8_linear" and len(args) > 4 and args[4] > 0)
        if rows_are_alone and at[0] is not None and at[1:] == [None] * (len(at) - 1):
            return op(args[0].movedim(at[0], 0), *args[1:]), 0
        results = [
            op(*(a if dim is None else a.select(dim, i) for a, dim in zip(args, at, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        parts = [None if part[0] is None else torch.stack(part) for part in zip(*results, strict=True)]
        return tuple(parts), tuple(None if part is None else 0 for part in parts)

    torch.library.register_vmap(f"bitsandbytes::{name}", batched, lib=_library)


_library = torch.library.Library("bitsandbytes", "IMPL")
for _name in SCHEMAS:
    if _name.endswith("forward") or _name.startswith("optimizer"):
        continue
    _register(_name)
    if not _overload(_name)._schema.is_mutable:
        _register_vmap(_name)
