"""Every operator in plain torch, for any device that has no kernel of its own."""

from . import int8, ops, optim

__all__ = ["int8", "ops", "optim"]
