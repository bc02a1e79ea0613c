"""Differentiable products with quantized weights."""

from ._functions import (
    GlobalOutlierPooler,
    MatMul4Bit,
    MatMul8bitFp,
    MatMul8bitLt,
    MatmulLtState,
    matmul,
    matmul_4bit,
)

__all__ = [
    "GlobalOutlierPooler",
    "MatMul4Bit",
    "MatMul8bitFp",
    "MatMul8bitLt",
    "MatmulLtState",
    "matmul",
    "matmul_4bit",
]
