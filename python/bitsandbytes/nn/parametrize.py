"""4-bit parameters of any module, such as the stacked experts of a mixture, by torch.nn.utils.parametrize."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.utils.parametrize as P
from torch import Tensor, nn

from .. import functional as F


class Bnb4bitParametrization(nn.Module):
    """Dequantizes the packed parameter each time it is read."""

    def __init__(self, quant_state: F.QuantState) -> None:
        super().__init__()
        self.quant_state = quant_state

    @torch.no_grad()
    def forward(self, quantized_param: Tensor) -> Tensor:
        return F.dequantize_4bit(quantized_param, self.quant_state)


def _parameter(op: str, module: nn.Module, param_name: str) -> nn.Parameter:
    if not hasattr(module, param_name):
        raise AttributeError(f"{op}: param_name is {param_name!r}, expected a parameter of {type(module).__name__}")
    parameter = getattr(module, param_name)
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"{op}: {param_name} is {type(parameter).__name__}, expected an instance of nn.Parameter")
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


def _enable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    P._cache_enabled += 1


def _disable_parametrization_cache(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
    P._cache_enabled -= 1
    if not P._cache_enabled:
        P._cache = {}


def _register_parametrization_hooks(module: nn.Module, param_name: str) -> None:
    module.register_state_dict_post_hook(partial(_parametrized_state_dict_post_hook, param_name=param_name))
    module.register_load_state_dict_pre_hook(partial(_load_hook, param_name=param_name))
    # Within one forward a parameter that is read twice is dequantized once.
    module.register_forward_pre_hook(_enable_parametrization_cache)
    module.register_forward_hook(_disable_parametrization_cache, always_call=True)


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
    state = _parametrization(module, param_name).quant_state
    state_dict.update({f"{key}.{k}": v for k, v in state.as_dict(packed=True).items()})


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
    except ValueError as error:
        error_msgs.append(f"{key}: {error}")
        return
    _parametrization(module, param_name).quant_state = state
    if original.shape != packed.shape or original.dtype != packed.dtype:
        original.data = torch.empty_like(packed, device=original.device)


def _parametrization(module: Any, param_name: str) -> Bnb4bitParametrization:
    return next(p for p in module.parametrizations[param_name] if isinstance(p, Bnb4bitParametrization))
