// The 4-bit product for one row of a 16-bit a, in integers of two digits: sum over groups of absmax * (sum of value * x).
//
// A value of the format is an integer of 15 bits up to a factor, looked up as two bytes (vpermb). So is x, in a unit for each two groups
// that is the one of the largest element times a power of two: then a sum is scaled where the unit changes, not for every product. Three of
// the four products of bytes are summed exactly (vpdpbusd); that of the low ones is below 2^-14 of the whole. Where few elements are much
// larger than the others (massive activations), what the high byte leaves of x is a term of its own. So the error, relative to the sum of
// magnitudes of two groups, is below that of weights rounded to bf16. What has no such digits (NaN, infinities, tiny numbers, elements of
// all sizes) goes to RowGemm. Reads k / 2 bytes of codes a column. 128 weights take 1 shift, 4 permutes, 6 dot products and 4 more for sums
// and scales on two ports, where RowGemm takes 25.
#pragma once

#include <algorithm>
#include <bit>

#include "cpu/gemm/avx512/gemm_4bit_row.h"

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
  using Ops = typename Isa::GemmInt8Ops;
  static constexpr int columns_at_once = 8;
  using Rows = Streams<columns_at_once>;
  static constexpr int64_t step = 2 * kGroup;
  static constexpr float most = 127 * 128 + 63;

  // x of two groups. Byte i of a vector belongs to the element of its name in byte i of the codes.
  struct alignas(64) Term {
    __m512i high_odd, high_even, low_odd, low_even;
    __m512i offset;  // minus the sum of x over each 8 elements, for the offset of the values
    int64_t group;   // the first one
    float rescale;   // the unit of the sum before it in that of this term; in `shared` that of the term in that of y
  };
  // A row of an odd number of groups ends in the middle of two. It is multiplied together with the row behind it, so that a line of codes
  // is one load: its terms, then those of the two groups that are its last and the first of the row behind, then the terms of that one.
  enum Part { own, shared, behind, parts };
  // Terms of a part go from the smallest unit to the largest: a sum changes its unit seldom.
  struct alignas(64) Packed {
    int64_t count[parts];  // -1 at first: RowGemm's x follows
    float rescale[parts];  // the unit of the last term in that of y; of `shared` 1
    float unit;            // of y
    Term* terms() { return reinterpret_cast<Term*>(this + 1); }
    const Term* terms() const { return reinterpret_cast<const Term*>(this + 1); }
  };
  // A term to be packed, in their order: by part, exponent (its unit is 2^-exponent) and place.
  struct Key {
    enum Kind { whole, high, rest };  // high: what the low byte cannot hold is left to the rest
    uint64_t bits;
    Key(Part part, int exponent, int64_t place, Kind kind)
        : bits(static_cast<uint64_t>(part) << 56 | static_cast<uint64_t>(63 - exponent) << 48 | static_cast<uint64_t>(place) << 2 | kind) {}
    bool operator<(Key k) const { return bits < k.bits; }
    Part part() const { return static_cast<Part>(bits >> 56); }
    int exponent() const { return 63 - static_cast<int>(bits >> 48 & 63); }
    int64_t place() const { return static_cast<int64_t>((bits & ((uint64_t{1} << 48) - 1)) >> 2); }
    Kind kind() const { return static_cast<Kind>(bits & 3); }
  };
  struct Table {
    __m512i high, low;
  };
  // Sums of eight columns, whose lanes are added up when the next ones come: at once they would wait for the last dot products, and hold up
  // the next ones.
  class Sums {
   public:
    explicit Sums(float unit) : unit_(unit) {}
    BNB_INLINE void put(const __m512 (&sum)[columns_at_once], float* to) {
#pragma GCC unroll 8
      for (int j = 0; j < columns_at_once; ++j) _mm512_store_ps(lanes_[now_][j], sum[j]);
      to_[now_] = to;
      now_ ^= 1;
      finish();
    }
    void finish_last() { now_ ^= 1, finish(); }

   private:
    BNB_INLINE void finish() {
      if (to_[now_]) add_up(lanes_[now_], unit_, to_[now_]);
      to_[now_] = nullptr;
    }

    alignas(64) float lanes_[2][columns_at_once][Isa::lanes];
    float* to_[2] = {};
    int now_ = 0;
    float unit_;
  };

  static bool is_odd(const Gemm4bit& d) { return d.k % step != 0; }
  static int64_t steps(const Gemm4bit& d) { return d.k / (is_odd(d) ? kGroup : step); }

 public:
  static bool serves(const Gemm4bit& d) { return Plain::serves(d); }

  static int64_t pack_bytes(const Gemm4bit& d) {
    const int64_t terms = 2 * steps(d) * int64_t{sizeof(Term) + sizeof(Key)}, plain = Plain::pack_bytes(d);
    return int64_t{sizeof(Packed)} + (terms < plain ? plain : terms);
  }
  static int64_t pack_units(const Gemm4bit&) { return 1; }
  static void pack(const Gemm4bit& d, void* packed, Range units) {
    auto& to = *static_cast<Packed*>(packed);
    if (pack_terms(d, to)) {
      to.unit *= visit(d.type, []<class Format>(Format) { return 128 / static_cast<float>(kDigits4<Format>.factor); });
    } else {
      to.count[own] = -1;
      Plain::pack(d, &to + 1, units);
    }
  }

  static void run(const Gemm4bit& d, const void* packed, Range columns) {
    const auto& x = *static_cast<const Packed*>(packed);
    if (x.count[own] < 0) return Plain::run(d, &x + 1, columns);
    run(d, x, columns);
    check(d, columns);
  }

 private:
  static void run(const Gemm4bit& d, const Packed& x, Range columns) {
    const Table table = visit(d.type, []<class Format>(Format) {
      constexpr const auto& digits = kDigits4<Format>;
      return Table{_mm512_load_si512(digits.high), _mm512_load_si512(digits.low)};
    });
    const Decoder<Isa, FmaMath<Isa, T>> decoder(d);
    Sums sums(x.unit);
    const auto with_height = [&](auto height) {
      in_streams<columns_at_once, height()>(
          d, decoder, columns, [&](const Rows& rows, float* to) { columns_of<height()>(table, rows, x, sums, to); },
          [&] { sums.finish_last(); });
    };
    if (!is_odd(d)) return with_height(std::integral_constant<int, 1>{});
    const int64_t last = columns.end;
    columns.end = last / 2 * 2;
    with_height(std::integral_constant<int, 2>{});
    if (last != columns.end) last_row(d, decoder, table, x);
  }

  // Of an odd number of rows of an odd number of groups the last has none behind it.
  static void last_row(const Gemm4bit& d, const Decoder<Isa, FmaMath<Isa, T>>& decoder, const Table& table, const Packed& x) {
    const int64_t groups = d.k / kGroup, absmax_floats = decoder.scratch_floats(d, 1);
    const Scratch scratch(2 * absmax_floats * int64_t{sizeof(float)} + d.k);
    auto* absmax = static_cast<float*>(scratch.data());
    auto* codes = reinterpret_cast<uint8_t*>(absmax + 2 * absmax_floats);
    std::memset(scratch.data(), 0, static_cast<size_t>(2 * absmax_floats * int64_t{sizeof(float)} + d.k));
    std::memcpy(codes, d.codes.data() + (d.n - 1) * d.k / 2, static_cast<size_t>(d.k / 2));
    std::memcpy(absmax, decoder.template absmax_of<Layout::groups>(d.n - 1, 1, absmax + absmax_floats),
                static_cast<size_t>(groups) * sizeof(float));
    alignas(64) float y[2 * columns_at_once];
    Sums sums(x.unit);
    columns_of<2>(table, Rows{codes, absmax, {}, {}}, x, sums, y);
    sums.finish_last();
    write_row<Isa, T>(d, d.n - 1, 1, _mm512_load_ps(y));
  }

  // A sum of integers times absmax overflows long before y does where absmax is large: what is not finite is left to RowGemm.
  static void check(const Gemm4bit& d, Range columns) {
    constexpr int words = 32;
    const auto infinity = _mm512_set1_epi16(std::is_same_v<T, Half> ? 0x7c00 : 0x7f80);
    const auto* y = static_cast<const T*>(d.out.data);
    for (int64_t n = columns.begin; n < columns.end; n += words) {
      const auto inside = static_cast<__mmask32>((uint64_t{1} << smaller(words, columns.end - n)) - 1);
      const __m512i sizes = _mm512_and_si512(_mm512_maskz_loadu_epi16(inside, y + n), _mm512_set1_epi16(0x7fff));
      auto left = _mm512_cmpge_epi16_mask(sizes, infinity);
      if (left == 0) continue;
      const Scratch packed(Plain::pack_bytes(d));
      Plain::pack(d, packed.data(), {0, 1});
      for (; left != 0; left &= left - 1) Plain::run(d, packed.data(), {n + __builtin_ctz(left), n + __builtin_ctz(left) + 1});
    }
  }

  // |x| is at most its largest bits.
  BNB_INLINE static __m512i larger(__m512i top, __m512 x) { return _mm512_max_epu32(top, _mm512_castps_si512(_mm512_abs_ps(x))); }
  BNB_INLINE static float largest_of(__m512i top) { return std::bit_cast<float>(_mm512_reduce_max_epu32(top)); }  // a NaN is above all

  static bool pack_terms(const Gemm4bit& d, Packed& to) {
    const T* from = static_cast<const T*>(d.a.data);
    __m512i top = _mm512_setzero_si512();
    for (int64_t k = 0; k < d.k; k += Isa::lanes) top = larger(top, Isa::load(from + k));
    const float largest = largest_of(top);
    if (largest != 0 && !(largest > 0x1p-60f && largest < __builtin_inff())) return false;
    const int64_t count = steps(d);
    auto* const keys = reinterpret_cast<Key*>(to.terms() + 2 * count);
    Key* end = keys;
    for (int64_t i = 0; i < count; ++i) {
      const Part part = !is_odd(d) || i < count / 2 ? own : i == count / 2 ? shared : behind;
      __m512 x[8];
      load(d, i, x);
      top = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (const auto& v : x) top = larger(top, v);
      const float most_here = largest_of(top);
      const int below = power_of(largest) - power_of(most_here) - 1;
      if (below > 40 && most_here != 0) return false;
      const int exponent = below < 0 || most_here == 0 ? 0 : below;
      __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 8
      for (const auto& v : x) total = _mm512_add_ps(total, _mm512_min_ps(_mm512_abs_ps(v), _mm512_set1_ps(most_here / 8)));
      // Where the mean is less than a 32nd, the low byte would be more than the others are.
      if (_mm512_reduce_add_ps(total) < most_here * (step / 32)) {
        if (!fits(x, most_here)) return false;
        *end++ = Key(part, exponent, i, Key::high);
        *end++ = Key(part, exponent + 7, i, Key::rest);
      } else {
        *end++ = Key(part, exponent, i, Key::whole);
      }
    }
    std::sort(keys, end);
    to.unit = largest / most;
    for (int p = own; p < parts; ++p) to.count[p] = 0, to.rescale[p] = 1;
    Term* term = to.terms();
    for (const Key* key = keys; key < end; ++key, ++term) {
      const int part = key->part(), exponent = key->exponent();
      const float scale = to.unit * power(-exponent), inverse = largest == 0 ? 0 : most / largest * power(exponent);
      __m512 x[8];
      load(d, key->place(), x);
      if (key->kind() == Key::rest)
#pragma GCC unroll 8
        for (auto& v : x) digits<7>(v, scale * 128, inverse / 128);
      if (key->kind() == Key::high)
        put<7>(x, scale, inverse, *term);
      else
        put<0>(x, scale, inverse, *term);
      term->group = 2 * key->place();
      if (part == shared)
        term->rescale = power(-exponent);
      else
        term->rescale = to.rescale[part] / power(-exponent), to.rescale[part] = power(-exponent);
      ++to.count[part];
    }
    return true;
  }
  // Whether what few large elements leave to the others is enough: most of these are above a 4096th of the largest, the rest's unit a 512th
  // of that or less.
  BNB_INLINE static bool fits(const __m512 (&x)[8], float largest) {
    const __m512 least = _mm512_set1_ps(largest / 4096);
    __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (const auto& v : x) total = _mm512_add_ps(total, _mm512_min_ps(_mm512_abs_ps(v), least));
    return _mm512_reduce_add_ps(total) >= largest / 4096 * (step / 2);
  }
  static int power_of(float x) { return std::bit_cast<int>(x) >> 23; }
  static float power(int exponent) { return std::bit_cast<float>((127 + exponent) << 23); }

  // The groups at 2 `place` and behind it, of x after x.
  BNB_INLINE static void load(const Gemm4bit& d, int64_t place, __m512 (&x)[8]) {
    const T* from = static_cast<const T*>(d.a.data);
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v) {
      const int64_t k = place * step + v * Isa::lanes;
      x[v] = Isa::load(from + (k < d.k ? k : k - d.k));
    }
  }

  // term = the nearest multiples of 2^zeros to x * inverse; x becomes what they leave.
  template <int zeros> BNB_INLINE static void put(__m512 (&x)[8], float scale, float inverse, Term& term) {
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

  // to[height][columns_at_once], when `sums` are finished.
  template <int height>
  [[gnu::noinline]] static void columns_of(const Table& table, const Rows& rows, const Packed& x, Sums& sums, float* to) {
    __m512 sum[columns_at_once];
#pragma GCC unroll 8
    for (auto& s : sum) s = _mm512_setzero_ps();
    const Term* term = add(table, rows, x, x.terms(), own, sum);
    if constexpr (height == 2) {
      __m512 second[columns_at_once];
#pragma GCC unroll 8
      for (auto& s : second) s = _mm512_setzero_ps();
      for (const Term* const end = term + x.count[shared]; term < end; ++term) {
        const __m512 unit = _mm512_set1_ps(term->rescale);
        each_two(table, rows, *term, [&](int j, __m512 part, __m512 absmax) __attribute__((always_inline)) {
          part = _mm512_mul_ps(part, unit);
          sum[j] = _mm512_mask3_fmadd_ps(part, absmax, sum[j], 0x00ff);
          second[j] = _mm512_mask3_fmadd_ps(part, absmax, second[j], 0xff00);
        });
      }
      sums.put(sum, to);
      add(table, rows, x, term, behind, second);
      sums.put(second, to + columns_at_once);
    } else {
      sums.put(sum, to);
    }
  }

  // The terms of a part.
  BNB_INLINE static const Term* add(const Table& table, const Rows& rows, const Packed& x, const Term* term, Part part,
                                    __m512 (&sum)[columns_at_once]) {
    const auto rescale = [&](float by) __attribute__((always_inline)) {
      if (by == 1) return;
#pragma GCC unroll 8
      for (auto& s : sum) s = _mm512_mul_ps(s, _mm512_set1_ps(by));
    };
    for (const Term* const end = term + x.count[part]; term < end; ++term) {
      rescale(term->rescale);
      each_two(table, rows, *term,
               [&](int j, __m512 value, __m512 absmax) __attribute__((always_inline)) { sum[j] = _mm512_fmadd_ps(value, absmax, sum[j]); });
    }
    rescale(x.rescale[part]);
    return term;
  }

  // f(column, the sum over each 8 elements, absmax).
  template <class F> BNB_INLINE static void each_two(const Table& table, const Rows& all, const Term& x, F&& f) {
    const Rows* rows = &all;
    asm("" : "+r"(rows));  // offsets from memory: GCC would keep some in vectors
    const uint8_t* codes_at = rows->codes + x.group * (kGroup / 2);
    const float* absmax = rows->absmax + x.group;
#pragma GCC unroll 4
    for (int j = 0; j < columns_at_once; j += 2) {
      __m512i codes[2];
      __m512 part[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const uint8_t* from = codes_at + rows->codes_at[j + i];
        prefetch_codes(from);
        codes[i] = _mm512_loadu_si512(from);
      }
      multiply(table, codes, x, part);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) f(j + i, part[i], two_scales(absmax + rows->absmax_at[j + i], 1));
    }
  }

  // to[j] = unit * the lanes of sum j
  BNB_INLINE static void add_up(const float (&sum)[columns_at_once][Isa::lanes], float unit, float* to) {
    __m512 pairs[columns_at_once / 2];  // sum 2 j in the lower half, 2 j + 1 in the upper one
    const auto half = [&](int j, int i) __attribute__((always_inline)) {
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_load_ps(sum[j] + 8 * i)), _mm256_load_ps(sum[j + 1] + 8 * i), 1);
    };
