// What quantization of rows and of columns to int8 share; docs/NUMERICS.md has the rules.
#pragma once

#include <bit>

#include "cuda/device/span.cuh"

namespace bnb::cuda::gemm {

using dev::Bits;

inline constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;
inline constexpr uint32_t kNoLimit = 0x80000000;  // above all bits of |x|, NaN included

// Outliers: limit <= |x| <= infinity, compared as bits.
inline uint32_t limit_of(float threshold) { return threshold > 0 ? std::bit_cast<uint32_t>(threshold) : kNoLimit; }
BNB_DEVICE bool is_outlier(float x, uint32_t limit) {
  const uint32_t magnitude = dev::float_bits(x) & 0x7fffffff;
  return magnitude >= limit && magnitude <= kInfinity;
}

// x * (127 * (1 / scale)) as x * first * second. second is 0 where all codes are 0.
struct Factors {
  float first = 1, second = 0;
  BNB_DEVICE explicit Factors(float scale) {
    if (!(scale > 0) || !finite(scale)) return;
    if (scale < 0x1p-100f) first = 0x1p100f;  // 1 / scale might be infinite
    second = dev::mul(127.0f, dev::reciprocal(dev::mul(scale, first)));
  }
};
// The low byte is the integer nearest to v, ties to even.
BNB_DEVICE uint32_t code(float v) { return dev::float_bits(dev::add(v, 0x1.8p23f)); }
template <int n> BNB_DEVICE Bits<n> pack_codes(const uint32_t (&q)[n]) {
  Bits<n> packed;
  BNB_UNROLL
  for (int i = 0; i < n; i += 4)
    packed.word[i / 4] = dev::permute(dev::permute(q[i], q[i + 1], 0x0040), dev::permute(q[i + 2], q[i + 3], 0x0040), 0x5410);
  return packed;
}

// The largest |x| of a unit, as fp32 bits.
template <class T> BNB_DEVICE uint32_t largest_of(const Bits<16>& raw) {
  constexpr uint32_t kMagnitude = sizeof(T) == 4 ? 0x7fffffff : 0x7fff7fff;
  uint32_t m = raw.word[0] & kMagnitude;
  BNB_UNROLL
  for (int i = 1; i < 4; ++i) m = greater<T>(m, raw.word[i] & kMagnitude);
  if constexpr (sizeof(T) == 4) {
    return m;
  } else {
    float low, high;
    dev::unpack<T>(m, low, high);
    return dev::float_bits(low) > dev::float_bits(high) ? dev::float_bits(low) : dev::float_bits(high);
  }
}

// A row of x in units of 16 bytes. `vectors`: at aligned addresses.
template <class T> struct Row {
  const uint8_t* x;
  int64_t columns, units;
  bool vectors;
  BNB_DEVICE Row(const uint8_t* all, int64_t row, int64_t columns, bool vectors)
      : x(all + row * columns * static_cast<int64_t>(sizeof(T))),
        columns(columns),
        units((columns + kPerUnit<T> - 1) / kPerUnit<T>),
        vectors(vectors) {}
  // Zeros past the end.
  BNB_DEVICE Bits<16> load(int64_t unit) const {
    if (!vectors) return load_bytes<Bits<16>>(x, unit * 16, columns * static_cast<int64_t>(sizeof(T)));
    return unit < units ? dev::load_const<Bits<16>>(x + unit * 16) : Bits<16>{};
  }
};

template <class T> bool vectors_of(const void* x, int64_t columns, const void* codes) {
  return columns % kPerUnit<T> == 0 && dev::aligned(x, 16) && dev::aligned(codes, kPerUnit<T>);
}

}  // namespace bnb::cuda::gemm
