"""Kernels by device: cpu and cuda (native libraries) and default (pure torch, any other device)."""
