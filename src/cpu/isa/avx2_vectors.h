// The vectors of AVX2, FMA and F16C: 8 lanes.
#pragma once

#include "common/convert.h"
#include "cpu/isa/isa.h"

#include <immintrin.h>

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Avx2Vectors : Capabilities {
  static constexpr int lanes = 8;
  using F32 = __m256;
  using I32 = __m256i;
  using Mask = __m256;

  BNB_INLINE static I32 bits(F32 x) { return _mm256_castps_si256(x); }
  BNB_INLINE static F32 floats(I32 x) { return _mm256_castsi256_ps(x); }
  BNB_INLINE static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

  BNB_INLINE static F32 load(const float* p) { return _mm256_loadu_ps(p); }
  BNB_INLINE static F32 load(const Half* p) { return _mm256_cvtph_ps(load16(p)); }
  BNB_INLINE static F32 load(const int32_t* p) { return _mm256_cvtepi32_ps(load_all(p)); }
  BNB_INLINE static F32 load(const BFloat16* p) { return floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16)); }

  // The bf16 nearest to each lane, in the low halves. Integer arithmetic: the conversion instructions elsewhere flush subnormals.
  BNB_INLINE static I32 round_bf16(F32 x) {
    const I32 b = bits(x), odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
    const I32 near = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd), 16);
    const I32 nan = _mm256_or_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(near, nan, bits(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  }
  template <class T> BNB_INLINE static __m128i round16(F32 x) {
    if constexpr (dtype_of<T> == DType::f16) return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    const I32 b = round_bf16(x);
    return _mm_packus_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  }
  BNB_INLINE static void store(float* p, F32 x) { _mm256_storeu_ps(p, x); }
  BNB_INLINE static void store(Half* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round16<Half>(x)); }
  BNB_INLINE static void store(BFloat16* p, F32 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), round16<BFloat16>(x)); }

  BNB_INLINE static F32 zero() { return _mm256_setzero_ps(); }
  BNB_INLINE static F32 set1(float x) { return _mm256_set1_ps(x); }
  BNB_INLINE static F32 add(F32 a, F32 b) { return _mm256_add_ps(a, b); }
  BNB_INLINE static F32 mul(F32 a, F32 b) { return _mm256_mul_ps(a, b); }
  BNB_INLINE static F32 fma(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
  BNB_INLINE static I32 load_all(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

  BNB_INLINE static void fence() { _mm_sfence(); }
  template <bool stream> BNB_INLINE static void put(void* p, I32 x) {
    if constexpr (stream)
      _mm256_stream_si256(static_cast<__m256i*>(p), x);
    else
      _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  }

  // Called for every 64 bytes of input: the hardware's own prefetching stops at the end of each 4 KiB page.
  BNB_INLINE static void prefetch(const void* p) {
    constexpr uintptr_t kAhead = 2048;
    _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(p) + kAhead), _MM_HINT_T0);
  }

  // The largest |x| as the bits of an fp32; 16-bit floats are compared as they are. n: whole chunks, as everywhere below.
  BNB_INLINE static uint32_t max_bits(const float* x, int64_t n) {
    const I32 magnitude = _mm256_set1_epi32(0x7fffffff);
    I32 most = _mm256_setzero_si256(), more = most;
    for (int64_t i = 0; i < n; i += 16) {
      prefetch(x + i);
      most = _mm256_max_epu32(most, _mm256_and_si256(magnitude, load_all(x + i)));
      more = _mm256_max_epu32(more, _mm256_and_si256(magnitude, load_all(x + i + 8)));
    }
    most = _mm256_max_epu32(most, more);
    __m128i four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1))));
  }
  template <class T> BNB_INLINE static uint32_t max_bits(const T* x, int64_t n) {
    const I32 magnitude = _mm256_set1_epi16(0x7fff);
    I32 most = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 32) {
      prefetch(x + i);
      most = _mm256_max_epu16(most, _mm256_and_si256(magnitude, load_all(x + i)));
      most = _mm256_max_epu16(most, _mm256_and_si256(magnitude, load_all(x + i + 16)));
    }
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1)), ones = _mm_set1_epi32(-1);
    return bits_of(to_float(T{static_cast<uint16_t>(~_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(eight, ones))))}));
  }

  // ---- arithmetic of the optimizers' rules
  BNB_INLINE static F32 div(F32 a, F32 b) { return _mm256_div_ps(a, b); }
  BNB_INLINE static F32 sqrt(F32 x) { return _mm256_sqrt_ps(x); }
  BNB_INLINE static F32 min(F32 a, F32 b) { return _mm256_min_ps(a, b); }
  BNB_INLINE static F32 max(F32 a, F32 b) { return _mm256_max_ps(a, b); }
  BNB_INLINE static F32 magnitude(F32 x) { return _mm256_andnot_ps(set1(-0.0f), x); }
  BNB_INLINE static F32 sign(F32 x) {
    const F32 one = _mm256_or_ps(_mm256_and_ps(x, set1(-0.0f)), set1(1));
    return _mm256_and_ps(one, _mm256_cmp_ps(x, zero(), _CMP_NEQ_OQ));
  }
  BNB_INLINE static Mask finite(F32 x) { return _mm256_cmp_ps(magnitude(x), set1(__builtin_inff()), _CMP_LT_OQ); }
  BNB_INLINE static Mask nonzero(Mask mask, F32 x) { return _mm256_and_ps(mask, _mm256_cmp_ps(x, zero(), _CMP_NEQ_UQ)); }
  BNB_INLINE static F32 select(Mask mask, F32 a, F32 b) { return _mm256_blendv_ps(b, a, mask); }
  BNB_INLINE static F32 max_magnitude(F32 most, F32 x) { return _mm256_max_ps(magnitude(x), most); }
  BNB_INLINE static float greatest(F32 x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
  }
  template <class T> BNB_INLINE static void store_pair(T* p, F32 a, F32 b) {
    store(p, a);
    store(p + lanes, b);
  }
  template <class T> BNB_INLINE static bool any_large(const T* x, int n) {
    constexpr int each = 32 / sizeof(T);
    __m256i any = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 2 * each) {
      prefetch(x + i);
      any = _mm256_or_si256(any, _mm256_or_si256(load_all(x + i), load_all(x + i + each)));
    }
    return !_mm256_testz_si256(any, _mm256_set1_epi32(sizeof(T) == 4 ? 0x40000000 : 0x40004000));
  }
};

}  // namespace
}  // namespace bnb::cpu
