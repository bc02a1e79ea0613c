// What the tests of operations share: odd numbers, and the operations that run here.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "cases/cases.h"
#include "common/convert.h"
#include "cpu/isa/ops.h"

namespace bnb::test {

// The first of those that were entered.
const Ops* first_ops();

inline constexpr int kMostLanes = 16, kGroup = 64;
inline constexpr int kRounds = 3000;

template <class F> void for_each_ops(F&& f) {
  const auto supported = supported_isas();
  for (const Ops* ops = first_ops(); ops; ops = ops->next)
    if (std::ranges::find(supported, ops->isa) != supported.end()) {
      SCOPED_TRACE("isa " + std::string(ops->isa));
      f(*ops);
      if (::testing::Test::HasFailure()) return;
    }
}

// Numbers that arithmetic trips over, and any bits at all.
inline constexpr uint32_t kOdd[] = {0,          0x80000000, 1,          0x80000001, 0x007fffff, 0x807fffff, 0x00800000,
                                    0x33800000, 0x3f7fffff, 0x3f800000, 0xbf800000, 0x3f800001, 0x477fe000, 0x477ff000,
                                    0x7f7fffff, 0xff7fffff, 0x7f7f8000, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc00000,
                                    0x7fc12345, 0x7fffffff, 0x38800000, 0x387fc000, 0x33000001, 0x4b000000};
inline float odd(uint64_t seed, uint64_t i) {
  const uint64_t r = random(seed, i);
  return float_of(r & 1 ? kOdd[(r >> 8) % std::size(kOdd)] : static_cast<uint32_t>(r >> 32) | (r & 2 ? 0x400000u : 0u));
}
inline float finite_odd(uint64_t seed, uint64_t i) {
  for (float x;; i += 1000003)
    if (x = odd(seed, i); std::isfinite(x)) return x;
}
inline bool quiet_nan(float x) { return std::isnan(x) && (bits_of(x) & 0x400000) != 0; }
// As bits; one NaN is as good as another.
inline bool alike(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

struct Vector {
  alignas(64) float at[2 * kMostLanes] = {};
  explicit Vector(uint64_t seed = 0, uint64_t round = 0, float (*value)(uint64_t, uint64_t) = odd) {
    if (seed)
      for (uint64_t i = 0; i < std::size(at); ++i) at[i] = value(seed, round * std::size(at) + i);
  }
};

template <class T> const ElementOps<T>& of(const Ops& ops) {
  if constexpr (std::is_same_v<T, float>) return ops.f32;
  if constexpr (std::is_same_v<T, Half>) return ops.f16;
  if constexpr (std::is_same_v<T, BFloat16>) return ops.bf16;
}
template <class T> uint32_t raw(T x) {
  if constexpr (sizeof(T) == 4)
    return bits_of(x);
  else
    return x.bits;
}

inline constexpr float kScales[] = {1, 0, -0.0f, 0.37f, 1e-38f, 1e-42f, 3e38f, 65000, 1e-7f};

}  // namespace bnb::test
