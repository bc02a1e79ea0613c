"""All layers and parameters: the module that pickles and other projects name."""

from .embedding import Embedding4bit, Embedding8bit, EmbeddingFP4, EmbeddingNF4
from .linear import Linear4bit, LinearFP4, LinearNF4, fix_4bit_weight_quant_state_from_module
from .params import Int8Params, Params4bit

__all__ = [
    "Embedding4bit",
    "Embedding8bit",
    "EmbeddingFP4",
    "EmbeddingNF4",
    "Int8Params",
    "Linear4bit",
    "LinearFP4",
    "LinearNF4",
    "Params4bit",
    "fix_4bit_weight_quant_state_from_module",
]

for _name in __all__:
    globals()[_name].__module__ = __name__
