#include "simd/avx512.h"

#include "make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kAmx = make_kernels<Amx>();
}
