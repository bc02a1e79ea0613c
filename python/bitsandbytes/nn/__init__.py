"""Layers over quantized weights."""

from .modules import (
    Embedding4bit,
    Embedding8bit,
    EmbeddingFP4,
    EmbeddingNF4,
    Int8Params,
    Linear4bit,
    LinearFP4,
    LinearNF4,
    Params4bit,
)

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
]