#pragma GCC unroll 4
    for (int j = 0; j < columns_at_once / 2; ++j) pairs[j] = _mm512_add_ps(half(2 * j, 0), half(2 * j, 1));
    const __m512 first = add_parts<0x88, 0xdd>(pairs[0], pairs[1]), second = add_parts<0x88, 0xdd>(pairs[2], pairs[3]);
    // 128-bit lane l: sums l, 4 + l, l, 4 + l, then both parts of each.
    const __m512 both = _mm512_add_ps(_mm512_unpacklo_ps(first, second), _mm512_unpackhi_ps(first, second));
    const __m512 all = _mm512_mul_ps(_mm512_add_ps(both, _mm512_permute_ps(both, 0x4e)), _mm512_set1_ps(unit));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 4, 8, 12, 1, 5, 9, 13);
    _mm256_storeu_ps(to, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, all)));
  }
  template <int first, int second> BNB_INLINE static __m512 add_parts(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, first), _mm512_shuffle_f32x4(a, b, second));
  }

  // part[i] = sum of value * x over each 8 elements. Two vectors at once: one alone waits for its own dot products.
  BNB_INLINE static void multiply(const Table& table, const __m512i (&codes)[2], const Term& x, __m512 (&part)[2]) {
    __m512i odd[2], even[2], high_odd[2], high_even[2], dot[2];
    const __m512i high = table.high, low = table.low;
    const auto each = [](auto&& f) __attribute__((always_inline)) { f(0), f(1); };
    // The permutes look at the low 6 bits of a byte, of which the tables ignore two.
    each([&](int i) { odd[i] = codes[i], even[i] = _mm512_srli_epi16(codes[i], 4); });
    each([&](int i) { high_odd[i] = _mm512_permutexvar_epi8(odd[i], high); });
    each([&](int i) { high_even[i] = _mm512_permutexvar_epi8(even[i], high); });
    each([&](int i) { dot[i] = Ops::dot(high_odd[i], x.high_odd, x.offset); });
    each([&](int i) { odd[i] = _mm512_permutexvar_epi8(odd[i], low); });
    each([&](int i) { dot[i] = Ops::dot(high_even[i], x.high_even, dot[i]); });
    each([&](int i) { even[i] = _mm512_permutexvar_epi8(even[i], low); });
    each([&](int i) { dot[i] = _mm512_slli_epi32(dot[i], 7); });
    each([&](int i) { dot[i] = Ops::dot(high_odd[i], x.low_odd, dot[i]); });
    each([&](int i) { dot[i] = Ops::dot(high_even[i], x.low_even, dot[i]); });
    each([&](int i) { dot[i] = Ops::dot(odd[i], x.high_odd, dot[i]); });
    each([&](int i) { dot[i] = Ops::dot(even[i], x.high_even, dot[i]); });
    each([&](int i) { part[i] = _mm512_cvtepi32_ps(dot[i]); });
  }
};

}  // namespace
}  // namespace bnb::cpu
