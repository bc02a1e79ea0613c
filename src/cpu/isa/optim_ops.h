// An instruction set with the arithmetic of the optimizers' rules (common/optim_rules.h). Division and square root are rounded to nearest.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/convert.h"

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
  template <class T> BNB_INLINE static void store_pair(T* p, F32 a, F32 b) { Isa::template put_rounded<false>(p, a, b); }
  // Whether any of n (whole chunks) numbers is 2 or more, infinite or NaN: the upper bit of the exponent says so.
  template <class T> BNB_INLINE static bool any_large(const T* x, int n) {
    constexpr int each = 64 / sizeof(T);
    __m512i any = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 2 * each) {
      Isa::prefetch(x + i), Isa::prefetch(x + i + each);
      any = _mm512_ternarylogic_epi32(any, Isa::load_all(x + i), Isa::load_all(x + i + each), 0xfe);
    }
    return _mm512_test_epi32_mask(any, Isa::word(sizeof(T) == 4 ? 0x40000000 : 0x40004000)) != 0;
  }
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
  template <class T> BNB_INLINE static void store_pair(T* p, F32 a, F32 b) {
    Isa::store(p, a);
    Isa::store(p + Isa::lanes, b);
  }
  template <class T> BNB_INLINE static bool any_large(const T* x, int n) {
    constexpr int each = 32 / sizeof(T);
    __m256i any = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 2 * each) {
      Isa::prefetch(x + i);
      any = _mm256_or_si256(any, _mm256_or_si256(Isa::load_all(x + i), Isa::load_all(x + i + each)));
    }
    return !_mm256_testz_si256(any, _mm256_set1_epi32(sizeof(T) == 4 ? 0x40000000 : 0x40004000));
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
  template <class T> BNB_INLINE static void store_pair(T* p, F32 a, F32 b) {
    Isa::store(p, a);
    Isa::store(p + Isa::lanes, b);
  }
  template <class T> BNB_INLINE static bool any_large(const T* x, int n) {
    uint32_t any = 0;
    for (int i = 0; i < n; ++i) any |= bits_of(read(x + i));
    return any >> 30 & 1;
  }
};

#endif

#if defined(__AVX512VBMI__)

// 64 codes of the signed dynamic map, which is the same on both sides of 0: the four bytes of each magnitude in tables of their own.
class DecodeSigned {
  __m512i plane_[4][2];

 public:
  explicit DecodeSigned(const float* value) {
    alignas(64) uint8_t bytes[4][128];
    Avx512Bf16::split(value + 127, bytes);
    for (int p = 0; p < 4; ++p)
      for (int q = 0; q < 2; ++q) plane_[p][q] = _mm512_loadu_si512(bytes[p] + 64 * q);
  }
  BNB_INLINE void operator()(const uint8_t* codes, int64_t, float absmax, float* out) const {
    // Dword 4 j + l goes to dword j of the 128-bit lane l, so that unpacking within lanes ends in order.
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), top = _mm512_set1_epi8(-128);
    const __m512i c = _mm512_permutexvar_epi32(order, _mm512_loadu_si512(codes));
    const __m512i distance = _mm512_sub_epi8(c, _mm512_set1_epi8(127)), magnitude = _mm512_abs_epi8(distance);
    const __mmask64 one = _mm512_movepi8_mask(magnitude);  // code 255, 128 above that of 0, is 1.0 = 0x3f800000
    __m512i b[4];
    for (int p = 0; p < 4; ++p) b[p] = _mm512_permutex2var_epi8(plane_[p][0], magnitude, plane_[p][1]);
    b[2] = _mm512_mask_mov_epi8(b[2], one, top);
    b[3] = _mm512_mask_mov_epi8(_mm512_ternarylogic_epi32(b[3], distance, top, 0xf8), one, _mm512_set1_epi8(0x3f));
    const __m512 scale = _mm512_set1_ps(absmax);
    const auto put = [&](int at, __m512i x) { _mm512_storeu_ps(out + at, _mm512_mul_ps(_mm512_castsi512_ps(x), scale)); };
    const __m512i low01 = _mm512_unpacklo_epi8(b[0], b[1]), low23 = _mm512_unpacklo_epi8(b[2], b[3]);
    put(0, _mm512_unpacklo_epi16(low01, low23)), put(16, _mm512_unpackhi_epi16(low01, low23));
    const __m512i high01 = _mm512_unpackhi_epi8(b[0], b[1]), high23 = _mm512_unpackhi_epi8(b[2], b[3]);
    put(32, _mm512_unpacklo_epi16(high01, high23)), put(48, _mm512_unpackhi_epi16(high01, high23));
  }
};
// What decodes 64 codes of a state; dynamic_signed: of that map.
template <class Isa, bool dynamic_signed>
using DecodeStates = std::conditional_t<dynamic_signed, DecodeSigned, typename Isa::template Decode8<float, false>>;

#else

template <class Isa, bool dynamic_signed> using DecodeStates = typename Isa::template Decode8<float, false>;

#endif

}  // namespace
}  // namespace bnb::cpu
