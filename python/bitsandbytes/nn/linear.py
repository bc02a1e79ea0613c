"""Linear layers over quantized weights."""

import logging
import threading
from typing import Any

import torch
from torch import Tensor

from .. import _checks as check
from .._derivatives import derivatives_wanted
from .._variants import fixed
from ..autograd._functions import MatMul4Bit
from ..functional import QuantState
from ..functional.cpu_layout import stored
from ..functional.fourbit import gemm_4bit
from .params import Int8Params, Params4bit

logger = logging.getLogger("bitsandbytes.nn.modules")  # by the public name, which programs silence

_casting = threading.Lock()  # of the threads that found a bias in another dtype
_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling


def weight_and_state(module: Any) -> tuple[Tensor, QuantState]:
    """The packed weight of a layer and how to read it; the layer kept the state if the weight lost it, as under FSDP.

    Raises:
        RuntimeError: there is none, as the layer never moved to a device.
    """
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = getattr(module, "quant_state", None)
        if state is None:
            name = type(module).__name__
            raise RuntimeError(f"{name}: weight is not quantized, expected .to(device) to be called on the layer first")
        if isinstance(weight, Params4bit):
            weight.quant_state = state
        refuse_stacked(module, weight, state.absmax)
    return weight, state


def refuse_stacked(module: Any, weight: Tensor, scales: Tensor) -> None:
    """Raises RuntimeError for weights of several layers, as torch.func.stack_module_state has them, with the scales of
    one."""
    is_batched = torch._C._functorch.is_batchedtensor
    if is_batched(weight) and not is_batched(scales):
        name = type(module).__name__
        raise RuntimeError(
            f"{name}: weight is a batch of vmap and its scales are not, expected quantized weights to stay out of the "
            f"parameters that are stacked"
        )


def bias_in(dtype: torch.dtype, bias: Tensor) -> Tensor:
    """A bias in the dtype of a product. A parameter is cast for good, unless a transform or a graph sees it."""
    if dtype not in check.FLOATS:
        return bias  # the operator names the input
    seen = _is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
    if type(bias) is torch.nn.Parameter and not seen:
        with _casting, torch.inference_mode(False):
            if bias.dtype is not dtype:
                bias.data = bias.data.to(dtype)
        return bias
    return bias.to(dtype)


def is_tied(weight: Tensor, rows: int, columns: int) -> bool:
    """Whether a layer took over the weight of a layer of floats; packed floats, as FSDP has them, are one column."""
    own = isinstance(weight, (Params4bit, Int8Params))
    return not own and weight.is_floating_point() and weight.shape == (rows, columns)


