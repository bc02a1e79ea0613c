// The reference instruction set: plain C++, one element at a time. Every other one must give the same bytes.
#pragma once

#include "common/convert.h"
#include "cpu/kernels/plain.h"

#include <string_view>

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Scalar {
  static constexpr std::string_view name = "scalar";
  static constexpr int lanes = 1;
  using F32 = float;

  template <class T> BNB_INLINE static F32 load(const T* p) { return read(p); }
  BNB_INLINE static F32 load(const int32_t* p) { return static_cast<float>(*p); }
  template <class T> BNB_INLINE static void store(T* p, F32 x) { write(p, rounded<T>(x)); }
  BNB_INLINE static F32 zero() { return 0; }
  BNB_INLINE static F32 set1(float x) { return x; }
  BNB_INLINE static F32 add(F32 a, F32 b) { return a + b; }
  BNB_INLINE static F32 mul(F32 a, F32 b) { return a * b; }

  static constexpr bool can_stream = false, has_dynamic8 = false;
  static void fence() {}

  // The largest |x| as the bits of an fp32. As integers a NaN is above infinity, and that above every number. n: whole chunks, as below.
  template <class T> static uint32_t max_bits(const T* x, int64_t n) {
    uint32_t most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t b = bits_of(read(x + i)) & 0x7fffffff;
      most = b > most ? b : most;
    }
    return most;
  }

  template <class Format> struct Encode4 {
    template <class T> void operator()(const T* x, int64_t n, float inv, uint8_t* codes) const { encode4<Format>(x, n, inv, codes); }
  };

  template <class Format, class T, bool stream> struct Decode4 {
    void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      T table[16];
      for (int c = 0; c < 16; ++c) from_float(Format::values.data()[c] * absmax, table[c]);
      for (int64_t i = 0; i < n / 2; ++i) write(out + 2 * i, table[codes[i] >> 4]), write(out + 2 * i + 1, table[codes[i] & 15]);
    }
  };

  template <class T, bool stream> struct Decode8 {
    const float* value;
    void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      for (int64_t i = 0; i < n; ++i) write(out + i, rounded<T>(value[codes[i]] * absmax));
    }
  };
};

}  // namespace
}  // namespace bnb::cpu
