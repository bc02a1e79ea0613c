#include "cpu/isa/avx512.h"

#include "cpu/gemm/avx512/gemm_4bit_row.h"
#include "cpu/isa/make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kAvx512 = make_kernels<Avx512>();
}
