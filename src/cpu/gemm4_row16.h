// The 4-bit product for one row of a 16-bit a, in integers of two digits: sum over groups of absmax * scale of x * (sum of value * x).
//
// A value of the format is an integer of 15 bits up to a factor, looked up as two bytes (vpermb); x becomes one of 15 bits up to a factor
// for each group of 128, also in two bytes. Three of the four products of bytes are summed exactly (vpdpbusd); that of the low ones is
// below 2^-14 of the whole. Where few elements are much larger than the others (massive activations), what the high byte leaves of x is a
// term of its own. So the error is below that of weights rounded to bf16. What has no such digits (NaN, infinities, tiny numbers) goes to
// RowGemm. Reads k / 2 bytes of codes a column. 128 weights take 1 shift, 4 permutes, 6 dot products and 6 more for sums and scales on two
// ports, where RowGemm takes 25.
#pragma once

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

#include <bit>

#include "gemm4_row.h"
#include "simd/gemm8_ops.h"

namespace bnb::cpu {
namespace {

// The values of a format times `factor`, which is chosen for the smallest relative error, plus 2^14: bytes of 8 and 7 bits.
template <class Format> struct Digits4 {
  static constexpr int most = 16383, offset = 16384;
  int factor = 0;
  alignas(64) uint8_t high[64] = {}, low[64] = {};  // four times, so that 4 of the 6 index bits count

  consteval Digits4() {
    double least = 1;
    for (int f = most; f > most / 2; --f)
      if (const double error = error_of(f); error < least) least = error, factor = f;
    for (int i = 0; i < 64; ++i) {
      const int digits = nearest(static_cast<double>(Format::values[i % 16]) * factor) + offset;
      high[i] = static_cast<uint8_t>(digits / 128), low[i] = static_cast<uint8_t>(digits % 128);
    }
  }
  static consteval int nearest(double x) { return static_cast<int>(x < 0 ? x - 0.5 : x + 0.5); }
  static consteval double error_of(int f) {
    double most_error = 1e-6;  // values in fp32: below it all are alike
    for (double v : Format::values) {
      const double error = v == 0 ? 0 : nearest(v * f) / (v * f) - 1, size = error < 0 ? -error : error;
      if (size > most_error) most_error = size;
    }
    return most_error;
  }
};
template <class Format> inline constexpr Digits4<Format> kDigits4{};

template <class Isa, class T> class IntRowGemm {
  using Plain = RowGemm<Isa, T>;
  using Ops = Gemm8Ops<Isa>;
  static constexpr int columns_at_once = 8;
  static constexpr int64_t step = 2 * kGroup;
  static constexpr float most = 127 * 128 + 63;

  // `scale` times x is a part of the elements of two groups. Byte i of a vector belongs to the element of its name in byte i of the codes.
  struct alignas(64) Term {
    __m512i high_odd, high_even, low_odd, low_even;
    __m512i offset;  // minus the sum of x over each 8 elements, for the offset of the values
    int64_t group;   // the first one
    float scale;
  };
  struct alignas(64) Packed {
    int64_t whole, half;  // terms of two groups, then of the last one (twice, for two columns of y at once); whole < 0: RowGemm's x follows
    Term* terms() { return reinterpret_cast<Term*>(this + 1); }
    const Term* terms() const { return reinterpret_cast<const Term*>(this + 1); }
  };
  struct Table {
    __m512i high, low;
    float unit;
  };

 public:
  static bool serves(const Gemm4bit& d) { return Plain::serves(d); }

  static int64_t pack_bytes(const Gemm4bit& d) {
    const int64_t terms = 2 * ceil_div(d.k, step) * int64_t{sizeof(Term)}, plain = Plain::pack_bytes(d);
    return int64_t{sizeof(Packed)} + (terms < plain ? plain : terms);
  }
  static int64_t pack_units(const Gemm4bit&) { return 1; }
  static void pack(const Gemm4bit& d, void* packed, Range units) {
    auto& to = *static_cast<Packed*>(packed);
    if (pack_terms(d, to)) return;
    to.whole = -1;
    Plain::pack(d, &to + 1, units);
  }

  static void run(const Gemm4bit& d, const void* packed, Range columns) {
    const auto& x = *static_cast<const Packed*>(packed);
    if (x.whole < 0) return Plain::run(d, &x + 1, columns);
    const Table table = visit(d.type, []<class Format>(Format) {
      constexpr const auto& digits = kDigits4<Format>;
      return Table{_mm512_load_si512(digits.high), _mm512_load_si512(digits.low), 128 / static_cast<float>(digits.factor)};
    });
    in_streams<columns_at_once>(d, Decoder<Isa, FmaMath<Isa, T>>(d), columns,
                                [&](const Row(&rows)[columns_at_once], float* sums) { columns_of(table, rows, x, sums); });
  }

 private:
  static bool pack_terms(const Gemm4bit& d, Packed& to) {
    const T* from = static_cast<const T*>(d.a.data);
    Term* term = to.terms();
    to.whole = to.half = 0;
    for (int64_t k = 0; k < d.k; k += step) {
      const bool whole = k + step <= d.k;
      __m512 x[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) x[i] = Isa::load(from + k + 16 * (whole ? i : i % 4));
      __m512i top = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) top = _mm512_max_epu32(top, _mm512_castps_si512(_mm512_abs_ps(x[i])));
      const auto largest = std::bit_cast<float>(_mm512_reduce_max_epu32(top));  // a NaN is above all
      if (largest != 0 && !(largest > 0x1p-90f && largest < __builtin_inff())) return false;
      __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) total = _mm512_add_ps(total, _mm512_min_ps(_mm512_abs_ps(x[i]), _mm512_set1_ps(largest / 8)));
      const bool few_are_large = _mm512_reduce_add_ps(total) < largest * (step / 32);  // a mean of less than a 32nd
      const float scale = largest / most, inverse = largest == 0 ? 0 : most / largest;
      const Term* first = term;
      if (few_are_large) {  // of which the low byte would be more than the others are
        put<7>(x, scale, inverse, k, *term++);
        put<0>(x, scale * 64 / most, inverse * most / 64, k, *term++);
      } else {
        put<0>(x, scale, inverse, k, *term++);
      }
      (whole ? to.whole : to.half) += term - first;
    }
    return true;
  }

