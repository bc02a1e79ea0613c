// The table of vec4, which every program that this is linked to finds beside its own.
#include "cpu/isa/vec4.h"

#include "cpu/isa/make_kernels.h"

namespace bnb::cpu {
namespace {
constinit const Kernels kVec4 = make_kernels<Vec4>();
[[maybe_unused]] const bool added = (add_table(kVec4), true);
}  // namespace
}  // namespace bnb::cpu
