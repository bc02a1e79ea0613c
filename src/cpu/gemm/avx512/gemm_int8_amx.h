// int8 weights on AMX tiles (gemm_amx.h).
#pragma once

#include "cpu/gemm/gemm_amx.h"
#include "cpu/gemm/gemm_int8_dot.h"

namespace bnb::cpu {
namespace {

template <class Isa> class Int8Tiles {
 public:
  using D = GemmInt8;
  using Row = const int8_t*;
  static constexpr int64_t group = 128, bytes = group;

  static int64_t pack_bytes(const D& d) { return Finish8<Isa>::pack_bytes(d); }
  static void pack(const D& d, void* packed, Range rows) { Finish8<Isa>::pack(d, packed, rows); }
  BNB_INLINE static void load(const D& d, int64_t m, int64_t k, __m512i (&v)[2]) { load(d.a.data() + m * d.k + k, d.k - k, v); }

  Int8Tiles(const D& d, const void* packed) : d_(d), finish_{{d, packed}, {d, packed}} {}

  static int64_t scratch_bytes(const D&, int64_t) { return 0; }
  template <class F> void with_layout(F&& f) const { f(std::integral_constant<int, 0>{}); }
  template <int> void rows(int64_t n, int64_t count, void*, Row* to) const {
    for (int64_t i = 0; i < count; ++i) to[i] = d_.b.data() + smaller(n + i, d_.n - 1) * d_.k;
  }
  const void* row(int64_t n) const { return d_.b.data() + n * d_.k; }
  BNB_INLINE static void prefetch(Row row, int64_t g) {
    __builtin_prefetch(row + g * group, 0, 2), __builtin_prefetch(row + g * group + 64, 0, 2);
  }
  struct Nothing {};
  BNB_INLINE Nothing table() const { return {}; }
  template <int, int count> BNB_INLINE void decode(Nothing, const Row* rows, int64_t, int64_t g, char* to) const {
    const int64_t left = d_.k - g * group;
#pragma GCC unroll 16
    for (int i = 0; i < count; ++i) {
      const int8_t* from = rows[i] + g * group;
      __m512i v[2];
      load(from, left, v);
      _mm512_store_si512(to + i * group, v[0]), _mm512_store_si512(to + i * group + 64, v[1]);
    }
  }
  template <int c, int a, int b> BNB_INLINE static void dot() { tile_dot_int8<c, a, b>(); }

  BNB_INLINE static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }

  void columns(int p, int64_t n) { finish_[p].columns(n); }
  void write(int p, const __m512i (&sums)[16], int64_t m, int64_t count) const {
    alignas(64) int32_t rows[16 * kSumColumns];
    for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(rows + i * kSumColumns, sums[i]);
    finish_[p].rows(m, count, rows);
  }

 private:
  BNB_INLINE static void load(const int8_t* from, int64_t left, __m512i (&v)[2]) {
    if (left >= group) [[likely]] {
      v[0] = _mm512_loadu_si512(from), v[1] = _mm512_loadu_si512(from + 64);
    } else {
      v[0] = _mm512_maskz_loadu_epi8(first(left), from);
      v[1] = left > 64 ? _mm512_maskz_loadu_epi8(first(left - 64), from + 64) : _mm512_setzero_si512();
    }
  }
  BNB_INLINE static __mmask64 first(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

  const D& d_;
  Finish8<Isa> finish_[2];
};

}  // namespace
}  // namespace bnb::cpu
