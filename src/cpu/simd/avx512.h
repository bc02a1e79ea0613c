// AVX-512 F, BW, CD, DQ, VL: 16 lanes; Avx512Bf16 adds VBMI, VNNI, BF16; Amx adds tiles.
#pragma once

#include "../convert.h"

#include <immintrin.h>
#include <string_view>

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Avx512 {
  static constexpr std::string_view name = "avx512";
  static constexpr int lanes = 16;
  using F32 = __m512;
  using I32 = __m512i;

  BNB_INLINE static I32 bits(F32 x) { return _mm512_castps_si512(x); }
  BNB_INLINE static F32 floats(I32 x) { return _mm512_castsi512_ps(x); }
  BNB_INLINE static __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  BNB_INLINE static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  BNB_INLINE static F32 load(const Half* p) { return _mm512_cvtph_ps(load32(p)); }
  BNB_INLINE static F32 load(const BFloat16* p) { return floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load32(p)), 16)); }

  // The 16-bit float nearest to each lane. bf16 by integer arithmetic: vcvtneps2bf16 takes subnormals for zero.
  template <class T>
  BNB_INLINE static __m256i round16(F32 x) {
    if constexpr (dtype_of<T> == DType::f16) return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    const I32 b = bits(x), high = _mm512_srli_epi32(b, 16), odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const I32 near = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(near, nan, high, _mm512_set1_epi32(0x40)));
  }
  BNB_INLINE static void store(float* p, F32 x) { _mm512_storeu_ps(p, x); }
  BNB_INLINE static void store(Half* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round16<Half>(x)); }
  BNB_INLINE static void store(BFloat16* p, F32 x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round16<BFloat16>(x)); }

  BNB_INLINE static F32 zero() { return _mm512_setzero_ps(); }
  BNB_INLINE static F32 set1(float x) { return _mm512_set1_ps(x); }
  BNB_INLINE static F32 add(F32 a, F32 b) { return _mm512_add_ps(a, b); }
  BNB_INLINE static F32 mul(F32 a, F32 b) { return _mm512_mul_ps(a, b); }
  BNB_INLINE static F32 fma(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
};

struct Avx512Bf16 : Avx512 {
  static constexpr std::string_view name = "avx512bf16";
};

struct Amx : Avx512Bf16 {
  static constexpr std::string_view name = "amx";
};

}  // namespace
}  // namespace bnb::cpu
