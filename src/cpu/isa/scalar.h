// The reference instruction set: plain C++, one element at a time. Every other one must give the same bytes.
#pragma once

#include "common/convert.h"
#include "cpu/isa/isa.h"
#include "cpu/kernels/plain.h"

#include <string_view>

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Scalar : Capabilities {
  static constexpr std::string_view name = "scalar";
  static constexpr int lanes = 1;
  using F32 = float;
  using Mask = bool;

  template <class T> BNB_INLINE static F32 load(const T* p) { return read(p); }
  BNB_INLINE static F32 load(const int32_t* p) { return static_cast<float>(*p); }
  template <class T> BNB_INLINE static void store(T* p, F32 x) { write(p, rounded<T>(x)); }
  BNB_INLINE static F32 zero() { return 0; }
  BNB_INLINE static F32 set1(float x) { return x; }
  BNB_INLINE static F32 add(F32 a, F32 b) { return a + b; }
  BNB_INLINE static F32 mul(F32 a, F32 b) { return a * b; }

  BNB_INLINE static F32 fma(F32 a, F32 b, F32 c) { return __builtin_fmaf(a, b, c); }
  BNB_INLINE static F32 div(F32 a, F32 b) { return a / b; }
  BNB_INLINE static F32 sqrt(F32 x) { return __builtin_sqrtf(x); }
  BNB_INLINE static F32 min(F32 a, F32 b) { return a < b ? a : b; }
  BNB_INLINE static F32 max(F32 a, F32 b) { return a > b ? a : b; }
  BNB_INLINE static F32 sign(F32 x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
  BNB_INLINE static Mask finite(F32 x) { return __builtin_isfinite(x); }
  BNB_INLINE static Mask nonzero(Mask mask, F32 x) { return mask && x != 0; }
  BNB_INLINE static F32 select(Mask mask, F32 a, F32 b) { return mask ? a : b; }
  BNB_INLINE static F32 max_magnitude(F32 most, F32 x) { return __builtin_fabsf(x) > most ? __builtin_fabsf(x) : most; }
  BNB_INLINE static float greatest(F32 x) { return x; }
  template <class T> BNB_INLINE static void store_pair(T* p, F32 a, F32 b) {
    store(p, a);
    store(p + 1, b);
  }
  template <class T> BNB_INLINE static bool any_large(const T* x, int n) {
    uint32_t any = 0;
    for (int i = 0; i < n; ++i) any |= bits_of(read(x + i));
    return any >> 30 & 1;
  }

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
  template <bool> using DecodeState = Decode8<float, false>;

  struct Gemm4bitOps {
    static constexpr int tile_rows = 2;
    using Table = const float*;
    BNB_INLINE static Table table(const float* values) { return values; }

    template <class T, bool split>
    BNB_INLINE static void decode(Table values, const uint8_t* codes, float first, float second, float (&w)[kGroup]) {
      for (int e = 0; e < kGroup; ++e) {
        const float absmax = split && e >= kGroup / 2 ? second : first;
        w[position<1>(e)] = to_float(rounded<T>(values[codes[e / 2] >> (e % 2 ? 0 : 4) & 15] * absmax));
      }
    }
    template <class T> BNB_INLINE static void permute(const T* x, float* to) {
      for (int e = 0; e < kGroup; ++e) to[position<1>(e)] = read(x + e);
    }
    BNB_INLINE static void add_lanes(float a, float b, float c, float d, bool first, float* to) {
      const float sums[] = {a, b, c, d};
      for (int i = 0; i < 4; ++i) to[i] = first ? sums[i] : to[i] + sums[i];
    }
    BNB_INLINE static float nested(const float* code, const uint8_t* codes, float scale, float offset) {
      const float scaled = code[*codes] * scale;
      return scaled + offset;
    }
    BNB_INLINE static float mul_add(float a, float b, float c) { return a * b + c; }
  };

  struct GemmInt8Ops {
    static constexpr int tile_rows = 2, step = 1;
    static constexpr bool shifted = false;
    using Element = int8_t;
    using Vec = int32_t;
    BNB_INLINE static Vec zero() { return 0; }
    BNB_INLINE static Vec load_a(const Element* p) { return *p; }
    BNB_INLINE static Vec load_b(const int8_t* p) { return *p; }
    BNB_INLINE static Vec load_b(const int8_t* p, int64_t) { return *p; }
    BNB_INLINE static Vec dot(Vec b, Vec a, Vec c) { return c + b * a; }
    BNB_INLINE static void add_lanes(Vec a, Vec b, Vec c, Vec d, int32_t* to) { to[0] = a, to[1] = b, to[2] = c, to[3] = d; }
  };
};

}  // namespace
}  // namespace bnb::cpu
