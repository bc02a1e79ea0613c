"""States and their entries in files, for the tests of states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bitsandbytes.functional as F
from bitsandbytes.utils import pack_dict_to_tensor, unpack_tensor_to_dict

both_nestings = pytest.mark.parametrize("nested", [False, True])
KEY = "quant_state.bitsandbytes__nf4"


def quantized(nested: bool, n: int = 40, k: int = 96) -> tuple[torch.Tensor, F.QuantState]:
    return F.quantize_4bit(torch.randn(n, k), quant_type="nf4", compress_statistics=nested)


def with_fields(items: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**items, KEY: pack_dict_to_tensor(unpack_tensor_to_dict(items[KEY]) | changes)}


def with_text(items: dict[str, Any], text: str | bytes) -> dict[str, Any]:
    raw = text.encode() if isinstance(text, str) else text
    return {**items, KEY: torch.tensor(list(raw), dtype=torch.uint8)}


def text_of(items: dict[str, Any]) -> str:
    return bytes(items[KEY].tolist()).decode()
