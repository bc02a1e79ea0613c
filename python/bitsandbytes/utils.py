"""Helpers around models and states."""

import json
import logging
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

logger = logging.getLogger(__name__)

LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {"row": 0, "col32": 1, "col_turing": 2, "col_ampere": 3}
INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING = {value: name for name, value in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.items()}


def pack_dict_to_tensor(source_dict: dict[str, Any]) -> torch.Tensor:
    """A dict as the uint8 tensor of its JSON text, so that safetensors can hold it."""
    return torch.tensor(list(json.dumps(source_dict).encode()), dtype=torch.uint8)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {key[:40]!r} twice")
        found[key] = value
    return found


def unpack_tensor_to_dict(tensor_data: torch.Tensor) -> dict[str, Any]:
    """The inverse of pack_dict_to_tensor.

    Raises:
        ValueError: the bytes are not the JSON text of a dict.
    """
    op = "unpack_tensor_to_dict"
    if tensor_data.dtype != torch.uint8:
        raise ValueError(f"{op}: tensor_data has dtype {tensor_data.dtype}, expected torch.uint8")
    if tensor_data.is_meta:
        raise ValueError(f"{op}: tensor_data is on the meta device, expected one that holds data")
    try:
        unpacked = json.loads(bytes(tensor_data.flatten().tolist()), object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError(f"{op}: tensor_data is not JSON text of a dict: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{op}: tensor_data is not JSON text: {error}") from error
    if not isinstance(unpacked, dict):
        raise ValueError(f"unpack_tensor_to_dict: tensor_data holds a {type(unpacked).__name__}, expected a dict")
    return unpacked


def find_outlier_dims(
    weight: torch.Tensor,
    reduction_dim: int = 0,
    zscore: float = 4.0,
    topk: int | None = None,
    rdm: bool = False,
) -> torch.Tensor:
    """Columns (reduction_dim 0) or rows (1) whose standard deviation stands out.

    Args:
        zscore: by so many standard deviations of the standard deviations.
        topk: the so many largest instead.
        rdm: so many random columns instead.

    Raises:
        ValueError: rdm without topk.
    """
    if rdm:
        if topk is None:
            raise ValueError("find_outlier_dims: topk is None, expected the number of random columns")
        return torch.randint(0, weight.shape[1], (topk,), device=weight.device)
    std = weight.float().std(reduction_dim)
    if topk is not None:
        return std.topk(topk).indices
    return ((std - std.mean()) / std.std() > zscore).nonzero().view(-1)


class OutlierTracer:
    """Finds the outlier columns of the inputs of all linear layers of a model, while it first runs."""

    _instance: ClassVar[Any] = None

    def __init__(self) -> None:
        raise RuntimeError("OutlierTracer: it is made once, expected OutlierTracer.get_instance()")

    def initialize(self, model: torch.nn.Module) -> None:
        """Forgets what it knew, and watches the linear layers of a model until each has run."""
        for hook in getattr(self, "hooks", []):
            hook.remove()
        self.hvalue2outlier_idx: dict[int, torch.Tensor] = {}
        linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        self.hooks = [m.register_forward_pre_hook(outlier_hook) for m in linears]
        self.initialized = True

    def is_initialized(self) -> bool:
        return getattr(self, "initialized", False)

    def get_hvalue(self, weight: torch.Tensor) -> int:
        """What tells one weight from another: the address of its storage."""
        return weight.untyped_storage().data_ptr()

    def get_outliers(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The outlier columns of the inputs of the layer with this weight; None if it did not run."""
        if not self.is_initialized():
            raise RuntimeError("OutlierTracer: no outliers are known, expected OutlierTracer.initialize(model)")
        return self.hvalue2outlier_idx.get(self.get_hvalue(weight))

    @classmethod
    def get_instance(cls) -> "OutlierTracer":
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
        return cls._instance


def outlier_hook(module: torch.nn.Module, input: tuple[torch.Tensor, ...]) -> None:
    """Before a linear layer first runs: notes columns that stand out, or have |x| > 6 in a twentieth of the rows."""
    if not isinstance(module, torch.nn.Linear):
        raise TypeError(f"outlier_hook: module is {type(module).__name__}, expected a torch.nn.Linear")
    tracer = OutlierTracer.get_instance()
    weight = tracer.get_hvalue(module.weight)
    if weight in tracer.hvalue2outlier_idx:  # a second run: all have been seen
        for hook in tracer.hooks:
            hook.remove()
        return
    rows = input[0].detach().reshape(-1, input[0].shape[-1])
    often = ((rows.abs() > 6).sum(0) > 0.05 * rows.shape[0]).nonzero().view(-1)
    tracer.hvalue2outlier_idx[weight] = torch.cat([find_outlier_dims(rows, zscore=3.0), often]).unique()


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
