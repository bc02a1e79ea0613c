// AVX2, FMA, F16C: 8 lanes; AvxVnni adds AVX-VNNI.
#pragma once

#include "cpu/isa/avx2_gemm.h"
#include "cpu/isa/avx2_vectors.h"
#include "cpu/kernels/codebook8.h"
#include "cpu/kernels/plain.h"

#include <immintrin.h>
#include <string_view>

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Avx2 : Avx2Vectors {
  static constexpr std::string_view name = "avx2";
  static constexpr bool can_stream = true, has_dynamic8 = true;
  using Gemm4bitOps = Avx2Gemm4bit;
  using GemmInt8Ops = Avx2GemmInt8;

  // Nearest of 16 by bisection. A comparison is 0 or -1, so the count of thresholds below t comes as a negative number, whose low bits
  // choose the next threshold out of a register.
  template <class Format> struct Encode4 {
    static constexpr const float* edge = Format::thresholds.data();
    F32 second, third, fourth;
    Encode4()
        : second(_mm256_setr_ps(edge[3], 0, 0, edge[11], edge[3], 0, 0, edge[11])),
          third(_mm256_setr_ps(edge[1], edge[13], edge[9], edge[5], edge[1], edge[13], edge[9], edge[5])),
          fourth(_mm256_setr_ps(edge[0], edge[14], edge[12], edge[10], edge[8], edge[6], edge[4], edge[2])) {}

    template <class T> BNB_INLINE I32 minus_below(const T* x, F32 inv) const {
      const F32 t = mul(load(x), inv);
      const auto above = [&](F32 threshold) { return bits(_mm256_cmp_ps(t, threshold, _CMP_GT_OQ)); };
      I32 n = above(set1(edge[7]));
      n = _mm256_add_epi32(_mm256_add_epi32(n, n), above(_mm256_permutevar_ps(second, n)));
      n = _mm256_add_epi32(_mm256_add_epi32(n, n), above(_mm256_permutevar_ps(third, n)));
      return _mm256_add_epi32(_mm256_add_epi32(n, n), above(_mm256_permutevar8x32_ps(fourth, n)));
    }
    template <class T> BNB_INLINE void operator()(const T* x, int64_t n, float inv, uint8_t* codes) const {
      const F32 scale = set1(inv);
      for (; n > 0; n -= 32, x += 32, codes += 16) {
        const I32 a = _mm256_packs_epi32(minus_below(x, scale), minus_below(x + 8, scale));
        const I32 b = _mm256_packs_epi32(minus_below(x + 16, scale), minus_below(x + 24, scale));
        I32 c = _mm256_abs_epi8(_mm256_packs_epi16(a, b));  // in each half: 4 elements of each vector
        if constexpr (Format::type == QuantType::fp4)
          c = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(Format::codes.data()))), c);
        const I32 pairs = _mm256_maddubs_epi16(c, _mm256_set1_epi16(0x0110));  // even * 16 + odd
        const I32 bytes = _mm256_packus_epi16(pairs, pairs);
        const __m128i out = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), out);
      }
    }
  };

  // See Dynamic8. The segment comes by bisection; the eighth boundary, that of 1.0, is left to the end, so that 8 lanes hold the line.
  template <bool is_signed, Keep keep> struct EncodeDynamic {
    I32 first, second, third, last, limit;
    F32 slope, icept, top;
    explicit EncodeDynamic(const Dynamic8& d) : slope(load(d.slope)), icept(load(d.icept)), top(load(d.top)) {
      const auto set = [](uint32_t a, uint32_t b, uint32_t c, uint32_t e) {
        const __m128i four = _mm_setr_epi32(static_cast<int>(a), static_cast<int>(b), static_cast<int>(c), static_cast<int>(e));
        return _mm256_broadcastsi128_si256(four);
      };
      first = set(d.cut[3], d.cut[3], d.cut[3], d.cut[3]);
      second = set(d.cut[1], 0, 0, d.cut[5]);  // by the low bits of 0, -1
      third = set(d.cut[0], d.cut[6], d.cut[4], d.cut[2]);
      last = set(d.cut[7], d.cut[7], d.cut[7], d.cut[7]);
      limit = _mm256_set1_epi16(static_cast<short>(d.unsure - 1));
    }

    template <class T> BNB_INLINE void operator()(const Encoder8& encoder, const T* x, int64_t n, float inv, uint8_t* codes) const {
      for (; n > 0; n -= 32, x += 32, codes += 32) {
        I32 y[4], c[4];
        for (int j = 0; j < 4; ++j) {
          // To keep what is negative the sign is to say x < 0: that of -0.0 goes.
          const F32 v = load(x + 8 * j);
          const I32 t = bits(keep == Keep::negative ? fma(v, set1(inv), zero()) : mul(v, set1(inv)));
          const I32 magnitude = is_signed ? _mm256_and_si256(t, _mm256_set1_epi32(0x7fffffff)) : t;
          const auto above = [&](I32 cut) { return _mm256_cmpgt_epi32(magnitude, cut); };
          const auto choose = [](I32 from, I32 by) { return bits(_mm256_permutevar_ps(floats(from), by)); };
          I32 s = above(first);
          s = _mm256_add_epi32(_mm256_add_epi32(s, s), above(choose(second, s)));
          s = _mm256_abs_epi32(_mm256_add_epi32(_mm256_add_epi32(s, s), above(choose(third, s))));
          const F32 line = fma(floats(magnitude), _mm256_permutevar8x32_ps(slope, s), _mm256_permutevar8x32_ps(icept, s));
          y[j] = bits(_mm256_min_ps(line, _mm256_permutevar8x32_ps(top, s)));
          if constexpr (!is_signed) y[j] = _mm256_add_epi32(y[j], y[j]);  // now the upper half ends with h, the lower is the fraction
          I32 h = _mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(y[j], 16), _mm256_set1_epi32(0xff)), above(last));
          if constexpr (keep == Keep::negative) h = _mm256_max_epi32(h, _mm256_srli_epi32(t, 31));
          const I32 sign = _mm256_srai_epi32(t, 31);
          c[j] = is_signed ? _mm256_add_epi32(_mm256_set1_epi32(127), _mm256_sub_epi32(_mm256_xor_si256(h, sign), sign)) : h;
        }
        // Packing saturates: -1.0 would have code -1.
        I32 packed = _mm256_packus_epi16(_mm256_packs_epi32(c[0], c[1]), _mm256_packs_epi32(c[2], c[3]));
        if constexpr (keep == Keep::positive) {  // at least the code above that of 0 where x > 0: then its bits, packed, are not 0
          const auto pair = [&](int j) { return _mm256_packs_epi32(bits(load(x + 8 * j)), bits(load(x + 8 * j + 8))); };
          const I32 positive = _mm256_min_epu8(_mm256_packus_epi16(pair(0), pair(2)), _mm256_set1_epi8(1));
          packed = _mm256_max_epu8(packed, is_signed ? _mm256_sign_epi8(_mm256_set1_epi8(-128), positive) : positive);
        }
        const I32 out = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), out);

        const auto close = [&](I32 fraction) {  // bits 0, 4, .. of the lanes whose fraction is below `unsure`
          return _mm256_movemask_epi8(_mm256_cmpeq_epi16(_mm256_min_epu16(fraction, limit), fraction)) & 0x11111111;
        };
        if (close(_mm256_min_epu16(_mm256_min_epu16(y[0], y[1]), _mm256_min_epu16(y[2], y[3])))) [[unlikely]]
          for (int j = 0; j < 4; ++j)
            for (auto lanes = static_cast<uint32_t>(close(y[j])); lanes; lanes &= lanes - 1) {
              const int i = 8 * j + __builtin_ctz(lanes) / 4;
              codes[i] = kept<keep>(*encoder.dynamic, read(x + i), encoder(read(x + i) * inv));
            }
      }
    }
  };

  // A table of 16 rounded values, made once a block.
  template <class Format, class T, bool stream> struct Decode4 {
    BNB_INLINE void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      const F32 low = mul(load(Format::values.data()), set1(absmax)), high = mul(load(Format::values.data() + 8), set1(absmax));
      if constexpr (dtype_of<T> == DType::f32) {
        for (int64_t i = 0; i < n; i += 8) {
          int four;
          __builtin_memcpy(&four, codes + i / 2, 4);
          const I32 b = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
          const I32 index = _mm256_or_si256(_mm256_srli_epi64(b, 4), _mm256_slli_epi64(b, 32));  // the lower 4 bits count
          const F32 upper = floats(_mm256_slli_epi32(index, 28));
          put<stream>(out + i, bits(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper)));
        }
      } else {
        // Two tables of bytes: the lower and the upper halves of the values.
        const __m128i a = round16<T>(low), b = round16<T>(high), byte = _mm_set1_epi16(0xff);
        const I32 lower = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
        const I32 upper = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
        for (int64_t i = 0; i < n; i += 32) {
          const I32 c = _mm256_cvtepu8_epi16(load16(codes + i / 2));
          const I32 index = _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(c, 4), _mm256_slli_epi16(c, 8)), _mm256_set1_epi8(15));
          const I32 l = _mm256_shuffle_epi8(lower, index), u = _mm256_shuffle_epi8(upper, index);
          const I32 even = _mm256_unpacklo_epi8(l, u), odd = _mm256_unpackhi_epi8(l, u);  // 8 elements in each half
          put<stream>(out + i, _mm256_permute2x128_si256(even, odd, 0x20));
          put<stream>(out + i + 16, _mm256_permute2x128_si256(even, odd, 0x31));
        }
      }
    }
  };

  template <class T, bool stream> struct Decode8 {
    const float* value;
    BNB_INLINE void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      const auto lookup = [&](int64_t at) {
        const I32 c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + at)));
        return mul(_mm256_i32gather_ps(value, c, 4), set1(absmax));
      };
      for (int64_t i = 0; i < n; i += 16) {
        const F32 a = lookup(i), b = lookup(i + 8);
        if constexpr (dtype_of<T> == DType::f32) {
          put<stream>(out + i, bits(a));
          put<stream>(out + i + 8, bits(b));
        } else {
          put<stream>(out + i, _mm256_set_m128i(round16<T>(b), round16<T>(a)));
        }
      }
    }
  };
  template <bool> using DecodeState = Decode8<float, false>;
};

// Its int8 products are vpdpbusd, all else is AVX2.
struct AvxVnni : Avx2 {
  static constexpr std::string_view name = "avxvnni";
  using GemmInt8Ops = AvxVnniGemmInt8;
};

}  // namespace
}  // namespace bnb::cpu
