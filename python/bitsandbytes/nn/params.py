"""Parameters that hold quantized weights. What they know lives in their __dict__ and goes with every copy of them."""

import copy
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from .. import functional as F
from ..functional import QuantState
from ..functional.quant_state import statistic

Device = torch.device | str | int | None


def _rebuild(cls: type[Tensor], data: Tensor, requires_grad: bool) -> Tensor:
    return Tensor._make_subclass(cls, data, requires_grad)


class _QuantizedParameter(torch.nn.Parameter):
    """What both parameter types share: copies, pickles, and moves that quantize once."""

    def _is_quantized(self) -> bool:
        raise NotImplementedError

    def _quantize(self, device: Device) -> Self:
        raise NotImplementedError

    def _move_state(self, data: Tensor) -> None:
        """Brings what belongs to the data to the device of `data`, in place."""
        raise NotImplementedError

    def _settle(self) -> None:
        """Makes the data agree with the attributes, before both are copied."""

    def _with_data(self, data: Tensor) -> Self:
        """A parameter around `data` that knows what this one knows."""
        new = Tensor._make_subclass(type(self), data, self.requires_grad)
        new._learn(self._knowledge())
        return new

    def _learn(self, knowledge: dict[str, Any]) -> None:
        self.__dict__.update(knowledge)

    def _knowledge(self) -> dict[str, Any]:
        """What goes with every copy: the attributes without those that are made from the data."""
        return self.__dict__.copy()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As Tensor.to. The first move to a real device quantizes, in place. After it a dtype is ignored."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if not self._is_quantized():
            if device is not None and device.type != "meta" and self._to_be_quantized():
                return self._quantize(device)
            return self._with_data(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking))
        if device is None:
            return self
        if device == self.device:  # as Tensor.to; under torch.func a new one would not outlive its transform
            if device.type != "meta":
                self._move_state(self.data)
            return self
        new = self._with_data(self.data.to(device=device, non_blocking=non_blocking))
        # torch.nn.Module keeps this object and takes over the data of the new one, so the state moves in place. The
        # meta device would destroy it: the state stays where it is, so that the weight can come back.
        if device.type != "meta":
            self._move_state(new.data)
            new._learn(self._knowledge())
        return new

    def _to_be_quantized(self) -> bool:
        return True

    def cpu(self) -> Self:  # type: ignore[override]
        return self.to(device="cpu")

    def cuda(self, device: Device = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def xpu(self, device: Device = None, non_blocking: bool = False) -> Self:  # type: ignore[override]
        return self.to(device="xpu" if device is None else device, non_blocking=non_blocking)

    def _cast(self, dtype: torch.dtype) -> Any:
        return self if self._is_quantized() else self.data.to(dtype)

    # torch.nn.Module.half() and its like call these; packed bytes stored as bf16 must survive them.
    def half(self, *args: Any, **kwargs: Any) -> Any:
        return self._cast(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Any:
        return self._cast(torch.bfloat16)

    def float(self, *args: Any, **kwargs: Any) -> Any:
        return self._cast(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> Any:
        return self._cast(torch.float64)

    def detach(self) -> Any:
        # A plain tensor, as state dicts need it; but torch.nn.Module.to("meta") makes the new parameter from it.
        data = super().detach()
        return self._with_data(data) if data.is_meta else data

    def __copy__(self) -> Self:
        self._settle()
        return self._with_data(self.data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        if id(self) in memo:
            return memo[id(self)]
        self._settle()
        new = self._with_data(copy.deepcopy(self.data, memo))
        memo[id(self)] = new
        for key, value in self._knowledge().items():
            # The module is copied only if it is what is being copied; a parameter alone keeps its module.
            new.__dict__[key] = memo.get(id(value), value) if key == "module" else copy.deepcopy(value, memo)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._settle()
        return _rebuild, (type(self), self.data, self.requires_grad), self._knowledge()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._learn(state)


_SPLITS: tuple[Callable[..., Any], ...] = (torch.chunk, torch.split, Tensor.chunk, Tensor.split)


class Params4bit(_QuantizedParameter):
    """A weight that becomes 4-bit when it first moves to a device (QLoRA, arXiv 2305.14314).

    Args:
        data: the weight, or its packed codes if `bnb_quantized`.
        quant_state: how to read packed codes.
        blocksize: elements per scale, 64 by default.
        compress_statistics: quantize the scales too.
        quant_type: "fp4" or "nf4".
        quant_storage: dtype that packed bytes are stored as.
        module: the layer that owns the weight and keeps a second reference to quant_state, for wrappers that replace
            the parameter.
        kwargs: ignored, so that Params4bit(data, **other.__dict__) always works.
    """

    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_state: QuantState | None
    quant_storage: torch.dtype
    bnb_quantized: bool
    module: Any  # of a class with quant_state, or None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        module: torch.nn.Module | None = None,
        bnb_quantized: bool = False,
        **kwargs: Any,
    ) -> Self:
        self = Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_state = quant_state
        self.quant_storage = quant_storage
        self.bnb_quantized = bnb_quantized
        self.module = module
        return self

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: Device = "cuda",
        module: torch.nn.Module | None = None,
        **kwargs: Any,
    ) -> Self:
        """The parameter of a checkpoint: packed codes and the entries that QuantState.as_dict(packed=True) gave."""
        state = QuantState.from_dict(quantized_stats, device=device)
        state.check_codes(f"{cls.__name__}.from_prequantized", "data", data)
        self = Tensor._make_subclass(cls, data.to(device), requires_grad)
        self.module = module
        self._adopt(state)
        return self

    def _adopt(self, state: QuantState) -> None:
        """Becomes the packed codes that `state` describes."""
        self.quant_state = state
        self.blocksize = state.blocksize or 64
        self.compress_statistics = state.nested
        self.quant_type = state.quant_type or ""
        self.quant_storage = self.data.dtype
        self.bnb_quantized = True
        if self.module is not None:
            self.module.quant_state = state

    def _is_quantized(self) -> bool:
        return self.bnb_quantized

    def _quantize(self, device: Device) -> Self:
        weight = self.data.contiguous().to(device)
        packed, state = F.quantize_4bit(
            weight,
            blocksize=self.blocksize,
            compress_statistics=self.compress_statistics,
            quant_type=self.quant_type,
            quant_storage=self.quant_storage,
        )
        self.data = packed
        self.quant_state = state
        if self.module is not None:
            self.module.quant_state = state
        self.bnb_quantized = True
        return self

    def _move_state(self, data: Tensor) -> None:
        if self.quant_state is not None:
            self.quant_state.to(data.device)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            source = args[0] if args else (kwargs or {}).get("input")
            if func in _SPLITS and isinstance(source, Params4bit):
                return tuple(source._with_data(part) for part in result)
        return result


def _fsdp_property(name: str, path: str) -> property:
    """FSDP follows the keys of a state dict by attribute, as in weight.absmax: they lead into quant_state."""
    get = attrgetter(f"quant_state.{path}")

    def read(self: Params4bit) -> Any:
        try:
            return get(self)
        except AttributeError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}") from None

    return property(read, doc=f"quant_state.{path}")


for _name, _path in {
    "absmax": "absmax",
    "code": "code",
    "quant_map": "code",
    "offset": "offset",
    "state2": "state2",
    "nested_absmax": "state2.absmax",
    "nested_blocksize": "state2.blocksize",
    "nested_quant_map": "state2.code",
    "nested_dtype": "state2.dtype",
    "nested_offset": "offset",
}.items():
    setattr(Params4bit, _name, _fsdp_property(_name, _path))


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor has an address. Those that stand for others in torch.func and torch.export have none."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        has_memory(a) and has_memory(b) and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.device == b.device
    )


