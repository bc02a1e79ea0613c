#include "cpu/isa/avx512.h"

#include "cpu/isa/make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kAvx512Bf16 = make_kernels<Avx512Bf16>();
}
