// 16-bit floats to fp32 and back, rounded to nearest even with subnormals kept: what every instruction set must reproduce bit by bit.
// Always inlined, so that no copy compiled for one instruction set can be linked into another.
#pragma once

#include <bnb/types.h>

#include <bit>

#define BNB_INLINE [[gnu::always_inline]] inline

namespace bnb {

BNB_INLINE constexpr uint32_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
BNB_INLINE constexpr float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }

BNB_INLINE constexpr float to_float(float x) { return x; }
BNB_INLINE constexpr float to_float(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
BNB_INLINE constexpr float to_float(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13 | (magnitude > 0x7c00 ? 0x400000 : 0));
  if (magnitude < 0x400) return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

// A NaN stays one: sign and leading payload kept, made quiet.
BNB_INLINE constexpr void from_float(float x, float& to) { to = x; }
BNB_INLINE constexpr void from_float(float x, BFloat16& to) {
  const uint32_t b = bits_of(x);
  to.bits = static_cast<uint16_t>((b & 0x7fffffff) > 0x7f800000 ? b >> 16 | 0x40 : (b + 0x7fff + (b >> 16 & 1)) >> 16);
}
BNB_INLINE constexpr void from_float(float x, Half& to) {
  const uint32_t b = bits_of(x), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  uint32_t h = 0;
  if (magnitude > 0x7f800000)
    h = 0x7e00 | (magnitude >> 13 & 0x1ff);
  else if (magnitude >= 0x47800000)  // 2^16 and above; 65520..65535 round up below
    h = 0x7c00;
  else if (magnitude < 0x38800000)  // a subnormal result: the adder rounds at the right bit
    h = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  else
    h = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  to.bits = static_cast<uint16_t>(sign | h);
}
template <class T> BNB_INLINE constexpr T rounded(float x) {
  T to{};
  from_float(x, to);
  return to;
}

// One element at an address that need not be aligned.
template <class T> BNB_INLINE float read(const T* from) {
  T x{};
  __builtin_memcpy(&x, from, sizeof(T));
  return to_float(x);
}
template <class T> BNB_INLINE void write(T* to, T x) { __builtin_memcpy(to, &x, sizeof(T)); }

}  // namespace bnb
