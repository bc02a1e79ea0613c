// An instruction set with the arithmetic of the optimizers' rules (src/optim_rules.h). Division and square root are rounded to nearest.
#pragma once

#include <cstdint>

#include "../convert.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bnb::cpu {
namespace {

#if defined(__AVX512F__)

template <class Isa> struct OptimMath : Isa {
  using F32 = __m512;
  using Mask = __mmask16;
  BNB_INLINE static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  BNB_INLINE static F32 sqrt(F32 x) { return _mm512_sqrt_ps(x); }
  BNB_INLINE static F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  BNB_INLINE static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  BNB_INLINE static F32 sign(F32 x) {
    const __m512i signs = _mm512_and_si512(Isa::bits(x), Isa::word(0x80000000));
    const auto nonzero = _mm512_cmp_ps_mask(x, Isa::zero(), _CMP_NEQ_OQ);
    return Isa::floats(_mm512_maskz_or_epi32(nonzero, signs, Isa::bits(Isa::set1(1))));
  }
  BNB_INLINE static Mask finite(F32 x) {
    return _mm512_cmp_epu32_mask(_mm512_and_si512(Isa::bits(x), Isa::word(0x7fffffff)), Isa::word(0x7f800000), _MM_CMPINT_LT);
  }
  BNB_INLINE static Mask nonzero(Mask mask, F32 x) { return _mm512_mask_cmp_ps_mask(mask, x, Isa::zero(), _CMP_NEQ_UQ); }
  BNB_INLINE static F32 select(Mask mask, F32 a, F32 b) { return _mm512_mask_mov_ps(b, mask, a); }
  BNB_INLINE static F32 max_magnitude(F32 most, F32 x) { return _mm512_range_ps(most, x, 11); }
  BNB_INLINE static float greatest(F32 x) { return _mm512_reduce_max_ps(x); }
};

#elif defined(__AVX2__)

template <class Isa> struct OptimMath : Isa {
  using F32 = __m256;
  using Mask = __m256;
  BNB_INLINE static F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
  BNB_INLINE static F32 sqrt(F32 x) { return _mm256_sqrt_ps(x); }
  BNB_INLINE static F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
  BNB_INLINE static F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
  BNB_INLINE static F32 magnitude(F32 x) { return _mm256_andnot_ps(Isa::set1(-0.0f), x); }
  BNB_INLINE static F32 sign(F32 x) {
    const F32 one = _mm256_or_ps(_mm256_and_ps(x, Isa::set1(-0.0f)), Isa::set1(1));
    return _mm256_and_ps(one, _mm256_cmp_ps(x, Isa::zero(), _CMP_NEQ_OQ));
  }
  BNB_INLINE static Mask finite(F32 x) { return _mm256_cmp_ps(magnitude(x), Isa::set1(__builtin_inff()), _CMP_LT_OQ); }
  BNB_INLINE static Mask nonzero(Mask mask, F32 x) { return _mm256_and_ps(mask, _mm256_cmp_ps(x, Isa::zero(), _CMP_NEQ_UQ)); }
  BNB_INLINE static F32 select(Mask mask, F32 a, F32 b) { return _mm256_blendv_ps(b, a, mask); }
  BNB_INLINE static F32 max_magnitude(F32 most, F32 x) { return _mm256_max_ps(magnitude(x), most); }
  BNB_INLINE static float greatest(F32 x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
};

#else

template <class Isa> struct OptimMath : Isa {
  using F32 = float;
  using Mask = bool;
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
};

#endif

}  // namespace
}  // namespace bnb::cpu
