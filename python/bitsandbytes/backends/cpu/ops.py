"""CPU kernels come from the native library. Without it every operator raises; none falls to the slow default."""

from ..._ops import register_kernel
from ...cextension import ErrorHandlerMockBNBNativeLibrary, lib, without_kernel

if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
    for _name in without_kernel():
        register_kernel(f"bitsandbytes::{_name}", "cpu")(lib.fail)
