#include "simd/avx512.h"

#include "make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kAvx512 = make_kernels<Avx512>();
}