  // term = the nearest multiples of 2^zeros to x * inverse; x becomes what they leave.
  template <int zeros> BNB_INLINE static void put(__m512 (&x)[8], float scale, float inverse, int64_t k, Term& term) {
    __m512i high[4], low[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i words = _mm512_slli_epi16(
          _mm512_packs_epi32(digits<zeros>(x[2 * i], scale, inverse), digits<zeros>(x[2 * i + 1], scale, inverse)), zeros);
      high[i] = _mm512_srai_epi16(_mm512_add_epi16(words, _mm512_set1_epi16(64)), 7);
      low[i] = _mm512_sub_epi16(words, _mm512_slli_epi16(high[i], 7));
    }
    const __m512i high0 = _mm512_packs_epi16(high[0], high[1]), high1 = _mm512_packs_epi16(high[2], high[3]);
    const __m512i low0 = _mm512_packs_epi16(low[0], low[1]), low1 = _mm512_packs_epi16(low[2], low[3]);
    const __m512i odd = _mm512_load_si512(places.odd), even = _mm512_load_si512(places.even);
    term.high_odd = _mm512_permutex2var_epi8(high0, odd, high1), term.high_even = _mm512_permutex2var_epi8(high0, even, high1);
    term.low_odd = _mm512_permutex2var_epi8(low0, odd, low1), term.low_even = _mm512_permutex2var_epi8(low0, even, low1);
    const __m512i one = _mm512_set1_epi8(1), none = _mm512_setzero_si512();
    const __m512i high_sum = Ops::dot(one, term.high_odd, Ops::dot(one, term.high_even, none));
    const __m512i sum = Ops::dot(one, term.low_odd, Ops::dot(one, term.low_even, _mm512_slli_epi32(high_sum, 7)));
    term.offset = _mm512_sub_epi32(none, sum);
    term.group = k / kGroup;
    term.scale = scale;
  }
  template <int zeros> BNB_INLINE static __m512i digits(__m512& x, float scale, float inverse) {
    constexpr float unit = 1 << zeros;
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse / unit)));
    x = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), _mm512_set1_ps(scale * unit), x);
    return q;
  }
  // Where two packings within 128-bit lanes leave the elements.
  struct Places {
    alignas(64) uint8_t odd[64] = {}, even[64] = {};
    static consteval uint8_t place(int e) { return static_cast<uint8_t>(e / 64 * 64 + e % 16 / 4 * 16 + e % 64 / 16 * 4 + e % 4); }
    consteval Places() {
      for (int i = 0; i < 64; ++i) odd[i] = place(2 * i + 1), even[i] = place(2 * i);
    }
  };
  static constexpr Places places{};

  [[gnu::noinline]] static void columns_of(const Table& table, const Row* rows, const Packed& x, float* sums) {
    __m512 sum[columns_at_once];
#pragma GCC unroll 8
    for (auto& s : sum) s = _mm512_setzero_ps();
    const __m512i high = table.high, low = table.low;
    const Term *term = x.terms(), *end = term + x.whole;
    for (; term < end; ++term) {
      const Row* row = rows;
      asm("" : "+r"(row));  // pointers from memory: GCC would keep some in vectors
      const int64_t codes_at = term->group * (kGroup / 2), absmax_at = term->group;
      const __m512 scale = _mm512_set1_ps(term->scale * table.unit);
#pragma GCC unroll 8
      for (int j = 0; j < columns_at_once; ++j) {
        const uint8_t* codes = row[j].codes + codes_at;
        prefetch_codes(codes);
        const __m512 part = product(high, low, _mm512_loadu_si512(codes), *term, scale);
        sum[j] = _mm512_fmadd_ps(part, two_scales(row[j].absmax + absmax_at, 1), sum[j]);
      }
    }
    for (end += x.half; term < end; ++term) {  // one group: that of rows j and j + 1 in the halves of a vector
      const int64_t codes_at = term->group * (kGroup / 2), absmax_at = term->group;
      const __m512 scale = _mm512_set1_ps(term->scale * table.unit);
#pragma GCC unroll 8
      for (int j = 0; j < columns_at_once; j += 2) {
        const float *first = rows[j].absmax + absmax_at, *next = rows[j + 1].absmax + absmax_at;
        const __m512i codes =
            _mm512_inserti64x4(_mm512_castsi256_si512(Isa::load32(rows[j].codes + codes_at)), Isa::load32(rows[j + 1].codes + codes_at), 1);
        const __m512 scaled = _mm512_mul_ps(product(high, low, codes, *term, scale), two_scales(first, next - first));
        add_halves(sum[j], sum[j + 1], scaled);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < columns_at_once; j += 4) Gemm4Ops<Isa>::add_lanes(sum[j], sum[j + 1], sum[j + 2], sum[j + 3], true, sums + j);
  }

  // scale * sum of value * x over each 8 elements
  BNB_INLINE static __m512 product(__m512i high, __m512i low, __m512i codes, const Term& term, __m512 scale) {
    // The permutes look at the low 6 bits of a byte, of which the tables ignore two.
    const __m512i even = _mm512_srli_epi16(codes, 4);
    const __m512i high_odd = _mm512_permutexvar_epi8(codes, high), high_even = _mm512_permutexvar_epi8(even, high);
    const __m512i top = Ops::dot(high_even, term.high_even, Ops::dot(high_odd, term.high_odd, term.offset));
    __m512i dot = Ops::dot(high_even, term.low_even, Ops::dot(high_odd, term.low_odd, _mm512_setzero_si512()));
    dot = Ops::dot(_mm512_permutexvar_epi8(codes, low), term.high_odd, dot);
    dot = Ops::dot(_mm512_permutexvar_epi8(even, low), term.high_even, dot);
    dot = _mm512_add_epi32(dot, _mm512_slli_epi32(top, 7));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(dot), scale);
  }
};

}  // namespace
}  // namespace bnb::cpu

#endif
