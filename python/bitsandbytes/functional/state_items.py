"""The entries of a QuantState in a checkpoint, each checked when it is read: a broken file is refused with the name of
its entry."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .. import _checks as check
from ..utils import unpack_tensor_to_dict

_OP = "QuantState.from_dict"
_MAX_JSON = 2**16  # bytes; the text of a state takes about 200
_REQUIRED = {"absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape"}
_REQUIRED_NESTED = {"nested_quant_map", "nested_blocksize", "nested_dtype", "nested_offset"}


class Items:
    """The entries by their names without path, those of the JSON text among them, for a state on `device`.

    Raises:
        ValueError: qs_dict is no dict of one state.
    """

    def __init__(self, qs_dict: Any, type_keys: Sequence[str], known: Sequence[str], device: Any = None) -> None:
        if not isinstance(qs_dict, dict) or not all(isinstance(key, str) for key in qs_dict):
            raise ValueError(f"{_OP}: qs_dict is {type(qs_dict).__name__}, expected a dict of entries by name")
        packed = [k for k, v in qs_dict.items() if isinstance(v, torch.Tensor) and k.rpartition(".")[2] in type_keys]
        if not packed and "quant_type" not in qs_dict:
            raise ValueError(
                f"{_OP}: qs_dict has the keys {list(qs_dict)}, expected packed or unpacked quant_state items"
            )
        if len(packed) > 1:
            raise ValueError(f"{_OP}: qs_dict has the states {check.listing(packed)}, expected one")
        self._to_meta = device is None or torch.device(device).type == "meta"  # None: tensors stay where they are
        self._values: dict[str, Any] = {}
        self._names: dict[str, str] = {}  # as messages have them
        self._packed = packed[0] if packed else None
        for key, value in qs_dict.items():
            if key not in packed:
                self._add(key.rpartition(".")[2], key, value)
        for key in packed:
            for name, value in self._json(key, qs_dict[key]).items():
                self._add(name, f"{name} in {key}", value)
        if unknown := set(self._values) - set(known):
            raise ValueError(
                f"{_OP}: qs_dict has {check.listing(sorted(unknown)[:9])}, expected only {check.listing(known)}"
            )
        self.nested = "nested_absmax" in self._values
        if missing := (_REQUIRED | (_REQUIRED_NESTED if self.nested else set())) - set(self._values):
            raise ValueError(f"{_OP}: qs_dict lacks {check.listing(sorted(missing))}")

    def _add(self, short: str, name: str, value: Any) -> None:
        if short in self._values:
            raise ValueError(f"{_OP}: qs_dict has {self._names[short]} and {name}, expected one {short}")
        self._values[short], self._names[short] = value, name

    @staticmethod
    def _json(key: str, text: torch.Tensor) -> dict[str, Any]:
        if text.numel() > _MAX_JSON:
            raise ValueError(f"{_OP}: {key} has {text.numel()} bytes, expected at most {_MAX_JSON}")
        try:
            return unpack_tensor_to_dict(text)
        except ValueError as error:
            raise ValueError(f"{_OP}: {key}: {error}") from error

    def _fail(self, name: str, given: str, expected: str) -> NoReturn:
        raise ValueError(f"{_OP}: {self._names[name]} {given}, expected {expected}")

    def _is(self, name: str, expected: str) -> NoReturn:
        given = repr(self._values[name])
        self._fail(name, f"is {given if len(given) <= 80 else given[:77] + '...'}", expected)

    def quant_type(self) -> str | None:
        """None is that of 8-bit states."""
        value = self._values["quant_type"]
        if value is not None and not (isinstance(value, str) and value in check.QUANT_TYPES):
            self._is("quant_type", f"one of {check.listing(check.QUANT_TYPES)}")
        if self._packed is not None and not self._packed.endswith(f"bitsandbytes__{value}"):
            self._is("quant_type", f"that of the entry {self._packed}")
        return value

    def integer(self, name: str, allowed: Sequence[int] | None = None) -> int:
        """One of `allowed`, or any of 1 or more."""
        value = self._values[name]
        if not _is_size(value, 1) or (allowed is not None and value not in allowed):
            self._is(name, f"one of {check.listing(allowed)}" if allowed else "a whole number of 1 or more")
        return value

    def number(self, name: str) -> float:
        value = self._values[name]
        if isinstance(value, torch.Tensor) and value.numel() == 1 and value.is_floating_point() and not value.is_meta:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._is(name, "a number")
        # Not finite is what a weight gives that is not; finite but beyond fp32 is nothing that was ever written.
        if (isinstance(value, int) or math.isfinite(value)) and abs(value) > torch.finfo(torch.float32).max:
            self._is(name, "a number of fp32")
        return float(value)

    def shape(self, *, optional: bool) -> torch.Size | None:
        value = self._values["shape"]
        if value is None and optional:
            return None
        if not isinstance(value, list | tuple) or not all(_is_size(size, 0) for size in value):
            self._is("shape", "a list of sizes of 0 or more")
        if math.prod(max(size, 1) for size in value) >= 2**63:
            self._is("shape", "sizes whose product fits 63 bits")
        return torch.Size(value)

    def dtype(self, name: str) -> torch.dtype:
        value = self._values[name]
        found = getattr(torch, value, None) if isinstance(value, str) else None
        if found not in check.FLOATS:
            self._is(name, f"the name of a torch dtype, one of {check.listing(check.FLOATS)}")
        return found

    def tensor(self, name: str, count: int | None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of `dtype`, by default any floating point type, of `count` elements unless that is None."""
        value = self._values[name]
        if not isinstance(value, torch.Tensor):
            self._fail(name, f"is {type(value).__name__}, not a tensor", "a tensor")
        if value.is_meta and not self._to_meta:
            self._fail(name, "is on the meta device", "a tensor with data")
        if layout := check.odd_layout(value):
            self._fail(name, f"has layout {layout}", "a dense tensor")
        if value.dtype != dtype if dtype is not None else not value.is_floating_point():
            self._fail(name, f"has dtype {check.listing([value.dtype])}", check.listing([dtype or "floating point"]))
        if count is not None and value.numel() != count:
            self._fail(name, f"has {value.numel()} elements", f"{count} for the shape and blocksize of the state")
        return value


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63
