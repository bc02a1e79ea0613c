// The vectors of AVX-512 F, BW, CD, DQ and VL: 16 lanes.
#pragma once

#include "common/convert.h"
#include "cpu/isa/isa.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12 warns of the undefined operands inside its own intrinsics
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Avx512Vectors : Capabilities {
  static constexpr int lanes = 16;
  using F32 = __m512;
  using I32 = __m512i;
  using Mask = __mmask16;

  BNB_INLINE static I32 bits(F32 x) { return _mm512_castps_si512(x); }
  BNB_INLINE static F32 floats(I32 x) { return _mm512_castsi512_ps(x); }
  BNB_INLINE static __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  BNB_INLINE static F32 load(const float* p) { return _mm512_loadu_ps(p); }
  BNB_INLINE static F32 load(const Half* p) { return _mm512_cvtph_ps(load32(p)); }
  BNB_INLINE static F32 load(const int32_t* p) { return _mm512_cvtepi32_ps(_mm512_loadu_si512(p)); }
  BNB_INLINE static F32 load(const BFloat16* p) {  // word i to the upper half of lane i
    const I32 places = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 16);
    return floats(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, places, _mm512_broadcast_i64x4(load32(p))));
  }

  // The 16-bit float nearest to each lane. bf16 by integer arithmetic: vcvtneps2bf16 takes subnormals for zero.
  template <class T> BNB_INLINE static __m256i round16(F32 x) {
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
  BNB_INLINE static I32 word(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
  BNB_INLINE static I32 load_all(const void* p) { return _mm512_loadu_si512(p); }

  BNB_INLINE static void fence() { _mm_sfence(); }
  template <bool stream> BNB_INLINE static void put(void* p, I32 x) {
    if constexpr (stream)
      _mm512_stream_si512(static_cast<__m512i*>(p), x);
    else
      _mm512_storeu_si512(p, x);
  }
  // Two vectors, rounded to T. Results that stream come in whole lines.
  template <bool stream, class T> BNB_INLINE static void put_rounded(T* p, F32 a, F32 b) {
    if constexpr (dtype_of<T> == DType::f32) {
      put<stream>(p, bits(a));
      put<stream>(p + 16, bits(b));
    } else {
      put<stream>(p, _mm512_inserti64x4(_mm512_castsi256_si512(round16<T>(a)), round16<T>(b), 1));
    }
  }

  // Called for every 64 bytes of input: the hardware's own prefetching stops at the end of each 4 KiB page.
  BNB_INLINE static void prefetch(const void* p) {
    constexpr uintptr_t kAhead = 2048;
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + kAhead), _MM_HINT_T0);
  }

  // The largest |x| as the bits of an fp32; 16-bit floats are compared as they are. n: whole chunks, as everywhere below.
  BNB_INLINE static uint32_t max_bits(const float* x, int64_t n) {
    const I32 magnitude = word(0x7fffffff);
    I32 most = _mm512_setzero_si512(), more = most;
    for (int64_t i = 0; i < n; i += 32) {
      prefetch(x + i);
      prefetch(x + i + 16);
      most = _mm512_max_epu32(most, _mm512_and_si512(magnitude, load_all(x + i)));
      more = _mm512_max_epu32(more, _mm512_and_si512(magnitude, load_all(x + i + 16)));
    }
    return _mm512_reduce_max_epu32(_mm512_max_epu32(most, more));
  }
  template <class T> BNB_INLINE static uint32_t max_bits(const T* x, int64_t n) {
    I32 most = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 32) {
      prefetch(x + i);
      most = _mm512_max_epu16(most, _mm512_and_si512(word(0x7fff7fff), load_all(x + i)));
    }
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)), ones = _mm_set1_epi32(-1);
    const auto bits = static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, ones))));
    return bits_of(to_float(T{bits}));
  }

  // ---- arithmetic of the optimizers' rules
  BNB_INLINE static F32 div(F32 a, F32 b) { return _mm512_div_ps(a, b); }
  BNB_INLINE static F32 sqrt(F32 x) { return _mm512_sqrt_ps(x); }
  BNB_INLINE static F32 min(F32 a, F32 b) { return _mm512_min_ps(a, b); }
  BNB_INLINE static F32 max(F32 a, F32 b) { return _mm512_max_ps(a, b); }
  BNB_INLINE static F32 sign(F32 x) {
    const __m512i signs = _mm512_and_si512(bits(x), word(0x80000000));
    const auto nonzero = _mm512_cmp_ps_mask(x, zero(), _CMP_NEQ_OQ);
    return floats(_mm512_maskz_or_epi32(nonzero, signs, bits(set1(1))));
  }
  BNB_INLINE static Mask finite(F32 x) {
    return _mm512_cmp_epu32_mask(_mm512_and_si512(bits(x), word(0x7fffffff)), word(0x7f800000), _MM_CMPINT_LT);
  }
  BNB_INLINE static Mask nonzero(Mask mask, F32 x) { return _mm512_mask_cmp_ps_mask(mask, x, zero(), _CMP_NEQ_UQ); }
  BNB_INLINE static F32 select(Mask mask, F32 a, F32 b) { return _mm512_mask_mov_ps(b, mask, a); }
  BNB_INLINE static F32 max_magnitude(F32 most, F32 x) { return _mm512_range_ps(most, x, 11); }
  BNB_INLINE static float greatest(F32 x) { return _mm512_reduce_max_ps(x); }
  // Whether any of n (whole chunks) numbers is 2 or more, infinite or NaN: the upper bit of the exponent says so.
  template <class T> BNB_INLINE static bool any_large(const T* x, int n) {
    constexpr int each = 64 / sizeof(T);
    __m512i any = _mm512_setzero_si512();
    for (int i = 0; i < n; i += 2 * each) {
      prefetch(x + i), prefetch(x + i + each);
      any = _mm512_ternarylogic_epi32(any, load_all(x + i), load_all(x + i + each), 0xfe);
    }
    return _mm512_test_epi32_mask(any, word(sizeof(T) == 4 ? 0x40000000 : 0x40004000)) != 0;
  }
};

}  // namespace
}  // namespace bnb::cpu
