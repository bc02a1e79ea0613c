"""Kernels by device: cpu (native library) and default (pure torch, any other device)."""
