// The operations of products on AVX-512 (cpu/isa/isa.h says what each does), on VNNI and on BF16.
#pragma once

#include "cpu/isa/avx512_vectors.h"

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Avx512Gemm4bit {
  static constexpr int tile_rows = 6;
  using Table = __m512;
  BNB_INLINE static Table table(const float* values) { return _mm512_loadu_ps(values); }

  template <class T> BNB_INLINE static __m512 scaled(__m512 values, float absmax) {
    const __m512 w = _mm512_mul_ps(values, _mm512_set1_ps(absmax));
    if constexpr (dtype_of<T> == DType::f16) return _mm512_cvtph_ps(_mm512_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
    if constexpr (dtype_of<T> == DType::bf16) {
      const __m512i b = _mm512_castps_si512(w), odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
      const __m512i near = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
      const __mmask16 nan = _mm512_cmp_ps_mask(w, w, _CMP_UNORD_Q);
      return _mm512_castsi512_ps(_mm512_and_si512(_mm512_mask_mov_epi32(near, nan, b), _mm512_set1_epi32(-0x10000)));
    }
    return w;
  }
  template <class T, bool split>
  BNB_INLINE static void decode(Table values, const uint8_t* codes, float first, float second, __m512 (&w)[4]) {
    const __m512i v = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i index[] = {v, _mm512_srli_epi32(v, 4), _mm512_srli_epi32(v, 8), _mm512_srli_epi32(v, 12)};
    const __m512 a = scaled<T>(values, first);
    if constexpr (split) {
      const __m512 b = scaled<T>(values, second);
      const __m512i nibble = _mm512_set1_epi32(15), half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 16, 16, 16, 16, 16, 16, 16, 16);
      for (int i = 0; i < 4; ++i) w[i] = _mm512_permutex2var_ps(a, _mm512_ternarylogic_epi32(index[i], nibble, half, 0xea), b);
    } else {
      for (int i = 0; i < 4; ++i) w[i] = _mm512_permutexvar_ps(index[i], a);  // looks at the low 4 bits
    }
  }
  template <class T> BNB_INLINE static void permute(const T* x, float* to) {
    const __m512 a = Avx512Vectors::load(x), b = Avx512Vectors::load(x + 16), c = Avx512Vectors::load(x + 32),
                 d = Avx512Vectors::load(x + 48);
    for (int i = 0; i < 4; ++i) {
      const int s = i ^ 1;
      const __m512i step =
          _mm512_add_epi32(_mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28), _mm512_set1_epi32(s));
      const __m512 low = _mm512_permutex2var_ps(a, step, b), high = _mm512_permutex2var_ps(c, step, d);
      _mm512_storeu_ps(to + 16 * i, _mm512_mask_mov_ps(low, 0xff00, high));
    }
  }
  BNB_INLINE static void add_lanes(__m512 a, __m512 b, __m512 c, __m512 d, bool first, float* to) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    const __m512 quarter = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(quarter), _mm512_extractf32x8_ps(quarter, 1));
    const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    _mm_storeu_ps(to, first ? sums : _mm_add_ps(_mm_loadu_ps(to), sums));
  }
  BNB_INLINE static __m512 nested(const float* code, const uint8_t* codes, float scale, float offset) {
    const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_add_ps(_mm512_mul_ps(_mm512_i32gather_ps(index, code, 4), _mm512_set1_ps(scale)), _mm512_set1_ps(offset));
  }
  BNB_INLINE static __m512 mul_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
};

// bf16 weights and activations, 32 in a vector: byte j of a group in lane j. vcvtne2ps2bf16 and vdpbf16ps take subnormals for zero.
struct Avx512Bf16Dot {
  static constexpr int tile_rows = 6, lanes = 32;
  using Element = uint16_t;
  using Vec = __m512i;
  using Sum = __m512;
  using Table = __m512;
  BNB_INLINE static Table table(const float* values) { return _mm512_loadu_ps(values); }

  template <bool split> BNB_INLINE static void decode(Table values, const uint8_t* codes, float first, float second, __m512i (&w)[2]) {
    __m512i v = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    __m512i high = _mm512_srli_epi16(v, 4);
    const __m512 a = _mm512_mul_ps(values, _mm512_set1_ps(first));
    __m512 b = a;  // both halves of the table alike: bit 4 of an index does not matter
    if constexpr (split) {
      b = _mm512_mul_ps(values, _mm512_set1_ps(second));
      const __m512i nibble = _mm512_set1_epi16(15), half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
      v = _mm512_ternarylogic_epi32(v, nibble, half, 0xea);
      high = _mm512_ternarylogic_epi32(high, nibble, half, 0xea);
    }
    const auto table = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    w[0] = _mm512_permutexvar_epi16(v, table);
    w[1] = _mm512_permutexvar_epi16(high, table);
  }
  BNB_INLINE static void permute(const BFloat16* x, __m512i (&to)[2]) {
    const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 32);
    const __m512i lanes32 = _mm512_cvtepu8_epi16(_mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
                                                                  21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31));
    const __m512i even = _mm512_slli_epi16(lanes32, 1);
    to[0] = _mm512_permutex2var_epi16(a, _mm512_or_si512(even, _mm512_set1_epi16(1)), b);
    to[1] = _mm512_permutex2var_epi16(a, even, b);
  }
  BNB_INLINE static Vec load(const Element* p) { return _mm512_loadu_si512(p); }
  BNB_INLINE static void store(Element* p, Vec v) { _mm512_storeu_si512(p, v); }
  // One instruction in place: from the intrinsic GCC 12 copies and spills the sums of a tile.
  BNB_INLINE static __m512 mul_add(__m512i a, __m512i b, __m512 c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
};

// What int8 products have in common, whatever their dot products are.
struct Avx512Int32 {
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
};

struct Avx512GemmInt8 : Avx512Int32 {
  static constexpr int step = 32;
  static constexpr bool shifted = false;
  using Element = int16_t;
  BNB_INLINE static Vec load_b(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  BNB_INLINE static Vec load_b(const int8_t* p, int64_t n) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
  }
  BNB_INLINE static Vec dot(Vec x, Vec y, Vec c) { return _mm512_add_epi32(c, _mm512_madd_epi16(x, y)); }
};

struct Avx512VnniGemmInt8 : Avx512Int32 {
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
};

}  // namespace
}  // namespace bnb::cpu
