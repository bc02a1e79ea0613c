// AVX-512 F, BW, CD, DQ, VL: 16 lanes; Avx512Bf16 adds VBMI, VNNI, BF16; Amx adds tiles.
#pragma once

#include "cpu/isa/avx512_gemm.h"
#include "cpu/isa/avx512_vectors.h"
#include "cpu/kernels/codebook8.h"
#include "cpu/kernels/plain.h"

#include <string_view>
#include <type_traits>

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Avx512 : Avx512Vectors {
  static constexpr std::string_view name = "avx512";
  static constexpr bool can_stream = true, has_dynamic8 = true;
  // Weights are decoded in fp32: for one row that is most of the work.
  template <class> static constexpr SingleRow single_row = SingleRow::fp32;
  using Gemm4bitOps = Avx512Gemm4bit;
  using GemmInt8Ops = Avx512GemmInt8;

  template <class T> BNB_INLINE static void store_pair(T* p, F32 a, F32 b) { put_rounded<false>(p, a, b); }

  // The low bytes of V vectors (their other bytes zero for `clean`) side by side: byte 4 i + j of the result is lane i of x[j].
  template <int V> BNB_INLINE static I32 interleave(const I32 (&x)[V]) {
    I32 r = _mm512_or_si512(x[0], _mm512_slli_epi32(x[1], 8));
    if constexpr (V == 4) r = _mm512_ternarylogic_epi32(r, _mm512_slli_epi32(x[2], 16), _mm512_slli_epi32(x[3], 24), 0xfe);
    return r;
  }

  // Nearest of 16, without a search: a linear map of t puts it into a bucket that holds one threshold at most, which is then compared.
  // NF4 has 32 buckets of t. FP4 has three thresholds close to zero, so it has 16 buckets of |t|, and the sign comes last.
  template <class Format> struct Buckets {
    static constexpr bool by_magnitude = Format::type == QuantType::fp4;
    static constexpr int count = by_magnitude ? 16 : 32, first = by_magnitude ? 8 : 0;  // the thresholds used
    static constexpr float scale = by_magnitude ? 15.4f : 15.49f, origin = by_magnitude ? 0 : 16;
    static constexpr float magic = 0x1.8p23f + origin;  // adding it rounds to an integer in the low mantissa bits
    alignas(64) float threshold[32];
    alignas(64) int32_t below[32];  // thresholds in lower buckets

    consteval Buckets() : threshold(), below() {
      int next = first;
      for (int k = 0; k < 32; ++k) {
        below[k] = next - first;
        threshold[k] = __builtin_inff();
        if (next == 15 || k >= count || bucket(Format::thresholds[next]) != k) continue;
        threshold[k] = Format::thresholds[next++];
        if (next < 15 && bucket(Format::thresholds[next]) == k) throw "two thresholds in a bucket";
      }
      if (next != 15) throw "a threshold without a bucket";
    }
    static consteval int bucket(float t) {
      const double exact = static_cast<double>(t) * scale + origin + 0.5;
      const int k = static_cast<int>(exact);
      if (exact - k < 1e-4 || exact - k > 1 - 1e-4) throw "too close to the edge of a bucket";
      return k;
    }
  };

  template <class Format> struct Encode4 {
    static constexpr Buckets<Format> buckets{};

    // (thresholds below t) as a number of 0..15, FP4: (thresholds below |t|) + 8 if t > 0.
    BNB_INLINE static I32 position(F32 t) {
      const I32 one = word(1);
      const I32 below = load_all(buckets.below);
      if constexpr (Buckets<Format>::by_magnitude) {
        const I32 twice = _mm512_rol_epi32(bits(t), 1);  // 2 |t|, plus 1 for a negative t, whose ties go up
        const F32 magnitude = floats(_mm512_and_si512(bits(t), word(0x7fffffff)));
        const I32 k = bits(fma(magnitude, set1(buckets.scale), set1(buckets.magic)));
        const I32 threshold = _mm512_slli_epi32(_mm512_permutexvar_epi32(k, load_all(buckets.threshold)), 1);
        I32 n = _mm512_permutexvar_epi32(k, below);
        n = _mm512_mask_add_epi32(n, _mm512_cmpgt_epu32_mask(twice, threshold), n, one);
        return _mm512_mask_or_epi32(n, _mm512_cmp_ps_mask(t, zero(), _CMP_GT_OQ), n, word(8));
      } else {
        const I32 k = bits(fma(t, set1(buckets.scale), set1(buckets.magic)));
        const F32 threshold = _mm512_permutex2var_ps(load(buckets.threshold), k, load(buckets.threshold + 16));
        const I32 n = _mm512_permutex2var_epi32(below, k, load_all(buckets.below + 16));
        return _mm512_mask_add_epi32(n, _mm512_cmp_ps_mask(t, threshold, _CMP_GT_OQ), n, one);
      }
    }

    // 16 V elements to 8 V bytes.
    template <int V, class T> BNB_INLINE static void vectors(const T* x, F32 inv, uint8_t* codes) {
      I32 n[V];
      for (int j = 0; j < V; ++j) n[j] = position(mul(load(x + 16 * j), inv));
      I32 c = interleave(n);
      if constexpr (Buckets<Format>::by_magnitude)
        c = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(code_of.bytes))), c);
      // An even element and the odd one behind it are the low and the high half of a 64-bit lane.
      const I32 pair = _mm512_or_si512(_mm512_slli_epi32(c, 4), _mm512_srli_epi64(c, 32));
      // Byte j of lane i belongs to place 8 j + i.
      const I32 near =
          _mm512_shuffle_epi8(pair, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 8, 1, 9, 2, 10, 3, 11, -1, -1, -1, -1, -1, -1, -1, -1)));
      const I32 places = _mm512_castsi256_si512(_mm256_setr_epi16(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27));
      const __m256i out = _mm512_castsi512_si256(_mm512_permutexvar_epi16(places, near));
      if constexpr (V == 4)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), out);
      else
        _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm256_castsi256_si128(out));
    }

    template <class T> BNB_INLINE void operator()(const T* x, int64_t n, float inv, uint8_t* codes) const {
      const F32 scale = set1(inv);
      for (; n >= 64; n -= 64, x += 64, codes += 32) vectors<4>(x, scale, codes);
      if (n) vectors<2>(x, scale, codes);
    }

   private:
    // FP4: position to code.
    struct CodeOf {
      alignas(16) uint8_t bytes[16];
      consteval CodeOf() : bytes() {
        for (int i = 0; i < 8; ++i) bytes[i] = Format::codes[7 - i], bytes[i + 8] = Format::codes[8 + i];
      }
    };
    static constexpr CodeOf code_of{};
  };

  // Codes to |values| of a map of 7 decades; see Dynamic8.
  template <bool is_signed, Keep keep> struct EncodeDynamic {
    I32 step0, step1;
    F32 slope, icept, top;
    uint32_t unsure;
    explicit EncodeDynamic(const Dynamic8& d)
        : step0(load_all(d.step)),
          step1(load_all(d.step + 16)),
          slope(load(d.slope)),
          icept(load(d.icept)),
          top(load(d.top)),
          unsure(d.unsure) {}

    template <class T> BNB_INLINE void operator()(const Encoder8& encoder, const T* x, int64_t n, float inv, uint8_t* codes) const {
      for (; n >= 64; n -= 64, x += 64, codes += 64) vectors<4>(encoder, x, inv, codes);
      if (n) vectors<2>(encoder, x, inv, codes);
    }

   private:
    template <int V, class T> BNB_INLINE void vectors(const Encoder8& encoder, const T* x, float inv, uint8_t* codes) const {
      const F32 lowest = set1(0x1p-31f);
      I32 y[V];
      for (int j = 0; j < V; ++j) {
        // To keep what is negative the sign is to say x < 0: that of -0.0 goes.
        const F32 v = load(x + 16 * j), t = keep == Keep::negative ? fma(v, set1(inv), zero()) : mul(v, set1(inv));
        // max(|t|, 2^-31), of the unsigned map max(t, 2^-31)
        const I32 key = bits(is_signed ? _mm512_range_ps(t, lowest, 11) : _mm512_max_ps(t, lowest));
        const I32 exponent = _mm512_srli_epi32(key, 23);
        const I32 segment = _mm512_srli_epi32(_mm512_add_epi32(key, _mm512_permutex2var_epi32(step0, exponent, step1)), 23);
        const F32 a = _mm512_permutexvar_ps(segment, slope), b = _mm512_permutexvar_ps(segment, icept),
                  most = _mm512_permutexvar_ps(segment, top);
        if constexpr (is_signed) {  // the line and its end take the sign of t
          const F32 c = floats(_mm512_ternarylogic_epi32(bits(t), word(0x80000000), bits(b), 0xea));
          y[j] = bits(_mm512_range_ps(fma(t, a, c), most, 2));
        } else {
          y[j] = bits(_mm512_min_ps(fma(floats(key), a, b), most));
        }
        if constexpr (keep == Keep::positive) {  // at least that of h = 1, far from all thresholds, where x > 0
          const F32 line = floats(y[j]);
          y[j] = bits(_mm512_mask_max_ps(line, _mm512_cmp_ps_mask(v, zero(), _CMP_GT_OQ), line, set1(Dynamic8::offset(is_signed) + 1)));
        }
        if constexpr (!is_signed) y[j] = _mm512_add_epi32(y[j], y[j]);
      }
      // Now the upper half of a lane is the sign, what does not count, and h in 8 bits; the lower one is the fraction.
      // Byte 4 i + k holds element i of vector 0, 2, 1, 3. h = 128 exists for 1.0 alone, not for -1.0.
      const auto halves = [](I32 first, I32 second) { return _mm512_mask_mov_epi16(_mm512_srli_epi32(first, 16), 0xaaaaaaaa, second); };
      constexpr __mmask64 odd = 0xaaaaaaaaaaaaaaaa;
      const I32 even = halves(y[0], y[1]), rest = V == 4 ? halves(y[V - 2], y[V - 1]) : _mm512_setzero_si512();
      I32 c = _mm512_mask_mov_epi8(even, odd, _mm512_slli_epi32(rest, 8));
      if constexpr (is_signed) {
        const I32 zero_code = _mm512_set1_epi8(127);
        const __mmask64 negative = _mm512_movepi8_mask(_mm512_mask_mov_epi8(_mm512_srli_epi32(even, 8), odd, rest));
        const I32 least = keep == Keep::negative ? _mm512_max_epu8(c, _mm512_set1_epi8(1)) : c;
        c = _mm512_mask_sub_epi8(_mm512_add_epi8(zero_code, c), negative, zero_code, _mm512_min_epu8(least, zero_code));
      }
      const I32 near = _mm512_shuffle_epi8(c, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15)));
      const I32 places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      const I32 out = _mm512_permutexvar_epi32(places, near);
      if constexpr (V == 4)
        _mm512_storeu_si512(codes, out);
      else
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm512_castsi512_si256(out));

      I32 least = _mm512_min_epu16(y[0], y[1]);
      if constexpr (V == 4) least = _mm512_min_epu16(least, _mm512_min_epu16(y[2], y[3]));
      const I32 limit = _mm512_set1_epi16(static_cast<short>(unsure));
      if (_mm512_mask_cmplt_epu16_mask(0x55555555, least, limit)) [[unlikely]]
        for (int j = 0; j < V; ++j)
          for (uint32_t close = _mm512_mask_cmplt_epu16_mask(0x55555555, y[j], limit); close; close &= close - 1) {
            const int i = 16 * j + __builtin_ctz(close) / 2;
            codes[i] = kept<keep>(*encoder.dynamic, read(x + i), encoder(read(x + i) * inv));
          }
    }
  };

  // A table of 16 rounded values, made once a block, indexed by both nibbles of a byte at once.
  template <class Format, class T, bool stream> struct Decode4 {
    BNB_INLINE void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      const F32 scaled = mul(load(Format::values.data()), set1(absmax));
      if constexpr (dtype_of<T> == DType::f32) {
        for (int64_t i = 0; i < n; i += 16) {
          const I32 b = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i / 2)));
          const I32 index = _mm512_or_si512(_mm512_srli_epi64(b, 4), _mm512_slli_epi64(b, 32));  // the lower 4 bits count
          put<stream>(out + i, bits(_mm512_permutexvar_ps(index, scaled)));
        }
      } else {
        const I32 table = _mm512_broadcast_i64x4(round16<T>(scaled));  // twice, so that 4 of the 5 index bits count
        for (int64_t i = 0; i < n; i += 32) {
          const I32 b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i / 2)));
          const I32 index = _mm512_or_si512(_mm512_srli_epi32(b, 4), _mm512_slli_epi32(b, 16));
          put<stream>(out + i, _mm512_permutexvar_epi16(index, table));
        }
      }
    }
  };

  template <class T, bool stream> struct Decode8 {
    const float* value;
    BNB_INLINE void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      const F32 scale = set1(absmax);
      for (int64_t i = 0; i < n; i += 32) {
        const auto lookup = [&](int64_t at) {
          const I32 c = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + at)));
          return mul(_mm512_i32gather_ps(c, value, 4), scale);
        };
        put_rounded<stream>(out + i, lookup(i), lookup(i + 16));
      }
    }
  };
  template <bool> using DecodeState = Decode8<float, false>;
};

