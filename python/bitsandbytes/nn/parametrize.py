"""4-bit parameters of any module, such as the stacked experts of a mixture, by torch.nn.utils.parametrize."""

import threading
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from .. import functional as F


@dataclass
class _Read:
    """What the forward calls of one module that are now running keep of one parameter."""

    calls: int = 0  # of this module, nested in one another
    value: Tensor | None = None
    packed: Tensor | None = None  # and the rest: what `value` was dequantized from
    state: F.QuantState | None = None
    kind: tuple[int | None, bool] = (None, False)


class _Reads(threading.local):
    """Per thread, so that no thread sees the parameters of another one's forward."""

    def __init__(self) -> None:
        self.open: dict[int, _Read] = {}  # by the id of the parametrization, which lives as long as its entry


_reads = _Reads()


class Bnb4bitParametrization(nn.Module):
    """Dequantizes the packed parameter each time it is read; within one forward of its module once."""

    def __init__(self, quant_state: F.QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        # A compiled graph has one dequantization of equal ones anyway.
        read = None if torch.compiler.is_compiling() else _reads.open.get(id(self))
        if read is None:
            return F.dequantize_4bit(quantized_param, self.quant_state)
        version = None if quantized_param.is_inference() else quantized_param._version
        kind = (version, torch.is_inference_mode_enabled())
        if (
            read.value is None
            or read.packed is not quantized_param
            or read.state is not self.quant_state
            or read.kind != kind
        ):
            read.value = F.dequantize_4bit(quantized_param, self.quant_state)
            read.packed, read.state, read.kind = quantized_param, self.quant_state, kind
        return read.value


def _parameter(op: str, module: nn.Module, param_name: str) -> nn.Parameter:
    name = type(module).__name__
    if not hasattr(module, param_name):
        raise AttributeError(f"{op}: Module does not have parameter '{param_name}', expected one of {name}")
    parameter = getattr(module, param_name)
    if not isinstance(parameter, nn.Parameter):
        found = type(parameter).__name__
        raise TypeError(f"{op}: Parameter '{param_name}' is not an instance of nn.Parameter but {found}, in {name}")
    return parameter


def replace_parameter_4bit_prequantized(
    module: nn.Module, param_name: str, qs_dict: dict[str, Any], device: torch.device
) -> None:
    """Lets a parameter that holds packed codes read as the tensor they stand for.

    Args:
        param_name: of a parameter of `module` whose data are packed codes.
        qs_dict: its state, as QuantState.as_dict gave it.
        device: where to put codes and state.

    Raises:
        AttributeError, TypeError: no such parameter. ValueError: qs_dict is no state.
    """
    original = _parameter("replace_parameter_4bit_prequantized", module, param_name)
    state = F.QuantState.from_dict(qs_dict, device=device)
    state.check_codes("replace_parameter_4bit_prequantized", param_name, original)
    _install(module, param_name, original.data.to(device), state)


def replace_parameter_4bit(
    module: nn.Module,
    param_name: str,
    compress_statistics: bool = False,
    quant_type: Literal["nf4", "fp4"] = "nf4",
    blocksize: int | None = None,
) -> None:
    """Quantizes a parameter of any shape to 4 bits in place; reading it dequantizes it, once per forward of the module.

    The state dict of the module then has the keys of Linear4bit, and load_state_dict takes them.

    Args:
        param_name: of a floating point parameter of `module`.
        compress_statistics, quant_type, blocksize: as in functional.quantize_4bit.

    Raises:
        AttributeError, TypeError: no such parameter. ValueError: a wrong argument.
    """
    original = _parameter("replace_parameter_4bit", module, param_name)
    packed, state = F.quantize_4bit(
        original.data, blocksize=blocksize, compress_statistics=compress_statistics, quant_type=quant_type
    )
    _install(module, param_name, packed, state)


def _install(module: nn.Module, param_name: str, packed: Tensor, state: F.QuantState) -> None:
    setattr(module, param_name, nn.Parameter(packed, requires_grad=False))
    # unsafe: the packed codes differ in shape and dtype from what they stand for.
    P.register_parametrization(module, param_name, Bnb4bitParametrization(state), unsafe=True)
    _register_parametrization_hooks(module, param_name)


def _open_read(module: Any, inputs: tuple[Any, ...], *, param_name: str) -> None:
    if torch.compiler.is_compiling() or (parametrization := _parametrization(module, param_name)) is None:
        return
    _reads.open.setdefault(id(parametrization), _Read()).calls += 1


def _close_read(module: Any, inputs: tuple[Any, ...], output: Any, *, param_name: str) -> None:
    """Runs after each forward, also one that failed; even if a hook before _open_read did, so there may be no entry."""
    if torch.compiler.is_compiling() or (parametrization := _parametrization(module, param_name)) is None:
        return
    read = _reads.open.get(id(parametrization))
    if read is not None:
        read.calls -= 1
        if read.calls == 0:
            del _reads.open[id(parametrization)]


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    module.register_state_dict_post_hook(partial(_parametrized_state_dict_post_hook, param_name=param_name))
    module.register_load_state_dict_pre_hook(partial(_load_hook, param_name=param_name))
    # always_call: activation checkpointing ends a forward by an exception.
    module.register_forward_pre_hook(partial(_open_read, param_name=param_name), prepend=True)
    module.register_forward_hook(partial(_close_read, param_name=param_name), always_call=True)


def _parametrized_state_dict_post_hook(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    *,
    param_name: str = "weight",
    **kwargs: Any,
) -> None:
    original = f"{prefix}parametrizations.{param_name}.original"
    if original not in state_dict:
        return
    key = f"{prefix}{param_name}"
    state_dict[key] = state_dict.pop(original)
    parametrization = _parametrization(module, param_name)
    assert parametrization is not None  # it has the original
    state_dict.update({f"{key}.{k}": v for k, v in parametrization.quant_state.as_dict(packed=True).items()})


def _load_hook(
    module: Any,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
    *,
    param_name: str,
) -> None:
    """Turns the keys of the hook above back into those that parametrize expects."""
    key = f"{prefix}{param_name}"
    stats = {k[len(key) + 1 :]: state_dict.pop(k) for k in list(state_dict) if k.startswith(f"{key}.")}
    if key not in state_dict or not stats:
        return
    packed = state_dict.pop(key)
    state_dict[f"{prefix}parametrizations.{param_name}.original"] = packed
    original = module.parametrizations[param_name].original
    try:
        state = F.QuantState.from_dict(stats, original.device)
        state.check_codes("load_state_dict", "its tensor", packed)
    except ValueError as error:
        error_msgs.append(f"{key}: {error}")
        return
    parametrization = _parametrization(module, param_name)
    assert parametrization is not None
    parametrization.quant_state = state
    if original.shape != packed.shape or original.dtype != packed.dtype:
        original.data = torch.empty_like(packed, device=original.device)


def _parametrization(module: Any, param_name: str) -> Bnb4bitParametrization | None:
    """None once it was removed from the module, whose hooks stay."""
    if not P.is_parametrized(module, param_name):
        return None
    return next((p for p in module.parametrizations[param_name] if isinstance(p, Bnb4bitParametrization)), None)
