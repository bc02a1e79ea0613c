// How the block-wise kernels map elements to threads. A warp takes a span of 4 rows of 32 lanes x 16 bytes, so that accesses of T are whole
// rows of 512 bytes: element i of a lane's unit (0..3) is span + (unit * 32 + lane) * kPerUnit + i.
// A block of 32 to 4096 elements is then a group of lanes, several rows, or several warps.
#pragma once

#include "cuda/device/ptx.cuh"

namespace bnb::cuda {

inline constexpr int kUnits = 4;
template <class T> inline constexpr int kPerUnit = 16 / sizeof(T);
template <class T> inline constexpr int kSpan = kUnits * dev::kWarp * kPerUnit<T>;  // 512 of fp32, 1024 of 16 bits

template <class T> BNB_DEVICE int64_t unit_begin(int64_t span, int unit) {
  return span + (unit * static_cast<int>(dev::kWarp) + static_cast<int>(dev::lane())) * kPerUnit<T>;
}

// Bytes [at, at + sizeof(V)) of `size` bytes at any address; zeros past the end.
template <class V> BNB_DEVICE V load_bytes(const uint8_t* from, int64_t at, int64_t size) {
  V v = {};
  constexpr int kWord = sizeof(v.word[0]);
  BNB_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(V)); ++i)
    if (at + i < size) v.word[i / kWord] |= uint32_t{from[at + i]} << i % kWord * 8;
  return v;
}
template <class V> BNB_DEVICE void store_bytes(uint8_t* to, int64_t at, int64_t size, const V& v) {
  constexpr int kWord = sizeof(v.word[0]);
  BNB_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(V)); ++i)
    if (at + i < size) to[at + i] = static_cast<uint8_t>(v.word[i / kWord] >> i % kWord * 8);
}

// Element i at any address.
template <class T> BNB_DEVICE float value_at(const void* from, int64_t i) {
  constexpr int64_t kSize = sizeof(T);
  const auto raw = load_bytes<dev::Bits<kSize>>(static_cast<const uint8_t*>(from), i * kSize, (i + 1) * kSize);
  if constexpr (kSize == 4)
    return dev::bits_float(raw.word[0]);
  else
    return dev::to_float(T{raw.word[0]});
}
BNB_DEVICE float value_at(const void* from, DType type, int64_t i) {
  if (type == DType::f32) return value_at<float>(from, i);
  if (type == DType::f16) return value_at<Half>(from, i);
  return value_at<BFloat16>(from, i);
}

// The elements of a unit as floats.
template <class T> BNB_DEVICE void to_floats(const dev::Bits<16>& raw, float (&x)[kPerUnit<T>]) {
  BNB_UNROLL
  for (int i = 0; i < 4; ++i)
    if constexpr (sizeof(T) == 4)
      x[i] = dev::bits_float(raw.word[i]);
    else
      dev::unpack<T>(raw.word[i], x[2 * i], x[2 * i + 1]);
}

// Maximum of |x| as bits, in fp32 or in both halves of a word: bits are ordered as the numbers are, NaN above infinity.
template <class T> BNB_DEVICE uint32_t greater(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) return a > b ? a : b;
  if constexpr (sizeof(T) == 2) return dev::max_halves<T>(a, b);
}

BNB_DEVICE bool finite(float x) { return (dev::float_bits(x) & 0x7fffffff) < 0x7f800000; }

// A product whose NaNs have the CPU's bits: a NaN operand keeps its sign and payload and becomes quiet, 0 * infinity has the sign bit set.
// To be rounded by bnb::rounded, which keeps them.
BNB_DEVICE float product_with_nan(float value, float absmax) {
  constexpr uint32_t kQuiet = 0x00400000;
  uint32_t bits = dev::float_bits(dev::mul(value, absmax));
  if (value != value)
    bits = dev::float_bits(value) | kQuiet;
  else if (absmax != absmax)
    bits = dev::float_bits(absmax) | kQuiet;
  else if ((bits & 0x7fffffff) > 0x7f800000)
    bits = 0xffc00000;
  return dev::bits_float(bits);
}

// Launch shape. A multiprocessor holds `per_sm` blocks of `threads`; a grid has up to `rounds` times as many blocks as fit the device, and
// each block loops over further tiles.
struct Shape {
  uint32_t threads, per_sm, rounds;
  constexpr int warps() const { return static_cast<int>(threads / dev::kWarp); }
  template <class T> dev::Dim grid(int64_t n) const {
    const int64_t tile = int64_t{kSpan<T>} * warps(), tiles = n / tile + (n % tile != 0),
                  most = int64_t{rounds} * per_sm * dev::device().sms;
    return {static_cast<uint32_t>(tiles < most ? tiles : most)};
  }
};

}  // namespace bnb::cuda
