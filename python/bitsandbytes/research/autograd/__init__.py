"""Products of experiments."""

from ._functions import matmul_fp8_global, matmul_fp8_mixed, switchback_bnb

__all__ = ["matmul_fp8_global", "matmul_fp8_mixed", "switchback_bnb"]
