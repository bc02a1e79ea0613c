"""CUDA kernels come from a native library of their own, as on the CPU. With a torch without CUDA nothing is here."""

from ...cextension import CUDA, cuda_lib
from ..utils import refuse_without

if cuda_lib is not None:
    refuse_without(cuda_lib, CUDA)