def linear_of_floats(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ W^T + bias with a weight that is tied to a layer of floats, in the dtype of the weight; y is like x."""
    bias = None if bias is None else bias.to(weight.dtype)
    return torch.nn.functional.linear(x.to(weight.dtype), weight, bias).to(x.dtype)


def fix_4bit_weight_quant_state_from_module(module: Any) -> None:
    """Gives a weight that lost its class or quant_state, as under FSDP, what its module kept."""
    weight, state = weight_and_state(module)
    if not isinstance(weight, Params4bit):
        weight = Params4bit(weight, quant_storage=module.quant_storage, bnb_quantized=True)
        module.weight = weight
    weight.quant_state = state


class Linear4bit(torch.nn.Linear):
    """A linear layer whose weight is stored in 4 bits and multiplied as stored (QLoRA, arXiv 2305.14314).

    The weight is quantized when the layer first moves to a device. Forward: y = x @ W^T + bias in compute_dtype,
    [..., K] -> [..., N], returned in the dtype of x; gradients reach x and bias. fp32 is computed in fp32.

    Args:
        input_features, output_features: K and N.
        compute_dtype: dtype of the product; by default that of the first input, where an fp64 one counts as fp32.
            After an fp16 one each product has the dtype of its input.
        compress_statistics: quantize the scales of the blocks too.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that packed bytes are stored as.
    """

    weight: Params4bit

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | int | None = None,
    ) -> None:
        name = type(self).__name__
        check.one_of(name, "quant_type", quant_type, check.QUANT_TYPES)
        check.one_of(name, "quant_storage", quant_storage, check.STORAGES)
        check.one_of(name, "compute_dtype", compute_dtype, (None, *check.FLOATS))
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.compute_dtype = compute_dtype
        self.compute_type_is_set = compute_dtype is not None
        self.quant_state: QuantState | None = None
        self.quant_storage = quant_storage
        self.support_avx512bf16_for_cpu = False  # the weight keeps its layout on every machine

    def set_compute_type(self, x: Tensor) -> None:
        """Settles compute_dtype by an input; fp16 leaves it as it is, with a warning if that is not a fast one."""
        if x.dtype in (torch.float32, torch.bfloat16, torch.float64):
            self.compute_dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
        elif x.dtype == torch.float16 and self.compute_dtype in (None, torch.float32) and not _is_compiling():
            slow = "inference" if x.numel() == x.shape[-1] else "inference or training speed"
            logger.warning(
                "Input type into Linear4bit is torch.float16, but bnb_4bit_compute_dtype=torch.float32 (default). "
                f"This will lead to slow {slow}."
            )

    def forward(self, x: Tensor) -> Tensor:
        # The dicts of torch.nn.Module, since going through its __getattr__ would cost as much as the product of a
        # small layer.
        parameters: dict[str, Any] = self._parameters
        weight: Any = parameters.get("weight")
        try:
            state: Any = weight.quant_state if type(weight) is Params4bit else None
        except AttributeError:  # deleted
            state = None
        if state is None:
            weight = self.weight
            if is_tied(weight, self.out_features, self.in_features):
                return linear_of_floats(x, weight, self.bias)
            weight, state = weight_and_state(self)
        if not self.compute_type_is_set:
            self.set_compute_type(x)
            self.compute_type_is_set = True
        dtype = x.dtype
        compute_dtype = self.compute_dtype
        if compute_dtype is None:
            compute_dtype = torch.float32 if dtype is torch.float64 else dtype
        if dtype is not compute_dtype:
            x = x.to(compute_dtype)
        try:
            bias: Any = parameters["bias"]
        except KeyError:  # a plain attribute, under wrappers
            bias = self.bias
        if bias is not None and bias.dtype is not compute_dtype:
            bias = bias.to(compute_dtype) if dtype is torch.float64 else bias_in(compute_dtype, bias)
        learns = _grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        if learns and not derivatives_wanted():
            y = MatMul4Bit.apply(x, weight, None, bias, state)
        else:
            y = gemm_4bit(x, weight, state, bias)
        return y if dtype is compute_dtype else y.to(dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        state = getattr(self.weight, "quant_state", None)
        if state is not None:
            if state.packing_format_for_cpu:
                destination[f"{prefix}weight"], state = stored(self.weight.data, state)
            for key, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """As torch.nn.Linear, and a packed weight with its state, into a quantized layer or a fresh one."""
        key = f"{prefix}weight"
        packed = state_dict.get(key)
        stats = {k: v for k, v in state_dict.items() if k.startswith(f"{key}.")}
        # Packed codes of the size of this layer's say nothing without their own statistics.
        alone = not stats and getattr(self.weight, "quant_state", None) is not None
        if isinstance(packed, Tensor) and (stats or (alone and packed.shape == self.weight.shape)):
            try:
                assign = local_metadata.get("assign_to_params_buffers", False)
                self._load_packed(packed, {k[len(key) + 1 :]: v for k, v in stats.items()}, assign)
            except ValueError as error:
                error_msgs.append(f"{key}: {error}")
            state_dict = {k: v for k, v in state_dict.items() if k not in stats and k != key}
            missing_before = len(missing_keys)
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            missing_keys[missing_before:] = [k for k in missing_keys[missing_before:] if k != key]
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _load_packed(self, packed: Tensor, stats: dict[str, Any], assign: bool) -> None:
        old = self.weight
        device = packed.device if assign or old.is_meta else old.device
        if not stats:
            raise ValueError("its absmax, quant_map and quant_state are missing, expected them beside packed codes")
        if layout := check.odd_layout(packed):
            raise ValueError(f"its layout is {layout}, expected a dense tensor")
        if packed.is_meta and device.type != "meta":
            raise ValueError(f"its tensor is on the meta device, expected one with data for {device}")
        state = QuantState.from_dict(stats, device)
        shape = (self.out_features, self.in_features)
        if state.shape != shape:
            raise ValueError(f"size mismatch: its shape is {tuple(state.shape or ())}, expected {shape}")
        state.check_codes("load_state_dict", "its tensor", packed)
        data = packed if assign else packed.to(device, copy=True)
        if isinstance(old, Params4bit) and old.device == device and not assign:
            old.data = data  # the same object, as load_state_dict promises
            old.module = self
            old._adopt(state)
        else:
            self.weight = Params4bit.from_prequantized(data, stats, device=device, module=self)


class LinearFP4(Linear4bit):
    """Linear4bit with FP4 weights."""

    __init__ = fixed(Linear4bit, quant_type="fp4")


class LinearNF4(Linear4bit):
    """Linear4bit with NF4 weights: quantiles of the normal distribution, which most weights follow."""

    __init__ = fixed(Linear4bit, quant_type="nf4")
