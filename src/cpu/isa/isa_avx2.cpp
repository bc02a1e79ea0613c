#include "cpu/isa/avx2.h"

#include "cpu/isa/make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kAvx2 = make_kernels<Avx2>();
}
