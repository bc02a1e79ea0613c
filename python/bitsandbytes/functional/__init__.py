"""Quantization of tensors: 4-bit (NF4, FP4), 8-bit block-wise and int8 rows, their maps, states and products."""

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
from .deprecated import dequantize, dequantize_no_absmax, quantize, quantize_no_absmax
from .fourbit import (
    dequantize_4bit,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    quantize_4bit,
    quantize_fp4,
    quantize_nf4,
)
from .helpers import (
    _cuda_device_of,
    _get_tensor_stream,
    _mul,
    elementwise_func,
    fill,
    get_ptr,
    has_avx512bf16,
    is_on_gpu,
)
from .int8 import (
    batched_igemm,
    check_matmul,
    igemm,
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
)
from .optim import (
    optimizer_update_8bit,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    percentile_clipping,
)
from .paged import (
    FIRST_CUDA_DEVICE,
    CUBLAS_Context,
    Cusparse_Context,
    GlobalPageManager,
    get_paged,
    prefetch_tensor,
)
from .quant_state import QuantState
from .sparse import (
    COOSparseTensor,
    CSCSparseTensor,
    CSRSparseTensor,
    coo2csc,
    coo2csr,
    coo_zeros,
    spmm_coo,
    spmm_coo_very_sparse,
)

__all__ = [
    "FIRST_CUDA_DEVICE",
    "COOSparseTensor",
    "CSCSparseTensor",
    "CSRSparseTensor",
    "CUBLAS_Context",
    "Cusparse_Context",
    "GlobalPageManager",
    "QuantState",
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "_cuda_device_of",
    "_get_tensor_stream",
    "_mul",
    "batched_igemm",
    "check_matmul",
    "coo2csc",
    "coo2csr",
    "coo_zeros",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "dequantize_no_absmax",
    "elementwise_func",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "has_avx512bf16",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "lib",
    "name2qmap",
    "optimizer_update_8bit",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "percentile_clipping",
    "prefetch_tensor",
    "quantize",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "quantize_no_absmax",
    "spmm_coo",
    "spmm_coo_very_sparse",
    "unpack_tensor_to_dict",
]

C = 127.0  # the largest code of LLM.int8()

# Pickles of a QuantState name its public home, which the released package knows too.
QuantState.__module__ = __name__
