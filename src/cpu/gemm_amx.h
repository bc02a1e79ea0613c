// Products on AMX tiles, for any weight that becomes rows of 128 bytes (64 of bf16, 128 of int8): a group.
//
// W is the first operand: a tile is 16 rows of W x 64 bytes, so that its rows need no transposition. a is the second one: dwords of k x up
// to 16 rows of a, packed once a call in the order of k in which groups of W are laid out. A tile of sums is 16 columns of y x 16 rows of
// y, and is transposed on its way out. Sums run over k one dword after the other, whatever the tiling: a row of y does not depend on m.
//
// `Operand` names the rest:
//   D, group, Row                the descriptor, the elements of a group, what a row of W is read from
//   load(d, m, k, v)             a group of row m of a in the order of k in W, zeros behind its end
//   with_layout(f)               f(constant): how rows of W lie
//   rows<layout>(n, count, ..)   rows [n, n + count) of W; those behind the last repeat it
//   table()                      what `decode` wants in registers
//   decode<layout, count>(..)    a group of some rows to [row][128 bytes]
//   dot<c, a, b>()               the tile instruction
//   columns(n), write(..)        columns [n, n + 16) of y come next; rows of them from a transposed tile of sums
#pragma once

#if defined(__AMX_BF16__)

#include "product.h"
#include "scratch.h"
#include "simd/amx.h"

namespace bnb::cpu {
namespace {

// The transpose of 16 x 16 dwords.
BNB_INLINE void transpose(__m512i (&x)[16]) {
  __m512i y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]), y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      x[i + 2 * j] = _mm512_unpacklo_epi64(y[i + j], y[i + j + 2]);
      x[i + 2 * j + 1] = _mm512_unpackhi_epi64(y[i + j], y[i + j + 2]);
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {  // 128-bit lane l of x[4 r + i]: dword 4 l + i of rows 4 r .. 4 r + 3
    const __m512i p = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x44), q = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x44);
    const __m512i r = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xee), s = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xee);
    y[i] = _mm512_shuffle_i32x4(p, q, 0x88), y[4 + i] = _mm512_shuffle_i32x4(p, q, 0xdd);
    y[8 + i] = _mm512_shuffle_i32x4(r, s, 0x88), y[12 + i] = _mm512_shuffle_i32x4(r, s, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = y[i];
}

