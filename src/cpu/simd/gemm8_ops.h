// The vector operations of the int8 product, by width: dot products along k of rows as they are stored.
//
// Every specialisation gives
//   tile_rows    rows of a in a tile of 4 rows of b that fits the registers
//   Element      what rows of a are packed as
//   step         elements of k in a vector
//   shifted      b is taken as b + 128, so that 128 times the sum of a row of a must come off: sum(row, n), n whole vectors
//   load_b       `step` elements of b; load_b(p, n): the first n of them, whatever behind (a is zero there)
//   dot          c + b . a by lanes
//   add_lanes    to[i] = sum of the lanes of vector i
#pragma once

#include <cstring>

#include "../convert.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bnb::cpu {
namespace {

template <class Isa, int lanes = Isa::lanes> struct Gemm8Ops;

template <class Isa> struct Gemm8Ops<Isa, 1> {
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

#if defined(__AVX2__)
// 16-bit operands: vpmaddubsw would saturate.
template <class Isa> struct Gemm8Ops<Isa, 8> {
  static constexpr int tile_rows = 3, step = 16;
  static constexpr bool shifted = false;
  using Element = int16_t;
  using Vec = __m256i;
  BNB_INLINE static Vec zero() { return _mm256_setzero_si256(); }
  BNB_INLINE static Vec load_a(const Element* p) { return _mm256_loadu_si256(reinterpret_cast<const Vec*>(p)); }
  BNB_INLINE static Vec load_b(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) {
    int8_t all[step] = {};
    std::memcpy(all, p, static_cast<size_t>(n));
    return load_b(all);
  }
  BNB_INLINE static Vec dot(Vec b, Vec a, Vec c) { return _mm256_add_epi32(c, _mm256_madd_epi16(b, a)); }
  BNB_INLINE static void add_lanes(Vec a, Vec b, Vec c, Vec d, int32_t* to) {
    const Vec half = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
};
#endif

#if defined(__AVX512F__)
template <class Isa> struct Gemm8Ops<Isa, 16> {
  using Vec = __m512i;
  static constexpr int tile_rows = 6;
  BNB_INLINE static Vec zero() { return _mm512_setzero_si512(); }
  BNB_INLINE static Vec load_a(const void* p) { return _mm512_loadu_si512(p); }
  BNB_INLINE static void add_lanes(Vec a, Vec b, Vec c, Vec d, int32_t* to) {
    const Vec ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const Vec cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const Vec quarter = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(quarter), _mm512_extracti64x4_epi64(quarter, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
#if defined(__AVX512VNNI__)
  static constexpr int step = 64;
  static constexpr bool shifted = true;  // vpdpbusd is unsigned times signed
  using Element = int8_t;
  BNB_INLINE static Vec shift(Vec b) { return _mm512_xor_si512(b, _mm512_set1_epi8(-128)); }
  BNB_INLINE static Vec load_b(const int8_t* p) { return shift(_mm512_loadu_si512(p)); }
  BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) { return shift(_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p)); }
  // One instruction in place: from the intrinsic GCC 12 copies and spills the sums of a tile.
  BNB_INLINE static Vec dot(Vec b, Vec a, Vec c) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(b), "v"(a));
    return c;
  }
  BNB_INLINE static int32_t sum(const Element* row, int64_t n) {
    Vec c = zero();
    for (int64_t k = 0; k < n; k += step) c = dot(_mm512_set1_epi8(1), load_a(row + k), c);
    return _mm512_reduce_add_epi32(c);
  }
#else
  static constexpr int step = 32;
  static constexpr bool shifted = false;
  using Element = int16_t;
  BNB_INLINE static Vec load_b(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
  }
  BNB_INLINE static Vec dot(Vec b, Vec a, Vec c) { return _mm512_add_epi32(c, _mm512_madd_epi16(b, a)); }
#endif
};
#endif

}  // namespace
}  // namespace bnb::cpu
