#include "simd/avx2.h"

#include "make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kAvxVnni = make_kernels<AvxVnni>();
}
