"""What is needed to read a quantized tensor, and its forms in a checkpoint."""

import math
from typing import Any

import torch

from .. import _checks as check
from .._ops_fourbit import check_packed, linear_4bit_layout
from ..utils import pack_dict_to_tensor
from .state_items import Items

_TENSORS = ("absmax", "code", "offset")  # besides state2, what moves with a device
_LAYOUT = ("shape", "blocksize", "quant_type")
_PLAIN = (*_LAYOUT, "dtype", "nested", "packing_format_for_cpu")


def statistic(value: Any) -> Any:
    """Scales, code values and offsets are fp32, whatever type a checkpoint was cast to; codes of scales stay."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float32:
        return value.float()
    return value


class Statistic:
    """An attribute of fp32 statistics. It has no __get__: reading it costs what reading any attribute does."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = statistic(value)

    def __delete__(self, instance: Any) -> None:
        instance.__dict__[self.name] = None


class QuantState:
    """How a quantized tensor is to be read.

    Statistics of another floating point type become fp32 when they are assigned, also from a pickle.

    Attributes:
        absmax: one fp32 scale per block; nested: its uint8 codes.
        shape: of the tensor that was quantized.
        code: value of each code, fp32; 16 entries for 4 bits, 256 for 8.
        blocksize: elements per scale.
        quant_type: "nf4", "fp4" or, for 8 bits, None.
        dtype: of the tensor that was quantized, and of what dequantizing returns.
        nested: the scales are quantized too ("double quantization", QLoRA, arXiv 2305.14314, section 3), so that
            they are state2.code[absmax] * state2.absmax of its block of 256 + offset.
    """

    linear_layout: int | None = None  # shape, blocksize and quant_type as linear_4bit takes them
    packing_format_for_cpu: bool = False  # the weight is in the layout of cpu_layout.py
    valid_quant_types = ("fp4", "nf4")
    valid_qs_type_keys = tuple(f"bitsandbytes__{t}" for t in valid_quant_types)
    valid_qs_keys = (
        *("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state", "quant_type", "blocksize"),
        *("dtype", "shape", "nested_blocksize", "nested_dtype", "nested_offset"),
    )

    def __init__(
        self,
        absmax: torch.Tensor,
        shape: torch.Size | None = None,
        code: torch.Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: torch.Tensor | None = None,
        state2: "QuantState | None" = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.dtype = dtype
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.offset = offset
        self.state2 = state2
        self.nested = state2 is not None

    def __setattr__(self, name: str, value: Any) -> None:
        # The layout of cpu_layout.py has absmax in bf16.
        convert = name in _TENSORS and not (name == "absmax" and self.packing_format_for_cpu)
        super().__setattr__(name, statistic(value) if convert else value)
        if name in _LAYOUT or name == "packing_format_for_cpu":
            known = self.__dict__
            stored = not known.get("packing_format_for_cpu")
            known["linear_layout"] = linear_4bit_layout(*map(known.get, _LAYOUT)) if stored else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.packing_format_for_cpu = state.get("packing_format_for_cpu", False)  # absmax depends on it
        for name, value in state.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        # FSDP follows the keys of a state dict by attribute: weight.quant_state.bitsandbytes__nf4.
        if name.startswith("bitsandbytes__") and name == f"bitsandbytes__{self.__dict__.get('quant_type')}":
            return self.as_dict(packed=True)[f"quant_state.{name}"]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, idx: int | slice) -> Any:
        """Of the list that states once were: absmax, shape, dtype, blocksize, None or [offset, state2], quant_type."""
        second = [self.offset, self.state2] if self.nested else None
        return [self.absmax, self.shape, self.dtype, self.blocksize, second, self.quant_type][idx]

    @classmethod
    def from_dict(cls, qs_dict: dict[str, Any], device: torch.device | str | int | None) -> "QuantState":
        """The state in a dict that as_dict made, packed or not; keys may carry a path in front.

        Raises:
            ValueError: keys are missing, unknown, or name more than one state; an entry, which the message names, is
                none of a state, or does not fit the others.
        """
        type_keys = (*cls.valid_qs_type_keys, "bitsandbytes__None")  # None: 8 bits
        items = Items(qs_dict, type_keys, cls.valid_qs_keys, device)
        quant_type = items.quant_type()
        four_bits = quant_type is not None
        blocksize = items.integer("blocksize", check.BLOCKSIZES if four_bits else None)
        shape = items.shape(optional=not four_bits)
        count = None if shape is None else check.blocks(math.prod(shape), blocksize)
        offset = state2 = None
        if items.nested:
            absmax = items.tensor("absmax", count, torch.uint8)
            second = items.integer("nested_blocksize")
            offset = torch.tensor(items.number("nested_offset"), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=items.tensor("nested_absmax", check.blocks(absmax.numel(), second)).to(device),
                code=items.tensor("nested_quant_map", check.CODES).to(device),
                blocksize=second,
                dtype=items.dtype("nested_dtype"),
            )
        else:
            absmax = items.tensor("absmax", count)
        return cls(
            absmax=absmax.to(device),
            shape=shape,
            code=items.tensor("quant_map", 16 if four_bits else check.CODES).to(device),
            blocksize=blocksize,
            quant_type=quant_type,
            dtype=items.dtype("dtype"),
            offset=offset,
            state2=state2,
        )

    def check_codes(self, op: str, name: str, packed: torch.Tensor) -> None:
        """Refuses packed 4-bit codes that are not those of one tensor of this shape, no more and no less.

        Raises:
            ValueError: their dtype or number of bytes.
        """
        if self.shape is not None:
            check_packed(op, name, packed, math.prod(self.shape))

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a flat dict. `packed`: tensors only, the rest as JSON in "quant_state.bitsandbytes__<type>".

        Raises:
            ValueError: the weight is not in the layout that checkpoints have.
        """
        if self.packing_format_for_cpu:
            raise ValueError(
                "QuantState.as_dict: packing_format_for_cpu is True, expected the weight and its state to go through "
                "_convert_weight_packed_for_cpu_inverse first"
            )
        qs_dict: dict[str, Any] = {
            "quant_type": self.quant_type,
            "absmax": self.absmax,
            "blocksize": self.blocksize,
            "quant_map": self.code,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": None if self.shape is None else tuple(self.shape),
        }
        if self.state2 is not None and self.offset is not None:
            qs_dict |= {
                "nested_absmax": self.state2.absmax,
                "nested_blocksize": self.state2.blocksize,
                # Shared by all states, which safetensors would refuse to save.
                "nested_quant_map": None if self.state2.code is None else self.state2.code.clone(),
                "nested_dtype": str(self.state2.dtype).removeprefix("torch."),
                "nested_offset": self.offset.item(),
            }
        if not packed:
            return qs_dict
        tensors = {k: v for k, v in qs_dict.items() if isinstance(v, torch.Tensor)}
        rest = {k: v for k, v in qs_dict.items() if not isinstance(v, torch.Tensor)}
        return tensors | {f"quant_state.bitsandbytes__{self.quant_type}": pack_dict_to_tensor(rest)}

    def to(self, device: torch.device | str | int | None) -> None:
        """Moves the state to a device, in place. A dtype changes nothing: statistics stay fp32, codes uint8."""
        if isinstance(device, torch.dtype):
            return
        for name in _TENSORS:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(device))
        if self.state2 is not None:
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            all(getattr(self, name) == getattr(other, name) for name in _PLAIN)
            and all(_equal(getattr(self, name), getattr(other, name)) for name in _TENSORS)
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]  # mutable, as a list is


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