template <class Operand> class AmxGemm {
  using D = typename Operand::D;
  using Row = typename Operand::Row;
  static constexpr int64_t tile = 16, tile_bytes = 1024;
  static constexpr int64_t row_bytes = 128, group_bytes = tile * row_bytes;  // of a decoded group of 1 and of 16 rows of W
  static constexpr int64_t panel_tiles = 4;  // times 16 rows of W at once, for up to 16 rows of a; half of that for more
  static constexpr int64_t chunk = 4;        // groups that are decoded at once, for more than 32 rows of a
  static constexpr int64_t panel_bytes = 2 * panel_tiles * group_bytes;
  static_assert(2 * chunk * group_bytes <= panel_bytes);
  static constexpr int64_t block_bytes = 5 << 18;  // of packed a that stay in L2

  static int64_t groups(const D& d) { return ceil_div(d.k, Operand::group); }
  // Rows of a in a tile. Up to 16 they are packed without gaps; more come in tiles of 16, the last one filled with zeros.
  static int64_t width(const D& d) { return smaller(d.m, tile); }
  static int64_t packed_tile_bytes(const D& d) { return width(d) * 64; }
  static int64_t row_tiles(const D& d) { return ceil_div(d.m, tile); }

 public:
  // [row tile][64 bytes of k][16 dwords of k][width], then what the operand packs of a row
  static int64_t pack_bytes(const D& d) { return tiles_bytes(d) + Operand::pack_bytes(d); }
  static int64_t pack_units(const D& d) { return row_tiles(d); }

  static void pack(const D& d, void* packed, Range units) {
    const int64_t columns = width(d), bytes = packed_tile_bytes(d);
    const auto mask = static_cast<__mmask16>((1u << columns) - 1);
    for (int64_t u = units.begin; u < units.end; ++u) {
      auto* to = static_cast<char*>(packed) + u * groups(d) * 2 * bytes;
      const int64_t m = u * tile, count = smaller(tile, d.m - m);
      Operand::pack(d, static_cast<char*>(packed) + tiles_bytes(d), {m, m + count});
      for (int64_t k = 0; k < d.k; k += Operand::group, to += 2 * bytes) {
        __m512i x[2][tile];
        for (int64_t i = 0; i < tile; ++i) {
          __m512i v[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
          if (i < count) Operand::load(d, m + i, k, v);
          x[0][i] = v[0], x[1][i] = v[1];
        }
        for (int64_t t = 0; t < 2; ++t) {
          if (columns == 1) {
            _mm512_storeu_si512(to + t * bytes, x[t][0]);
          } else {
            transpose(x[t]);
            for (int64_t i = 0; i < tile; ++i) _mm512_mask_storeu_epi32(to + t * bytes + i * columns * 4, mask, x[t][i]);
          }
        }
      }
    }
  }

  static void run(const D& d, const void* packed, Range columns) {
    AmxGemm gemm(d, packed);
    const Tiles tiles(std::integer_sequence<int, 4, 5>{}, width(d));  // 0-3: sums; 4, 5: weights; 6, 7: activations
    gemm.run(columns);
  }

 private:
  AmxGemm(const D& d, const void* packed)
      : d_(d),
        operand_(d, static_cast<const char*>(packed) + tiles_bytes(d)),
        x_(static_cast<const char*>(packed)),
        groups_(groups(d)),
        x_tile_(packed_tile_bytes(d)),
        x_tile_row_(groups_ * 2 * x_tile_),
        block_tiles_(block_tiles(d)),
        scratch_(panel_bytes + sum_tiles(d) * tile_bytes + Operand::scratch_bytes(d, panel_tiles * tile)),
        panel_(static_cast<char*>(scratch_.data())),
        sums_(panel_ + panel_bytes),
        rows_(sums_ + sum_tiles(d) * tile_bytes) {}

  static int64_t tiles_bytes(const D& d) { return row_tiles(d) * groups(d) * 2 * packed_tile_bytes(d); }

  // Row tiles of a that stay in L2: an even number.
  static int64_t block_tiles(const D& d) {
    const int64_t fit = block_bytes / (groups(d) * 2 * tile_bytes + 1) / 2 * 2, all = (row_tiles(d) + 1) / 2 * 2;
    return smaller(all, fit < 4 ? 4 : fit);
  }

  static int64_t sum_tiles(const D& d) { return 2 * block_tiles(d) > panel_tiles ? 2 * block_tiles(d) : panel_tiles; }

  void run(Range columns) {
    for (int64_t t = 0; t < row_tiles(d_); t += block_tiles_) {
      const int64_t count = smaller(block_tiles_, row_tiles(d_) - t);
      operand_.with_layout([&](auto layout) {
        int64_t n = columns.begin;
        const auto sweep = [&](auto p, auto q) {
          for (; columns.end - n > (p == 1 ? 0 : (p - 1) * tile); n += p * tile) columns_of<layout(), p(), q()>(t, count, n);
        };
        using one = std::integral_constant<int, 1>;
        using two = std::integral_constant<int, 2>;
        using many = std::integral_constant<int, 0>;
        if (count == 1) {
          sweep(std::integral_constant<int, panel_tiles>{}, one{});
          sweep(two{}, one{});
          sweep(one{}, one{});
        } else if (count == 2) {
          sweep(two{}, two{});
          sweep(one{}, two{});
        } else {
          sweep(two{}, many{});
          sweep(one{}, many{});
        }
      });
    }
  }

  // 16 P columns of y from n on; Q tiles of rows (0: `count`) from tile t on.
  template <auto layout, int P, int Q> void columns_of(int64_t t, int64_t count, int64_t n) {
    Row rows[P * tile];
    operand_.template rows<layout>(n, P * tile, rows_, rows);
    const char* x = x_ + t * x_tile_row_;
    if constexpr (Q == 0)
      wide<layout, P>(rows, n, x, count);
    else
      narrow<layout, P, Q>(rows, n, x);
    for (int64_t p = 0; p < P && n + p * tile < d_.n; ++p) {
      operand_.columns(n + p * tile);
      for (int64_t s = 0; s < count; ++s) write(sums_ + (s * P + p) * tile_bytes, (t + s) * tile);
    }
  }

  // Up to 2 tiles of rows of a: sums stay in registers; group g is decoded while group g - 1 is multiplied, some rows a step.
  template <auto layout, int P, int Q> void narrow(const Row* rows, int64_t n, const char* x) const {
    using S = Sums<P, Q>;
    constexpr int rows_a_step = 16 * P / S::steps;
    const auto table = operand_.table();  // this and the rest in registers: every tile load clobbers memory
    char* const panel = panel_;
    const int64_t ahead = P * tile * Operand::row_bytes(d_), x_tile = x_tile_, x_tile_row = x_tile_row_;
    const auto decode_at = [=, this](int64_t g, auto step) __attribute__((always_inline)) {
      constexpr int first = step() * rows_a_step;
      decode<layout, rows_a_step>(table, rows + first, n + first, g, panel + (g % 2 * P * tile + first) * row_bytes, ahead);
    };
    const auto multiply_at = [=](int64_t g, auto step) __attribute__((always_inline)) {
      S::template step<step()>(panel + g % 2 * P * group_bytes, group_bytes, x + g * 2 * x_tile, x_tile, x_tile_row);
    };
    S::zero();
    if (groups_ > 0) S::each_step([&](auto step) { decode_at(0, step); });
    for (int64_t g = 1; g < groups_; ++g)
      S::each_step([&](auto step) __attribute__((always_inline)) {
        multiply_at(g - 1, step);
        decode_at(g, step);
      });
    if (groups_ > 0) S::each_step([&](auto step) { multiply_at(groups_ - 1, step); });
    S::store(sums_);
  }

  template <auto layout, int P> void wide(const Row* rows, int64_t n, const char* x, int64_t count) const {
    constexpr int64_t stride = chunk * group_bytes;
    const auto table = operand_.table();
    for (int64_t g = 0; g < groups_; g += chunk) {
      const int64_t end = smaller(g + chunk, groups_);
      for (int64_t i = g; i < end; ++i)
        for (int p = 0; p < P; ++p)
          decode<layout, tile>(table, rows + p * tile, n + p * tile, i, panel_ + (i - g) * group_bytes + p * stride,
                               P * tile * Operand::row_bytes(d_));
      for (int64_t s = 0; s < count; s += 2) {
        const char* b = x + s * x_tile_row_ + g * 2 * x_tile_;
        char* sums = sums_ + s * P * tile_bytes;
        if (count - s > 1)
          multiply<P, 2>(end - g, stride, b, sums, g == 0);
        else
          multiply<P, 1>(end - g, stride, b, sums, g == 0);
      }
    }
    if (groups_ == 0) std::memset(sums_, 0, static_cast<size_t>(count * P * tile_bytes));
  }

  template <auto layout, int count, class Table>
  BNB_INLINE void decode(const Table& table, const Row* rows, int64_t n, int64_t g, char* to, int64_t ahead) const {
    operand_.template decode<layout, count>(table, rows, n, g, to, ahead);
  }

  // P x Q tiles of sums, tile p + P q: 4 x 1, or up to 2 x 2. A group of k is added in steps of one tile_dot each.
  template <int P, int Q> struct Sums {
    static constexpr int count = P * Q, steps = 2 * count;
    template <class F> BNB_INLINE static void each_step(F&& f) {
      [&]<int... i>(std::integer_sequence<int, i...>)
          __attribute__((always_inline)) { (f(std::integral_constant<int, i>{}), ...); }(std::make_integer_sequence<int, steps>{});
    }
    BNB_INLINE static void zero() {
      each_tile([](auto t) { tile_zero<t()>(); });
    }
    BNB_INLINE static void load(const char* sums) {
      each_tile([&](auto t) { tile_load<t()>(sums + t * tile_bytes, 64); });
    }
    BNB_INLINE static void store(char* sums) {
      each_tile([&](auto t) { tile_store<t()>(sums + t * tile_bytes, 64); });
    }
    // a: weights, tiles a_tile bytes apart along n; b: activations, tiles b_tile bytes apart along k and b_row along m.
    template <int i> BNB_INLINE static void step(const char* a, int64_t a_tile, const char* b, int64_t b_tile, int64_t b_row) {
      constexpr int half = i / count, p = i % count % P, q = i % count / P;
      if constexpr (p == 0) tile_load<6 + q>(b + half * b_tile + q * b_row, b_tile / 16);
      if constexpr (q == 0) tile_load<4 + p % 2>(a + half * 64 + p * a_tile, row_bytes);
      Operand::template dot<p + P * q, 4 + p % 2, 6 + q>();
    }

   private:
    template <class F> BNB_INLINE static void each_tile(F&& f) {
      [&]<int... t>(std::integer_sequence<int, t...>) {
        (f(std::integral_constant<int, t>{}), ...);
      }(std::make_integer_sequence<int, count>{});
    }
  };
  template <int P, int Q> [[gnu::noinline]] void multiply(int64_t groups, int64_t a_tile, const char* b, char* sums, bool first) const {
    using S = Sums<P, Q>;
    if (first)
      S::zero();
    else
      S::load(sums);
    const char* a = panel_;
    for (int64_t g = 0; g < groups; ++g, a += group_bytes, b += 2 * x_tile_)
      S::each_step([&](auto step) { S::template step<step()>(a, a_tile, b, x_tile_, x_tile_row_); });
    S::store(sums);
  }

  // y[m .. m + width) of 16 columns from a tile of sums.
  void write(const char* sums, int64_t m) const {
    __m512i x[tile];
    for (int64_t i = 0; i < tile; ++i) x[i] = _mm512_load_si512(sums + 64 * i);
    transpose(x);
    operand_.write(x, m, smaller(width(d_), d_.m - m));
  }

  const D& d_;
  Operand operand_;
  const char* x_;
  int64_t groups_;
  int64_t x_tile_, x_tile_row_;  // bytes of a tile of a, and of a row of them along k
  int64_t block_tiles_;
  Scratch scratch_;
  char *panel_, *sums_, *rows_;
};

}  // namespace
}  // namespace bnb::cpu

#endif
