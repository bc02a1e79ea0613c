"""Every operator in plain torch, for any device that has no kernel of its own."""

from . import fourbit, int8, ops, optim

__all__ = ["fourbit", "int8", "ops", "optim"]
