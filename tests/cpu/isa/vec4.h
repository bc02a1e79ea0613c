// Four lanes in the vectors that GCC and Clang have on every machine: no intrinsic, no compiler flag. It keeps the kernels open to
// instruction sets of this width (NEON), shows what one must supply at least, and passes every test of the kernels.
#pragma once

#include <string_view>

#include "cpu/isa/isa.h"
#include "cpu/kernels/plain.h"

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Vec4 : Capabilities {
  static constexpr std::string_view name = "vec4";
  static constexpr int lanes = 4;
  typedef float F32 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  typedef uint32_t U32 __attribute__((vector_size(16)));
  using Mask = I32;  // 0 or -1

  BNB_INLINE static U32 bits(F32 x) { return __builtin_bit_cast(U32, x); }
  BNB_INLINE static F32 floats(U32 x) { return __builtin_bit_cast(F32, x); }
  // f(lane) for each.
  template <class V, class F> BNB_INLINE static V each(F&& f) { return V{f(0), f(1), f(2), f(3)}; }

  BNB_INLINE static F32 load(const float* p) {
    F32 x;
    __builtin_memcpy(&x, p, sizeof(x));
    return x;
  }
  BNB_INLINE static F32 load(const int32_t* p) {
    I32 x;
    __builtin_memcpy(&x, p, sizeof(x));
    return __builtin_convertvector(x, F32);
  }
  template <class T> BNB_INLINE static F32 load(const T* p) {
    return each<F32>([&](int i) { return read(p + i); });
  }
  BNB_INLINE static void store(float* p, F32 x) { __builtin_memcpy(p, &x, sizeof(x)); }
  template <class T> BNB_INLINE static void store(T* p, F32 x) {
    for (int i = 0; i < lanes; ++i) write(p + i, rounded<T>(x[i]));
  }
  template <class T> BNB_INLINE static void store_pair(T* p, F32 a, F32 b) {
    store(p, a);
    store(p + lanes, b);
  }

  BNB_INLINE static F32 zero() { return F32{}; }
  BNB_INLINE static F32 set1(float x) { return F32{x, x, x, x}; }
  BNB_INLINE static F32 add(F32 a, F32 b) { return a + b; }
  BNB_INLINE static F32 mul(F32 a, F32 b) { return a * b; }
  BNB_INLINE static F32 div(F32 a, F32 b) { return a / b; }
  BNB_INLINE static F32 fma(F32 a, F32 b, F32 c) {
    return each<F32>([&](int i) { return __builtin_fmaf(a[i], b[i], c[i]); });
  }
  BNB_INLINE static F32 sqrt(F32 x) {
    return each<F32>([&](int i) { return __builtin_sqrtf(x[i]); });
  }
  BNB_INLINE static F32 select(Mask mask, F32 a, F32 b) {
    const U32 m = __builtin_bit_cast(U32, mask);
    return floats((bits(a) & m) | (bits(b) & ~m));
  }
  BNB_INLINE static F32 min(F32 a, F32 b) { return select(a < b, a, b); }
  BNB_INLINE static F32 max(F32 a, F32 b) { return select(a > b, a, b); }
  BNB_INLINE static U32 magnitude(F32 x) { return bits(x) & 0x7fffffff; }
  BNB_INLINE static F32 sign(F32 x) { return select(x > zero(), set1(1), select(x < zero(), set1(-1), zero())); }
  BNB_INLINE static Mask finite(F32 x) { return magnitude(x) < 0x7f800000u; }
  BNB_INLINE static Mask nonzero(Mask mask, F32 x) { return mask & (x != zero()); }
  BNB_INLINE static F32 max_magnitude(F32 most, F32 x) { return max(floats(magnitude(x)), most); }
  BNB_INLINE static float greatest(F32 x) {
    const F32 two = max(x, F32{x[2], x[3], x[0], x[1]});
    return two[0] > two[1] ? two[0] : two[1];
  }

  template <class T> static uint32_t max_bits(const T* x, int64_t n) {
    U32 most = {};
    for (int64_t i = 0; i < n; i += lanes) {
      const U32 m = magnitude(load(x + i)), larger = __builtin_bit_cast(U32, m > most);
      most = (m & larger) | (most & ~larger);
    }
    uint32_t all = 0;
    for (int i = 0; i < lanes; ++i) all = most[i] > all ? most[i] : all;
    return all;
  }
  template <class T> static bool any_large(const T* x, int n) {
    U32 any = {};
    for (int i = 0; i < n; i += lanes) any |= bits(load(x + i));
    return ((any[0] | any[1] | any[2] | any[3]) >> 30 & 1) != 0;
  }

  // The number of thresholds below each lane; a comparison is 0 or -1.
  template <class Format> struct Encode4 {
    template <class T> void operator()(const T* x, int64_t n, float inv, uint8_t* codes) const {
      for (; n > 0; n -= lanes, x += lanes, codes += lanes / 2) {
        const F32 t = mul(load(x), set1(inv));
        I32 below = {};
        for (const float threshold : Format::thresholds) below -= t > set1(threshold);
        for (int i = 0; i < lanes; i += 2)
          codes[i / 2] = static_cast<uint8_t>(Format::codes.data()[below[i]] << 4 | Format::codes.data()[below[i + 1]]);
      }
    }
  };
  template <class Format, class T, bool stream> struct Decode4 {
    void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      T table[16];
      for (int c = 0; c < 16; c += lanes) store(table + c, mul(load(Format::values.data() + c), set1(absmax)));
      for (int64_t i = 0; i < n; i += 2) write(out + i, table[codes[i / 2] >> 4]), write(out + i + 1, table[codes[i / 2] & 15]);
    }
  };
  template <class T, bool stream> struct Decode8 {
    const float* value;
    void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      for (int64_t i = 0; i < n; i += lanes) store(out + i, mul(each<F32>([&](int j) { return value[codes[i + j]]; }), set1(absmax)));
    }
  };
  template <bool> using DecodeState = Decode8<float, false>;

  struct Gemm4bitOps {
    static constexpr int tile_rows = 3;
    using Table = const float*;
    BNB_INLINE static Table table(const float* values) { return values; }

    // Lane l holds the codes of bytes [8 l, 8 l + 8).
    template <class T, bool split>
    BNB_INLINE static void decode(Table values, const uint8_t* codes, float first, float second, F32 (&w)[kGroup / lanes]) {
      T tables[2][16];
      for (int c = 0; c < 16; c += lanes) {
        store(tables[0] + c, mul(load(values + c), set1(first)));
        store(tables[1] + c, mul(load(values + c), set1(split ? second : first)));
      }
      for (int i = 0; i < kGroup / lanes; ++i)
        w[i] = each<F32>([&](int l) { return to_float(tables[l / 2][codes[8 * l + i / 2] >> (4 * (i % 2)) & 15]); });
    }
    template <class T> BNB_INLINE static void permute(const T* x, float* to) {
      for (int e = 0; e < kGroup; ++e) to[position<lanes>(e)] = read(x + e);
    }
    BNB_INLINE static void add_lanes(F32 a, F32 b, F32 c, F32 d, bool first, float* to) {
      const F32 v[] = {a, b, c, d};
      const F32 sums = each<F32>([&](int i) { return (v[i][0] + v[i][2]) + (v[i][1] + v[i][3]); });
      store(to, first ? sums : load(to) + sums);
    }
    BNB_INLINE static F32 nested(const float* code, const uint8_t* codes, float scale, float offset) {
      return each<F32>([&](int i) { return code[codes[i]]; }) * set1(scale) + set1(offset);
    }
    BNB_INLINE static F32 mul_add(F32 a, F32 b, F32 c) { return a * b + c; }
  };

  // Lanes of two 16-bit elements.
  struct GemmInt8Ops {
    static constexpr int tile_rows = 3, step = 2 * lanes, tile_sums = 12, tile_vectors = 2;
    static constexpr bool shifted = false;
    using Element = int16_t;
    using Vec = I32;
    BNB_INLINE static Vec zero() { return Vec{}; }
    BNB_INLINE static Vec load_a(const void* p) {
      Vec v;
      __builtin_memcpy(&v, p, sizeof(v));
      return v;
    }
    BNB_INLINE static Vec load_b(const int8_t* p) { return load_b(p, step); }
    BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) {
      Element wide[step] = {};
      for (int64_t i = 0; i < n; ++i) wide[i] = p[i];
      return load_a(wide);
    }
    BNB_INLINE static Vec dot(Vec x, Vec y, Vec c) { return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16) + c; }
    BNB_INLINE static Vec broadcast(const void* p) {
      const int32_t word = load_word(p);
      return Vec{word, word, word, word};
    }
    BNB_INLINE static void store(int32_t* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
    BNB_INLINE static void keep(Vec) {}
    BNB_INLINE static void add_lanes(Vec a, Vec b, Vec c, Vec d, int32_t* to) {
      const Vec v[] = {a, b, c, d};
      for (int i = 0; i < 4; ++i) to[i] = v[i][0] + v[i][1] + v[i][2] + v[i][3];
    }
    BNB_INLINE static void put_rows(Vec a, Vec b, Vec c, Vec d, int32_t* to, int64_t stride) {
      for (int i = 0; i < lanes; ++i) store(to + i * stride, Vec{a[i], b[i], c[i], d[i]});
    }
  };
};

}  // namespace
}  // namespace bnb::cpu
