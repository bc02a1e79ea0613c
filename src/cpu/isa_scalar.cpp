#include "simd/scalar.h"

#include "make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kScalar = make_kernels<Scalar>();
}
