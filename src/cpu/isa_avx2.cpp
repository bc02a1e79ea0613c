#include "simd/avx2.h"

#include "make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kAvx2 = make_kernels<Avx2>();
}
