"""Layers of experiments."""

from .modules import LinearFP8Global, LinearFP8Mixed

__all__ = ["LinearFP8Global", "LinearFP8Mixed"]
