// AVX2, FMA, F16C: 8 lanes.
#pragma once

#include "../convert.h"

#include <immintrin.h>
#include <string_view>

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Avx2 {
  static constexpr std::string_view name = "avx2";
  static constexpr int lanes = 8;
  using F32 = __m256;
  using I32 = __m256i;

  BNB_INLINE static I32 bits(F32 x) { return _mm256_castps_si256(x); }
  BNB_INLINE static F32 floats(I32 x) { return _mm256_castsi256_ps(x); }
  BNB_INLINE static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  BNB_INLINE static F32 load(const float* p) { return _mm256_loadu_ps(p); }
  BNB_INLINE static F32 load(const Half* p) { return _mm256_cvtph_ps(load16(p)); }
  BNB_INLINE static F32 load(const BFloat16* p) { return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16)); }

  // The bf16 nearest to each lane, in the low halves. Integer arithmetic: the conversion instructions elsewhere flush subnormals.
  BNB_INLINE static I32 round_bf16(F32 x) {
    const I32 b = bits(x), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const I32 near = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
    const I32 nan = _mm256_or_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(near, nan, bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
  BNB_INLINE static void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
  BNB_INLINE static void store(Half* p, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  BNB_INLINE static void store(BFloat16* p, F32 x) {
    const I32 b = round_bf16(x);
    const __m128i low = _mm256_castsi256_si128(b), high = _mm256_extracti128_si256(b, 1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
  }

  BNB_INLINE static F32 zero() { return _mm256_setzero_ps(); }
  BNB_INLINE static F32 set1(float x) { return _mm256_set1_ps(x); }
  BNB_INLINE static F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
  BNB_INLINE static F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
  BNB_INLINE static F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
};

}  // namespace
}  // namespace bnb::cpu