struct Avx512Bf16 : Avx512 {
  static constexpr std::string_view name = "avx512bf16";
  static constexpr bool has_bf16_dot = true;
  template <class> static constexpr SingleRow single_row = SingleRow::as_many;
  using GemmInt8Ops = Avx512VnniGemmInt8;
  using Bf16DotOps = Avx512Bf16Dot;

  // To bf16 by the conversion instructions, except subnormals, which those take for zero.
  BNB_INLINE static __mmask16 subnormal(F32 x) { return _mm512_fpclass_ps_mask(x, 0x20); }
  using Avx512::store;
  BNB_INLINE static void store(BFloat16* p, F32 x) {
    if (subnormal(x)) [[unlikely]]
      return Avx512::store(p, x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)));
  }
  template <bool stream, class T> BNB_INLINE static void put_rounded(T* p, F32 a, F32 b) {
    if constexpr (dtype_of<T> == DType::bf16)
      if (!_mm512_kor(subnormal(a), subnormal(b))) [[likely]]
        return put<stream>(p, reinterpret_cast<I32>(_mm512_cvtne2ps_pbh(b, a)));
    Avx512::put_rounded<stream>(p, a, b);
  }

  template <class T> BNB_INLINE static void store_pair(T* p, F32 a, F32 b) { put_rounded<false>(p, a, b); }

  // byte p of each value to bytes[p]
  template <int count> BNB_INLINE static void split(const float* value, uint8_t (&bytes)[4][count]) {
    for (int c = 0; c < count; c += 16)
      for (int p = 0; p < 4; ++p) {
        const __m128i part = _mm512_cvtepi32_epi8(_mm512_srli_epi32(load_all(value + c), static_cast<unsigned>(8 * p)));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes[p] + c), part);
      }
  }

  // The four bytes of each value in tables of their own, in registers: a gather takes several times as long on some machines.
  template <class T, bool stream> struct Decode8 {
    I32 plane[4][4];
    explicit Decode8(const float* value) {
      alignas(64) uint8_t bytes[4][256];
      split(value, bytes);
      for (int p = 0; p < 4; ++p)
        for (int q = 0; q < 4; ++q) plane[p][q] = load_all(bytes[p] + 64 * q);
    }
    BNB_INLINE void operator()(const uint8_t* codes, int64_t n, float absmax, T* out) const {
      const F32 scale = set1(absmax);
      for (; n >= 64; n -= 64, codes += 64, out += 64) vectors<4>(load_all(codes), scale, out);
      if (n) vectors<2>(_mm512_castsi256_si512(load32(codes)), scale, out);
    }

   private:
    template <int V> BNB_INLINE void vectors(I32 codes, F32 scale, T* out) const {
      // Dword 4 j + l goes to dword j of the 128-bit lane l, so that unpacking within lanes ends in order.
      const I32 c = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), codes);
      const __mmask64 upper = _mm512_movepi8_mask(c);
      I32 b[4];
      for (int p = 0; p < 4; ++p)
        b[p] = _mm512_mask_blend_epi8(upper, _mm512_permutex2var_epi8(plane[p][0], c, plane[p][1]),
                                      _mm512_permutex2var_epi8(plane[p][2], c, plane[p][3]));
      const I32 low01 = _mm512_unpacklo_epi8(b[0], b[1]), low23 = _mm512_unpacklo_epi8(b[2], b[3]);
      put_rounded<stream>(out, mul(floats(_mm512_unpacklo_epi16(low01, low23)), scale),
                          mul(floats(_mm512_unpackhi_epi16(low01, low23)), scale));
      if constexpr (V == 4) {
        const I32 high01 = _mm512_unpackhi_epi8(b[0], b[1]), high23 = _mm512_unpackhi_epi8(b[2], b[3]);
        put_rounded<stream>(out + 32, mul(floats(_mm512_unpacklo_epi16(high01, high23)), scale),
                            mul(floats(_mm512_unpackhi_epi16(high01, high23)), scale));
      }
    }
  };

  // 64 codes of the signed dynamic map, which is the same on both sides of 0: the four bytes of each magnitude in tables of their own.
  class DecodeSigned {
    __m512i plane_[4][2];

   public:
    explicit DecodeSigned(const float* value) {
      alignas(64) uint8_t bytes[4][128];
      split(value + 127, bytes);
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
  template <bool dynamic_signed> using DecodeState = std::conditional_t<dynamic_signed, DecodeSigned, Decode8<float, false>>;
};

struct Amx : Avx512Bf16 {
  static constexpr std::string_view name = "amx";
  static constexpr bool has_tiles = true;
  // A tile costs as much for one row as for sixteen.
  template <class T> static constexpr SingleRow single_row = sizeof(T) == 2 ? SingleRow::digits : SingleRow::fp32;
};

}  // namespace
}  // namespace bnb::cpu