class Int8Params(_QuantizedParameter):
    """A matrix that becomes int8 with one fp32 scale per row when it first moves to a device (LLM.int8(), arXiv
    2208.07339).

    Args:
        data: the matrix, or its int8 codes if `SCB` is given.
        has_fp16_weights: never quantize.
        CB: the int8 codes, in place of `data`.
        SCB: max |x| of each row: x = CB * SCB / 127.
        kwargs: ignored, so that Int8Params(data, **other.__dict__) always works.

    CB shows the data once that is int8, in the memory of the data. Both CB and SCB can be assigned, also in __dict__:
    codes become the data; None, or deleting one, hands it over to a MatmulLtState, and the data keeps the codes.
    """

    has_fp16_weights: bool
    SCB: Tensor | None

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: Tensor | None = None,
        SCB: Tensor | None = None,
        **kwargs: Any,
    ) -> Self:
        if data is None:
            data = torch.empty(0) if CB is None else CB
        self = Tensor._make_subclass(cls, data, requires_grad and data.dtype != torch.int8)
        self.SCB = SCB
        self.has_fp16_weights = has_fp16_weights
        self._show()
        return self

    # CB lives in __dict__ as a view of the data, and in _shown when the two agree: another object in CB was written by
    # somebody, the same one over other memory is out of date.

    @property
    def CB(self) -> Any:
        """The int8 codes, which are the data, once quantized."""
        self._settle()
        try:
            return self.__dict__["CB"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'CB'") from None

    @CB.setter
    def CB(self, codes: Any) -> None:
        if self._can_hold(codes):
            self.requires_grad = False
            self.data = codes
        self.__dict__["CB"] = self.__dict__["_shown"] = codes

    @CB.deleter
    def CB(self) -> None:
        try:
            del self.__dict__["CB"]
        except KeyError:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute 'CB'") from None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, statistic(value) if name == "SCB" else value)

    def _can_hold(self, codes: Any) -> bool:
        """Whether `codes` are such, and the data neither are floats that learn nor on the meta device alone."""
        if not isinstance(codes, Tensor) or codes.dtype != torch.int8 or codes.is_meta != self.is_meta:
            return False
        return self.data.dtype == torch.int8 or not self.has_fp16_weights

    def _show(self) -> None:
        self.__dict__["CB"] = self.__dict__["_shown"] = self.data if self.data.dtype == torch.int8 else None

    def _settle(self) -> None:
        """Makes CB and the data agree after one of them was replaced."""
        known = self.__dict__
        codes = known.get("CB")
        if codes is None:
            return
        written = codes is not known.get("_shown")
        if written:
            self.CB = codes
        elif self._can_hold(codes) and not same_memory(codes, self):
            self._show()

    def _knowledge(self) -> dict[str, Any]:
        self._settle()
        known = self.__dict__.copy()
        codes = known.pop("CB", None)
        if not self._can_hold(codes):
            known["CB"] = codes
        known.pop("_shown", None)
        return known

    def _learn(self, knowledge: dict[str, Any]) -> None:
        super()._learn(knowledge)
        if "SCB" in knowledge:
            self.SCB = knowledge["SCB"]  # in fp32
        if "CB" in knowledge:
            self.__dict__["_shown"] = knowledge["CB"]
        else:
            self._show()

    def _is_quantized(self) -> bool:
        self._settle()
        return self.data.dtype == torch.int8

    def _to_be_quantized(self) -> bool:
        return not self.has_fp16_weights

    def _quantize(self, device: Device) -> Self:
        codes, self.SCB, _ = F.int8_vectorwise_quant(self.data.to(device))
        self.requires_grad = False
        self.data = codes
        self._show()
        return self

    def _move_state(self, data: Tensor) -> None:
        known = self.__dict__
        if known.get("SCB") is not None:
            self.SCB = known["SCB"].to(data.device)
        if known.get("CB") is not None:
            known["CB"] = known["_shown"] = data
