// The vector operations of the int8 product, by width: dot products along k of rows as they are stored.
//
// Every specialisation gives
//   tile_rows    rows of a in a tile of 4 rows of b that fits the registers
//   Element      what rows of a are packed as
//   step         elements of k in a vector
//   shifted      the first operand of `dot` is unsigned: it is taken as itself + 128, and 128 times the sum of the other one must come off.
//                add_bytes: c + 64 bytes, some to a lane
//   load_b       `step` elements of b, shifted; load_b(p, n): the first n of them, whatever behind (a is zero there)
//   dot          c + x . y by lanes
//   add_lanes    to[i] = sum of the lanes of vector i
// and with more than one lane
//   tile_sums    vectors of sums beside up to tile_vectors vectors of a
//   broadcast    4 bytes to every lane
//   keep         holds a register until here
//   put_rows     to[i * stride + j] = lane i of vector j
#pragma once

#include <cstring>

#include "common/convert.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bnb::cpu {
namespace {

template <class Isa, int lanes = Isa::lanes> struct Gemm8Ops;

BNB_INLINE int32_t load_word(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

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
template <class Isa> struct Gemm8Ops<Isa, 8> {
  using Vec = __m256i;
  static constexpr int tile_rows = 3, tile_sums = 12, tile_vectors = 2;
  BNB_INLINE static Vec zero() { return _mm256_setzero_si256(); }
  BNB_INLINE static Vec load_a(const void* p) { return _mm256_loadu_si256(static_cast<const Vec*>(p)); }
  BNB_INLINE static void store(int32_t* p, Vec v) { _mm256_storeu_si256(reinterpret_cast<Vec*>(p), v); }
  BNB_INLINE static void keep(Vec v) { asm volatile("" : : "x"(v)); }
  BNB_INLINE static Vec broadcast(const void* p) { return _mm256_set1_epi32(load_word(p)); }
  BNB_INLINE static void add_lanes(Vec a, Vec b, Vec c, Vec d, int32_t* to) {
    const Vec half = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  BNB_INLINE static void put_rows(Vec a, Vec b, Vec c, Vec d, int32_t* to, int64_t stride) {
    const Vec ab[2] = {_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)};
    const Vec cd[2] = {_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d)};
    for (int i = 0; i < 4; ++i, to += stride) {
      const Vec rows = i % 2 ? _mm256_unpackhi_epi64(ab[i / 2], cd[i / 2]) : _mm256_unpacklo_epi64(ab[i / 2], cd[i / 2]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(rows));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * stride), _mm256_extracti128_si256(rows, 1));
    }
  }
#if defined(__AVXVNNI__)
  static constexpr int step = 32;
  static constexpr bool shifted = true;  // vpdpbusd is unsigned times signed
  using Element = int8_t;
  BNB_INLINE static Vec add_bytes(const void* line, Vec c) {
    const char* p = static_cast<const char*>(line);
    return dot(_mm256_set1_epi8(1), load_a(p + step), dot(_mm256_set1_epi8(1), load_a(p), c));
  }
  BNB_INLINE static Vec add(Vec a, Vec b) { return _mm256_add_epi32(a, b); }
  BNB_INLINE static Vec shift(Vec b) { return _mm256_xor_si256(b, _mm256_set1_epi8(-128)); }
  BNB_INLINE static Vec load_b(const int8_t* p) { return shift(load_a(p)); }
  BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) {
    int8_t all[step] = {};
    std::memcpy(all, p, static_cast<size_t>(n));
    return load_b(all);
  }
  // One instruction in place (see below), in the encoding of machines without AVX-512.
  BNB_INLINE static Vec dot(Vec x, Vec y, Vec c) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(x), "x"(y));
    return c;
  }
#else
  // 16-bit operands: vpmaddubsw would saturate.
  static constexpr int step = 16;
  static constexpr bool shifted = false;
  using Element = int16_t;
  BNB_INLINE static Vec load_b(const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) {
    int8_t all[step] = {};
    std::memcpy(all, p, static_cast<size_t>(n));
    return load_b(all);
  }
  BNB_INLINE static Vec dot(Vec x, Vec y, Vec c) { return _mm256_add_epi32(c, _mm256_madd_epi16(x, y)); }
#endif
};
#endif

#if defined(__AVX512F__)
template <class Isa> struct Gemm8Ops<Isa, 16> {
  using Vec = __m512i;
  static constexpr int tile_rows = 6, tile_sums = 24, tile_vectors = 4;
  BNB_INLINE static Vec zero() { return _mm512_setzero_si512(); }
  BNB_INLINE static Vec load_a(const void* p) { return _mm512_loadu_si512(p); }
  BNB_INLINE static void store(int32_t* p, Vec v) { _mm512_storeu_si512(p, v); }
  BNB_INLINE static void keep(Vec v) { asm volatile("" : : "v"(v)); }
  BNB_INLINE static Vec broadcast(const void* p) { return _mm512_set1_epi32(load_word(p)); }
  BNB_INLINE static void add_lanes(Vec a, Vec b, Vec c, Vec d, int32_t* to) {
    const Vec ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const Vec cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const Vec quarter = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(quarter), _mm512_extracti64x4_epi64(quarter, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
  }
  BNB_INLINE static void put_rows(Vec a, Vec b, Vec c, Vec d, int32_t* to, int64_t stride) {
    const Vec ab[2] = {_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)};
    const Vec cd[2] = {_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d)};
    for (int i = 0; i < 4; ++i, to += stride) {
      const Vec rows = i % 2 ? _mm512_unpackhi_epi64(ab[i / 2], cd[i / 2]) : _mm512_unpacklo_epi64(ab[i / 2], cd[i / 2]);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(rows));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * stride), _mm512_extracti32x4_epi32(rows, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * stride), _mm512_extracti32x4_epi32(rows, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 12 * stride), _mm512_extracti32x4_epi32(rows, 3));
    }
  }
#if defined(__AVX512VNNI__)
  static constexpr int step = 64;
  static constexpr bool shifted = true;  // vpdpbusd is unsigned times signed
  using Element = int8_t;
  BNB_INLINE static Vec add_bytes(const void* line, Vec c) { return dot(_mm512_set1_epi8(1), load_a(line), c); }
  BNB_INLINE static Vec add(Vec a, Vec b) { return _mm512_add_epi32(a, b); }
  BNB_INLINE static Vec shift(Vec b) { return _mm512_xor_si512(b, _mm512_set1_epi8(-128)); }
  BNB_INLINE static Vec load_b(const int8_t* p) { return shift(load_a(p)); }
  BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) { return shift(_mm512_maskz_loadu_epi8((uint64_t{1} << n) - 1, p)); }
  // One instruction in place: from the intrinsic GCC 12 copies and spills the sums of a tile.
  BNB_INLINE static Vec dot(Vec x, Vec y, Vec c) {
    asm("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(x), "v"(y));
    return c;
  }
#else
  static constexpr int step = 32;
  static constexpr bool shifted = false;
  using Element = int16_t;
  BNB_INLINE static Vec load_b(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
  }
  BNB_INLINE static Vec dot(Vec x, Vec y, Vec c) { return _mm512_add_epi32(c, _mm512_madd_epi16(x, y)); }
#endif
};
#endif

}  // namespace
}  // namespace bnb::cpu
