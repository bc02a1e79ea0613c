"""What is needed to read a quantized tensor, and its forms in a checkpoint."""

from typing import Any

import torch

from .. import _checks as check
from .._ops import linear_4bit_layout
from ..utils import pack_dict_to_tensor, unpack_tensor_to_dict

_TENSORS = ("absmax", "code", "offset")  # besides state2, what moves with a device


class QuantState:
    """How a quantized tensor is to be read.

    Attributes:
        absmax: one fp32 scale per block; nested: its uint8 codes.
        shape: of the tensor that was quantized.
        code: value of each code, fp32; 16 entries for 4 bits, 256 for 8.
        blocksize: elements per scale.
        quant_type: "nf4", "fp4" or, for 8 bits, None.
        dtype: of the tensor that was quantized, and of what dequantizing returns.
        offset, state2, nested: double quantization (QLoRA, arXiv 2305.14314, section 3):
            scales = state2.code[absmax] * state2.absmax of its block of 256 + offset.
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
        super().__setattr__(name, value)
        if name in ("shape", "blocksize", "quant_type"):
            known = self.__dict__
            parts = (known.get("shape"), known.get("blocksize"), known.get("quant_type"))
            known["linear_layout"] = linear_4bit_layout(*parts)

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
            ValueError: keys are missing, unknown, or name more than one state.
        """
        op = "QuantState.from_dict"
        type_keys = (*cls.valid_qs_type_keys, "bitsandbytes__None")  # the last is that of 8-bit states
        packed = [k for k, v in qs_dict.items() if isinstance(v, torch.Tensor) and k.rpartition(".")[2] in type_keys]
        if not packed and "quant_type" not in qs_dict:
            raise ValueError(
                f"{op}: qs_dict has the keys {list(qs_dict)}, expected packed or unpacked quant_state items"
            )
        if len(packed) > 1:
            raise ValueError(f"{op}: qs_dict has the states {check.listing(packed)}, expected one")
        items = {k.rpartition(".")[2]: v for k, v in qs_dict.items() if k not in packed}
        for key in packed:
            items.update(unpack_tensor_to_dict(qs_dict[key]))
        if unknown := set(items) - set(cls.valid_qs_keys):
            raise ValueError(
                f"{op}: qs_dict has {check.listing(sorted(unknown))}, expected only {check.listing(cls.valid_qs_keys)}"
            )
        required = {"absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape"}
        if "nested_absmax" in items:
            required |= {"nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset"}
        if missing := required - set(items):
            raise ValueError(f"{op}: qs_dict lacks {check.listing(sorted(missing))}")
        offset = state2 = None
        if "nested_absmax" in items:
            offset = torch.tensor(float(items["nested_offset"]), dtype=torch.float32, device=device)
            state2 = cls(
                absmax=items["nested_absmax"].to(device),
                code=items["nested_quant_map"].to(device),
                blocksize=items["nested_blocksize"],
                dtype=_dtype(items["nested_dtype"]),
            )
        return cls(
            absmax=items["absmax"].to(device),
            shape=None if items["shape"] is None else torch.Size(items["shape"]),
            code=items["quant_map"].to(device),
            blocksize=items["blocksize"],
            quant_type=items["quant_type"],
            dtype=_dtype(items["dtype"]),
            offset=offset,
            state2=state2,
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The state as a flat dict. `packed`: tensors only, the rest as JSON in "quant_state.bitsandbytes__<type>"."""
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
        """Moves the state to a device, in place."""
        for name in _TENSORS:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(device))
        if self.state2 is not None:
            self.state2.to(device)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return False
        return (
            (self.shape, self.blocksize, self.quant_type, self.dtype, self.nested)
            == (other.shape, other.blocksize, other.quant_type, other.dtype, other.nested)
            and all(_equal(getattr(self, name), getattr(other, name)) for name in _TENSORS)
            and self.state2 == other.state2
        )

    __hash__ = None  # type: ignore[assignment]  # mutable, as a list is


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"QuantState.from_dict: dtype is {name!r}, expected the name of a torch dtype")
    return dtype
