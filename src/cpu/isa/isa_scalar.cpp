#include "cpu/isa/scalar.h"

#include "cpu/isa/make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kScalar = make_kernels<Scalar>();
}
