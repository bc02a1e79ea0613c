// The operations of products on AVX2 (cpu/isa/isa.h says what each does), and on AVX-VNNI.
#pragma once

#include "cpu/isa/avx2_vectors.h"

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Avx2Gemm4bit {
  static constexpr int tile_rows = 3;
  struct Table {
    __m256 low, high;
  };
  BNB_INLINE static Table table(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }

  template <class T> BNB_INLINE static __m256 scaled(__m256 values, float absmax) {
    const __m256 w = _mm256_mul_ps(values, _mm256_set1_ps(absmax));
    if constexpr (dtype_of<T> == DType::f16) return _mm256_cvtph_ps(_mm256_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
    if constexpr (dtype_of<T> == DType::bf16) return _mm256_castsi256_ps(_mm256_slli_epi32(Avx2Vectors::round_bf16(w), 16));
    return w;
  }
  // vpermps looks at the low 3 bits of an index; bit 3, shifted into the sign, picks the half of the table.
  template <int i> BNB_INLINE static __m256 lookup(Table t, __m256i codes) {
    const __m256i index = _mm256_srli_epi32(codes, 4 * i);
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28 - 4 * i)));
  }
  template <class T, bool split>
  BNB_INLINE static void decode(const Table& values, const uint8_t* codes, float first, float second, __m256 (&w)[8]) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const Table a{scaled<T>(values.low, first), scaled<T>(values.high, first)};
    lookup_all(a, v, w);
    if constexpr (split) {
      const Table b{scaled<T>(values.low, second), scaled<T>(values.high, second)};
      __m256 u[8];
      lookup_all(b, v, u);
      for (int i = 0; i < 8; ++i) w[i] = _mm256_blend_ps(w[i], u[i], 0xf0);
    }
  }
  BNB_INLINE static void lookup_all(Table t, __m256i v, __m256 (&w)[8]) {
    w[0] = lookup<0>(t, v), w[1] = lookup<1>(t, v), w[2] = lookup<2>(t, v), w[3] = lookup<3>(t, v);
    w[4] = lookup<4>(t, v), w[5] = lookup<5>(t, v), w[6] = lookup<6>(t, v), w[7] = lookup<7>(t, v);
  }
  template <class T> BNB_INLINE static void permute(const T* x, float* to) {
    float plain[kGroup];
    for (int e = 0; e < kGroup; e += 8) _mm256_storeu_ps(plain + e, Avx2Vectors::load(x + e));
    const __m256i step = _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56);
    for (int i = 0; i < 8; ++i) _mm256_storeu_ps(to + 8 * i, _mm256_i32gather_ps(plain + (i ^ 1), step, 4));
  }
  BNB_INLINE static void add_lanes(__m256 a, __m256 b, __m256 c, __m256 d, bool first, float* to) {
    const __m256 half = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(to, first ? sums : _mm_add_ps(_mm_loadu_ps(to), sums));
  }
  BNB_INLINE static __m256 nested(const float* code, const uint8_t* codes, float scale, float offset) {
    const __m256i index = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    return _mm256_add_ps(_mm256_mul_ps(_mm256_i32gather_ps(code, index, 4), _mm256_set1_ps(scale)), _mm256_set1_ps(offset));
  }
  BNB_INLINE static __m256 mul_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
};

// What int8 products have in common, whatever their dot products are.
struct Avx2Int32 {
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
};

struct Avx2GemmInt8 : Avx2Int32 {
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
};

struct AvxVnniGemmInt8 : Avx2Int32 {
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
};

}  // namespace
}  // namespace bnb::cpu
