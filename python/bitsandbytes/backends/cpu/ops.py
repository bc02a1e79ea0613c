"""CPU kernels come from the native library. Without it every operator raises; none falls to the slow default."""

from ...cextension import CPU, cpu_lib
from ..utils import refuse_without

refuse_without(cpu_lib, CPU)
