"""Every operator in plain torch, for any device that has no kernel of its own: the CPU and CUDA never come here."""

from . import fourbit, int8, optim

__all__ = ["fourbit", "int8", "optim"]
