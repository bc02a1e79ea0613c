"""Quantization of tensors: 4-bit (NF4, FP4) and 8-bit block-wise, their maps and states."""

from ..cextension import lib
from ..utils import pack_dict_to_tensor, unpack_tensor_to_dict
from .blockwise import dequantize_blockwise, quantize_blockwise
from .codebooks import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    get_4bit_type,
    name2qmap,
)
from .cpu_layout import _convert_weight_packed_for_cpu, _convert_weight_packed_for_cpu_inverse
from .fourbit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from .helpers import get_ptr, has_avx512bf16, is_on_gpu
from .quant_state import QuantState

__all__ = [
    "QuantState",
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "get_ptr",
    "has_avx512bf16",
    "is_on_gpu",
    "lib",
    "name2qmap",
    "pack_dict_to_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

# Pickles of a QuantState name its public home, which the released package knows too.
QuantState.__module__ = __name__
