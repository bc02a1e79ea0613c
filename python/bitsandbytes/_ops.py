"""The operators, collected: schemas and shape functions. Kernels live in backends/ and in the native library.

A backend for another device registers its kernels with ``register_kernel("bitsandbytes::<op>", "<device type>")`` from
here, and is found through the entry-point group ``bitsandbytes.backends``. A device without a kernel of its own gets
backends/default.
"""

from torch.library import register_fake, register_kernel

from . import _ops_fourbit, _ops_int8, _ops_optim
from ._ops_fourbit import CPU_SCHEMAS

__all__ = ["CPU_SCHEMAS", "SCHEMAS", "register_fake", "register_kernel"]

SCHEMAS = _ops_fourbit.SCHEMAS | _ops_int8.SCHEMAS | _ops_optim.SCHEMAS
