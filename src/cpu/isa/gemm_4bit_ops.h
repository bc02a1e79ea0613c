// The vector operations of the 4-bit product, by width. A group is 64 weights: 32 bytes of codes, read into lanes of 64 / lanes codes each.
// Vector i of a decoded group holds code i of every lane, so activations are brought into the same order first (`permute`).
#pragma once

#include "common/convert.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bnb::cpu {
namespace {

inline constexpr int kGroup = 64;

// Where element e of a group goes: the high nibble, at shift 4, is the even element.
template <int lanes> constexpr int position(int e) {
  constexpr int per_lane = kGroup / lanes;
  return ((e % per_lane) ^ 1) * lanes + e / per_lane;
}

// Every specialisation gives
//   tile_rows            rows of activations in a tile of 4 columns that fits the registers
//   decode<T, split>     64 weights value * absmax, rounded to T; `split`: the second half of the group has an absmax of its own
//   permute              64 activations as fp32
//   add_lanes            to[i] (+)= sum of the lanes of vector i
//   nested               one vector of fl(code[codes[i]] * scale) + offset
template <class Isa, int lanes = Isa::lanes> struct Gemm4Ops;

template <class Isa> struct Gemm4Ops<Isa, 1> {
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
    for (int e = 0; e < kGroup; ++e) to[position<1>(e)] = Isa::load(x + e);
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

#if defined(__AVX2__)
template <class Isa> struct Gemm4Ops<Isa, 8> {
  static constexpr int tile_rows = 3;
  struct Table {
    __m256 low, high;
  };
  BNB_INLINE static Table table(const float* values) { return {_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)}; }

  template <class T> BNB_INLINE static __m256 scaled(__m256 values, float absmax) {
    const __m256 w = _mm256_mul_ps(values, _mm256_set1_ps(absmax));
    if constexpr (dtype_of<T> == DType::f16) return _mm256_cvtph_ps(_mm256_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
    if constexpr (dtype_of<T> == DType::bf16) return _mm256_castsi256_ps(_mm256_slli_epi32(Isa::round_bf16(w), 16));
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
    for (int e = 0; e < kGroup; e += 8) _mm256_storeu_ps(plain + e, Isa::load(x + e));
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
#endif

#if defined(__AVX512F__)
template <class Isa> struct Gemm4Ops<Isa, 16> {
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
    const __m512 a = Isa::load(x), b = Isa::load(x + 16), c = Isa::load(x + 32), d = Isa::load(x + 48);
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
#endif

#if defined(__AVX512BF16__)
// bf16 weights and activations, 32 in a vector: byte j of a group in lane j. vcvtne2ps2bf16 and vdpbf16ps take subnormals for zero.
struct Bf16Ops {
  static constexpr int tile_rows = 6, lanes = 32;
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
  // One instruction in place: from the intrinsic GCC 12 copies and spills the sums of a tile.
  BNB_INLINE static __m512 mul_add(__m512i a, __m512i b, __m512 c) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(a), "v"(b));
    return c;
  }
};
#endif

}  // namespace
}  // namespace bnb::cpu
