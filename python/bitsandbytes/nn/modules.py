"""All layers and parameters: the module that pickles and other projects name.

Other names of the released package's module, which programs reach through it, are here too.
"""

from ..functional import (
    QuantState,
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
    has_avx512bf16,
)
from ..optim import GlobalOptimManager
from ..utils import INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING, OutlierTracer
from .embedding import Embedding, Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4, StableEmbedding
from .linear import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from .linear8bit import Linear8bitLt, OutlierAwareLinear, SwitchBackLinearBnb, maybe_rearrange_weight
from .params import Int8Params, Params4bit

__all__ = [
    "Embedding",
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "Linear8bitLt",
    "LinearFP4",
    "LinearNF4",
    "OutlierAwareLinear",
    "Params4bit",
    "StableEmbedding",
    "SwitchBackLinearBnb",
    "fix_4bit_weight_quant_state_from_module",
    "maybe_rearrange_weight",
]

for _name in __all__:
    globals()[_name].__module__ = __name__

__all__ += [
    "INVERSE_LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING",
    "GlobalOptimManager",
    "OutlierTracer",
    "QuantState",
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "has_avx512bf16",
]
