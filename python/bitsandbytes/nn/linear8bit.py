"""Linear layers over int8 weights (LLM.int8(), arXiv 2208.07339)."""

import copy
import threading
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from typing_extensions import Self

from .. import _checks as check
from .. import _ops_int8
from .._derivatives import derivatives_wanted
from ..autograd._functions import MatMul8bitLt, MatmulLtState, int8_product, quantized_rows
from ..utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer
from .linear import bias_in, is_tied, linear_of_floats, refuse_stacked
from .params import Int8Params, has_memory, same_memory

_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_in_dynamo = torch.compiler.is_dynamo_compiling
_float64 = torch.float64
_int8_linear = torch.ops.bitsandbytes.int8_linear.default
_int8_forward = torch.ops.bitsandbytes.int8_linear.forward
_agreeing = threading.Lock()  # of the threads that found a weight and its state changed; it is not held in a product

_NOT_QUANTIZED = "Loading a quantized checkpoint into non-quantized Linear8bitLt is not supported"


def _tile_offsets(layout: str) -> Tensor:
    """Where each element of a tile of 32 columns is stored in it, [rows, 32], in the layouts of earlier versions, which
    are cuBLASLt's COL32, COL4_4R2_8C and COL32_2R_4R4."""
    rows = {"col32": 1, "col_turing": 8, "col_ampere": 32}[layout]
    row, col = torch.arange(rows)[:, None], torch.arange(32)[None, :]
    if layout == "col_turing":
        return (row % 2 * 4 + col // 8) * 32 + (col % 8 // 4 * 4 + row // 2) * 4 + col % 4
    if layout == "col_ampere":
        return ((row % 8 // 2 * 4 + row // 8) * 2 + row % 2) * 32 + col
    return row * 32 + col


def rows_from_tiles(stored: Tensor, layout: str) -> Tensor:
    """A matrix by rows from one in tiles, which follow each other down the rows first. Its sizes are whole tiles."""
    offsets = _tile_offsets(layout).to(stored.device)
    rows, columns = stored.shape
    if rows % offsets.shape[0] or columns % 32:
        raise ValueError(
            f"size mismatch: its shape is {(rows, columns)}, expected whole tiles of {tuple(offsets.shape)}"
        )
    tiles = stored.reshape(columns // 32, rows // offsets.shape[0], offsets.numel())
    return tiles[:, :, offsets].permute(1, 2, 0, 3).reshape(rows, columns)


def maybe_rearrange_weight(
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Before a state is loaded: takes out its weight_format, and brings a weight of an earlier layout into rows.

    Raises:
        ValueError: an unknown layout.
    """
    weight = state_dict.get(f"{prefix}weight")
    if weight is None:
        return
    layout = state_dict.pop(f"{prefix}weight_format", "row")
    if isinstance(layout, Tensor) and layout.numel() == 1 and layout.device.type != "meta":
        layout = layout.item()
    if isinstance(layout, int):
        layout = INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING.get(layout, layout)
    if not isinstance(layout, str) or layout not in LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING:
        known = ", ".join(LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING)
        raise ValueError(f"{prefix}weight_format is {layout!r}, expected one of {known}")
    if layout != "row":
        state_dict[f"{prefix}weight"] = rows_from_tiles(weight, layout)


class Linear8bitLt(torch.nn.Linear):
    """A linear layer whose products are computed in int8: y = x @ W^T + bias, [..., K] -> [..., N], in the dtype of x.

    The rows of x are quantized for each product; its columns with outliers are computed as floats. Gradients reach x,
    bias, and the weight if it is stored as floats.

    Args:
        input_features, output_features: K and N.
        has_fp16_weights: keep the weight as floats, which can learn, and quantize it for each product. Otherwise it
            becomes int8 when the layer first moves to a device.
        threshold: columns of x with |x| >= threshold are outliers; 0 for none.
        index: kept for programs that name it.
    """

    weight: Int8Params

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        _ops_int8.check_threshold(type(self).__name__, threshold)
        super().__init__(input_features, output_features, bias, device)
        self.state = MatmulLtState()
        self.index = index
        self.state.threshold = threshold
        self.state.has_fp16_weights = has_fp16_weights
        self.state.use_pool = threshold > 0.0 and not has_fp16_weights
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)

    def init_8bit_state(self) -> None:
        """Makes weight and state agree: codes and scales that were given to the weight count, or those that were given
        to the state. What the weight has is shown in the state, what it handed over stays there."""
        weight, state = self.weight, self.state
        CB, SCB = getattr(weight, "CB", None), getattr(weight, "SCB", None)
        if weight.is_floating_point() and (CB is None or state.has_fp16_weights):
            return
        if CB is not None and (not isinstance(CB, Tensor) or CB.dtype != torch.int8):
            found = f"has dtype {CB.dtype}" if isinstance(CB, Tensor) else f"is {type(CB).__name__}"
            raise TypeError(f"{type(self).__name__}: weight.CB {found}, expected int8 codes or None")
        shown_CB, shown_SCB = state._shown
        replaced = (CB is not None and CB is not shown_CB) or (SCB is not None and SCB is not shown_SCB)
        if not replaced and isinstance(weight, Int8Params):
            if state.CB is not None and state.CB is not shown_CB:
                weight.CB = state.CB
                if CB is None:
                    weight.CB = None
                CB = state.CB
            if state.SCB is not None and state.SCB is not shown_SCB:
                if SCB is not None:
                    weight.SCB = state.SCB
                SCB = state.SCB
        if CB is None:
            CB = weight.data if state.CB is None or not same_memory(state.CB, weight) else state.CB
        SCB = state.SCB if SCB is None else SCB
        state._shown = CB, SCB
        state.CB, state.SCB = CB, SCB

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.init_8bit_state()
        super()._apply(fn, recurse)
        weight, state = self.weight, self.state
        if weight.dtype == torch.int8 and not weight.is_meta:
            state.CB = None  # that of the moved data
            if state.SCB is not None:
                state.SCB = state.SCB.to(weight.device)
        self.init_8bit_state()
        return self

    def forward(self, x: Tensor) -> Tensor:
        # The dicts of torch.nn.Module, as its __getattr__ would cost as much as the product of a small layer.
        parameters: dict[str, Any] = self._parameters
        try:
            weight: Any = parameters["weight"]
            bias: Any = parameters["bias"]
        except KeyError:  # plain attributes, under wrappers
            weight, bias = self.weight, self.bias
        state = self.state
        state.is_training = self.training
        dtype = x.dtype
        if dtype is _float64:
            x = x.float()
            if bias is not None and bias.dtype is _float64:
                bias = bias.float()
        elif bias is not None and bias.dtype is not dtype:
            bias = bias_in(dtype, bias)
        SCB = CB = None
        if type(weight) is Int8Params:
            if _in_dynamo():
                SCB, CB = weight.SCB, state.CB
            else:
                known = weight.__dict__
                SCB, CB = known.get("SCB"), known.get("CB")
        if SCB is None or SCB is not state.SCB or CB is not state.CB:
            weight, SCB = self._prepare(weight)
            if SCB is None:
                y = self._multiply_floats(x, weight, bias)
                return y if dtype is not _float64 else y.double()
        if _functorch_active() or forward_ad._current_level >= 0:  # derivatives_wanted(), without its call
            y = _int8_linear(x, weight, SCB, bias, state.threshold)
        elif _grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            if weight.is_floating_point():  # its data were replaced; the operators below look at it themselves
                raise TypeError(
                    f"Linear8bitLt: weight has dtype {weight.dtype}, expected int8: .to(device) quantizes it"
                )
            y = MatMul8bitLt.apply(x, weight, None, bias, state)
        else:
            y = _int8_forward(x, weight, SCB, bias, state.threshold)
        return y if dtype is not _float64 else y.double()

    def _prepare(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The weight to multiply with and its scales, None for floats, where weight or state were changed."""
        state = self.state
        if weight.is_floating_point() and (state.has_fp16_weights or getattr(weight, "CB", None) is None):
            return weight, None
        if not _in_dynamo() and has_memory(weight):
            with _agreeing:
                self.init_8bit_state()
        SCB = getattr(weight, "SCB", None)
        SCB = state.SCB if SCB is None else SCB
        if SCB is None:
            raise RuntimeError("Linear8bitLt: weight.SCB is None, expected the scales of a weight of dtype int8")
        if weight.is_meta and state.CB is not None:  # only the codes were given
            weight = state.CB
        refuse_stacked(self, weight, SCB)
        return weight, SCB

    def _multiply_floats(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With a weight that learns or was never moved, quantized now; one tied to another layer is used as it is."""
        state = self.state
        if not state.has_fp16_weights and is_tied(weight, self.out_features, self.in_features):
            return linear_of_floats(x, weight, bias)
        if derivatives_wanted():
            return int8_product(x, weight, bias, state.threshold)
        if _grad_enabled() and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            now = MatmulLtState()  # of this call: other threads have their own
            now.threshold = state.threshold
            y = MatMul8bitLt.apply(x, weight, None, bias, now)
            CB, SCB = now.CB, now.SCB
        else:
            CB, SCB = quantized_rows(weight)
            y = _int8_forward(x, CB, SCB, bias, state.threshold)
        state.CB, state.SCB = CB, SCB
        return y

    def __getstate__(self) -> dict[str, Any]:
        self.init_8bit_state()
        state = copy.copy(self.state)
        state.CB, state._shown = None, (None, None)  # the weight's, which a pickle would store twice
        if getattr(self.weight, "SCB", None) is not None or self.weight.is_floating_point():
            state.SCB = None
        return {**self.__dict__, "state": state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.init_8bit_state()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.init_8bit_state()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        SCB = self.state.SCB if getattr(weight, "SCB", None) is None else weight.SCB
        if weight.dtype == torch.int8 and SCB is not None:
            destination[f"{prefix}SCB"] = SCB if keep_vars else SCB.detach()
            row = LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING["row"]
            destination[f"{prefix}weight_format"] = torch.tensor(row, dtype=torch.uint8)

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
        """As torch.nn.Linear; codes and scales go into a quantized layer, or replace the weight under `assign`."""
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        key, scales_key = f"{prefix}weight", f"{prefix}SCB"
        stored = state_dict.get(key)
        try:
            maybe_rearrange_weight(state_dict, prefix, *args)
        except ValueError as error:
            error_msgs.append(str(error))
            return
        weight: Any = state_dict.get(key)
        SCB: Any = state_dict.get(scales_key)
        self.init_8bit_state()
        if not isinstance(weight, Tensor) or torch.int8 not in (weight.dtype, self.weight.dtype):
            if SCB is not None:
                found = "the weight is floats" if isinstance(weight, Tensor) else "there is no weight"
                error_msgs.append(f"{scales_key}: {_NOT_QUANTIZED}: {found}, expected no scales")
            super()._load_from_state_dict(state_dict, prefix, *args)
            return
        if weight is not stored:
            weight = weight[: self.out_features, : self.in_features].contiguous()  # tiles were filled up
        assign = local_metadata.get("assign_to_params_buffers", False)
        wrong = self._wrong_codes(weight, SCB, assign)
        if wrong:
            error_msgs.append(f"{key}: {wrong}")
            return
        rest = {k: v for k, v in state_dict.items() if k not in (key, scales_key)}
        missing_before = len(missing_keys)
        super()._load_from_state_dict(rest, prefix, *args)
        missing_keys[missing_before:] = [k for k in missing_keys[missing_before:] if k != key]
        if assign:
            self.weight = Int8Params(weight.detach(), requires_grad=False, SCB=SCB.detach().float())
        elif not self.weight.is_meta:
            with torch.no_grad():
                self.weight.copy_(weight)
                self.weight.SCB = SCB.detach().to(self.weight.device, torch.float32, copy=True)
        self.init_8bit_state()

    def _wrong_codes(self, weight: Tensor, SCB: Any, assign: bool) -> str:
        """What is wrong with a weight to be loaded, if it or the weight of this layer is int8."""
        shape = (self.out_features, self.in_features)
        for name, value in (("", weight), ("SCB: ", SCB)):
            if isinstance(value, Tensor) and (layout := check.odd_layout(value)):
                return f"{name}its layout is {layout}, expected a dense tensor"
        if weight.shape != shape:
            return f"size mismatch: its shape is {tuple(weight.shape)}, expected {shape}"
        if weight.dtype != torch.int8:
            return f"its dtype is {weight.dtype}, expected torch.int8 for a quantized layer"
        if not assign and self.weight.dtype != torch.int8:
            found = "its dtype is torch.int8"
            return (
                f"{_NOT_QUANTIZED}: {found}, expected a layer that was quantized by .to(device) first, or assign=True"
            )
        if not isinstance(SCB, Tensor) or SCB.shape != shape[:1]:
            found = f"has shape {tuple(SCB.shape)}" if isinstance(SCB, Tensor) else "is missing"
            return f"SCB {found}, expected {self.out_features} scales"
        for name, value in (("", weight), ("SCB: ", SCB)):
            if value.is_meta and not self.weight.is_meta:
                return f"{name}it is on the meta device, expected a tensor with data"
        if not SCB.is_floating_point():
            return f"SCB: its dtype is {SCB.dtype}, expected floating point scales"
        return ""


class OutlierAwareLinear(torch.nn.Linear):
    """A base class for layers that treat the outlier columns of their inputs, which OutlierTracer found, in a way of
    their own. quantize_weight is called once; forward_with_outliers computes."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        self.outlier_dim: Tensor | None = None
        self.is_quantized = False

    def forward_with_outliers(self, x: Tensor, outlier_idx: Tensor | None) -> Tensor:
        raise NotImplementedError("Please override the `forward_with_outliers(self, x, outlier_idx)` function")

    def quantize_weight(self, w: Tensor, outlier_idx: Tensor | None) -> Tensor:
        raise NotImplementedError("Please override the `quantize_weight(self, w, outlier_idx)` function")

    def forward(self, x: Tensor) -> Tensor:
        if self.outlier_dim is None:
            tracer = OutlierTracer.get_instance()
            if not tracer.is_initialized():
                raise RuntimeError(
                    "OutlierAwareLinear: no outliers are known, expected OutlierTracer.initialize(model)"
                )
            self.outlier_dim = tracer.get_outliers(self.weight)
        if not self.is_quantized:
            self.weight.data.copy_(self.quantize_weight(self.weight, self.outlier_dim))
            self.is_quantized = True
        return self.forward_with_outliers(x, self.outlier_dim)


class SwitchBackLinearBnb(Linear8bitLt):
    """Linear8bitLt under the name it has in SwitchBack (Wortsman et al. 2023, arXiv 2304.13013): the product in int8,
    the gradient of the weight in the precision of its inputs.

    memory_efficient_backward is kept for programs that name it: only one copy of the weight is ever stored.
    """

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        memory_efficient_backward: bool = False,
        threshold: float = 0.0,
        index: Any = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, has_fp16_weights, threshold, index, device)
        self.memory_efficient_backward = memory_efficient_backward
