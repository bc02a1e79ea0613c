// Stochastic rounding to 16 bits by random bits that depend on seed, step and place alone: not on threads, devices or how a tensor is cut.
//
// x goes to one of its two neighbours with a chance that makes the mean of the results x, to 2^-16 (bf16, and fp16 below 2^-14) or 2^-13
// of their distance. What is representable, infinite or NaN stays as bnb::rounded has it. Beyond the largest number lies infinity.
#pragma once

#include "common/convert.h"

namespace bnb {

// Philox4x32-10: Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3.
struct Random4 {
  uint32_t word[4];
};
BNB_INLINE constexpr Random4 philox(uint64_t key, uint64_t low, uint64_t high) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32), c2 = static_cast<uint32_t>(high),
           c3 = static_cast<uint32_t>(high >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9e3779b9u, k1 += 0xbb67ae85u) {
    const uint64_t a = uint64_t{0xd2511f53u} * c0, b = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(a);
  }
  return {{c0, c1, c2, c3}};
}
static_assert(philox(0, 0, 0).word[0] == 0x6627e8d5 && philox(0, 0, 0).word[3] == 0x9b00dbd8);  // the authors' known answers
static_assert(philox(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e).word[1] == 0x94fdcceb);

// The random words of places 4 i .. 4 i + 3 of a parameter, one each, in step t.
BNB_INLINE constexpr Random4 random_of(uint64_t seed, int64_t i, int64_t t) {
  return philox(seed, static_cast<uint64_t>(i), static_cast<uint64_t>(t));
}

// x to T; of `random` the upper bits count.
template <class T> BNB_INLINE constexpr T stochastically_rounded(float x, uint32_t random) {
  const uint32_t b = bits_of(x), magnitude = b & 0x7fffffff, r = random >> 16;
  if constexpr (dtype_of<T> == DType::f32) {
    return x;
  } else if constexpr (dtype_of<T> == DType::bf16) {
    return magnitude > 0x7f800000 ? rounded<T>(x) : T{static_cast<uint16_t>((b + r) >> 16)};
  } else {
    if (magnitude >= 0x47800000) return rounded<T>(x);  // 2^16 and above
    const uint32_t h = magnitude < 0x38800000 ? (static_cast<uint32_t>(float_of(magnitude) * 0x1p40f) + r) >> 16
                                              : (magnitude - (112u << 23) + (r >> 3)) >> 13;
    return T{static_cast<uint16_t>((b >> 16 & 0x8000) | h)};
  }
}

}  // namespace bnb
