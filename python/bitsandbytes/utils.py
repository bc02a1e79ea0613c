"""Helpers around models and states."""

import json
import logging
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

logger = logging.getLogger(__name__)

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {value: name for name, value in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> torch.Tensor:
    """A dict as the uint8 tensor of its JSON text, so that safetensors can hold it."""
    return torch.tensor(list(json.dumps(source_dict).encode()), dtype=torch.uint8)


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> dict[str, Any]:
    """The inverse of pack_dict_to_tensor.

    Raises:
        ValueError: the bytes are not the JSON text of a dict.
    """
    if tensor_data.dtype != torch.uint8:
        raise ValueError(f"unpack_tensor_to_dict: tensor_data has dtype {tensor_data.dtype}, expected torch.uint8")
    try:
        unpacked = json.loads(bytes(tensor_data.flatten().tolist()))
    except ValueError as error:
        raise ValueError(f"unpack_tensor_to_dict: tensor_data is not JSON text: {error}") from error
    if not isinstance(unpacked, dict):
        raise ValueError(f"unpack_tensor_to_dict: tensor_data holds a {type(unpacked).__name__}, expected a dict")
    return unpacked


def replace_linear(
    model: torch.nn.Module,
    linear_replacement: type[torch.nn.Module],
    skip_modules: Sequence[str] = ("lm_head",),
    copy_weights: bool = False,
    post_processing_function: str | None = None,
) -> torch.nn.Module:
    """Replaces every torch.nn.Linear of a model, in place, and returns the model.

    Args:
        linear_replacement: called with (in_features, out_features, bias).
        skip_modules: names, without their path, to leave alone.
        copy_weights: let the new module take over the weight and bias parameters.
        post_processing_function: name of a method of the new module, called with it.
    """
    for name, module in model.named_children():
        if next(module.children(), None) is not None:
            replace_linear(module, linear_replacement, skip_modules, copy_weights, post_processing_function)
        if not isinstance(module, torch.nn.Linear) or name in skip_modules:
            continue
        new = linear_replacement(module.in_features, module.out_features, module.bias is not None)
        model._modules[name] = new
        if copy_weights:
            new.weight = module.weight
            new.bias = module.bias
        if post_processing_function is not None and (function := getattr(new, post_processing_function, None)):
            function(new)
    return model


def execute_and_return(command_string: str) -> tuple[str, str]:
    """Runs a command, without a shell, and returns its stdout and stderr without the last newline."""
    done = subprocess.run(shlex.split(command_string), capture_output=True, text=True, check=False)
    return done.stdout.removesuffix("\n"), done.stderr.removesuffix("\n")


def sync_gpu(t: torch.Tensor) -> None:
    """Waits for the device of a tensor; nothing to wait for on the CPU."""
    if t.device.type != "cpu":
        torch.accelerator.synchronize(t.device)
