// Products on AMX tiles, for any weight that becomes rows of 128 bytes (64 of bf16, 128 of int8): a group.
//
// W is the first operand: a tile is 16 rows of W x 64 bytes, so that its rows need no transposition. a is the second one: dwords of k x up
// to 16 rows of a, packed first in the order of k in which groups of W are laid out. A tile of sums is 16 columns of y x 16 rows of
// y, and is transposed on its way out. Sums run over k one dword after the other within a chunk of groups, then over the chunks, whatever
// the tiling: a row of y does not depend on m.
//
// Up to 32 rows of a: sums stay in the tiles while groups of W are decoded and multiplied; W from memory is the limit.
// More: a panel of 32 rows of W, a chunk at a time, meets all row tiles of a that stay in L2, two by two. The chunk stays in L1, a passes
// it by (tileloaddt1). Between the tile instructions the next chunk is decoded over this one, sums are stored, and become y after the last
// chunk. Each chunk starts from zero and the sums of chunks are added in vectors, for tiles of sums that are loaded again stall.
//
// `Operand` names the rest:
//   D, group, bytes, Row         the descriptor, a group in elements and in bytes as stored, what a row of W is read from
//   load(d, m, k, v)             a group of row m of a in the order of k in W, zeros behind its end
//   with_layout(f)               f(constant): how rows of W lie
//   rows<layout>(n, count, ..)   rows [n, n + count) of W; those behind the last repeat it
//   row(n)                       where row n of W begins
//   prefetch(row, g)             brings a group into L2
//   table()                      what `decode` wants in registers
//   decode<layout, count>(..)    a group of some rows to [row][128 bytes]
//   dot<c, a, b>()               the tile instruction
//   add(x, y)                    of 16 sums
//   columns(p, n), write(p, ..)  columns [n, n + 16) of y are tile p of the panel; rows of them from a transposed tile of sums
#pragma once

#include "cpu/gemm/product.h"
#include "cpu/isa/amx.h"
#include "cpu/runtime/scratch.h"

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
  static constexpr int64_t panel = 2 * tile;                                 // rows of W
  static_assert(kColumnStep % panel == 0);
  static constexpr int64_t chunk = 8, chunk_bytes = 2 * chunk * group_bytes;
  static constexpr int64_t sums_bytes = 4 * tile_bytes;  // as many sums as are in tiles at once
  static constexpr int64_t block_bytes = 5 << 18;        // of packed a that stay in L2

  static int64_t groups(const D& d) { return ceil_div(d.k, Operand::group); }
  // Rows of a in a tile. Up to 16 they are packed without gaps; more come in tiles of 16, the last one filled with zeros.
  static int64_t width(const D& d) { return smaller(d.m, tile); }
  static int64_t packed_tile_bytes(const D& d) { return width(d) * 64; }
  static int64_t row_tiles(const D& d) { return ceil_div(d.m, tile); }
  static int64_t row_tile_bytes(const D& d) { return groups(d) * 2 * packed_tile_bytes(d); }
  static int64_t tiles_bytes(const D& d) { return row_tiles(d) * row_tile_bytes(d); }

 public:
  // [row tile][64 bytes of k][16 dwords of k][width], then what the operand packs of a row
  static int64_t pack_bytes(const D& d) { return tiles_bytes(d) + Operand::pack_bytes(d); }
  static int64_t pack_units(const D& d) { return row_tiles(d); }

  static void pack(const D& d, void* packed, Range units) {
    const int64_t columns = width(d), bytes = packed_tile_bytes(d);
    const auto mask = static_cast<__mmask16>((1u << columns) - 1);
    for (int64_t u = units.begin; u < units.end; ++u) {
      auto* to = static_cast<char*>(packed) + u * row_tile_bytes(d);
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
    gemm.operand_.with_layout([&](auto layout) {
      if (gemm.row_tiles_ == 1)
        gemm.template narrow<layout(), 4, 1>(columns);
      else if (gemm.row_tiles_ == 2)
        gemm.template narrow<layout(), 2, 2>(columns);
      else
        for (int64_t t = 0; t < gemm.row_tiles_; t += gemm.block_tiles_)
          gemm.template wide<layout()>(t, smaller(gemm.block_tiles_, gemm.row_tiles_ - t), columns);
    });
  }

 private:
  AmxGemm(const D& d, const void* packed)
      : d_(d),
        operand_(d, static_cast<const char*>(packed) + tiles_bytes(d)),
        x_(static_cast<const char*>(packed)),
        groups_(groups(d)),
        chunks_(groups_ > chunk ? ceil_div(groups_, chunk) : 1),
        row_tiles_(row_tiles(d)),
        x_tile_(packed_tile_bytes(d)),
        x_tile_row_(row_tile_bytes(d)),
        block_tiles_(block_tiles(d)),
        scratch_(chunk_bytes + (block_tiles_ / 2 * chunks_ + 1) * sums_bytes + Operand::scratch_bytes(d, 2 * panel)),
        weights_(static_cast<char*>(scratch_.data())),
        sums_(weights_ + chunk_bytes),
        row_scratch_(sums_ + (block_tiles_ / 2 * chunks_ + 1) * sums_bytes) {}

  // Row tiles of a that stay in L2, in blocks of about the same size: an even number.
  static int64_t block_tiles(const D& d) {
    const int64_t fit = block_bytes / (row_tile_bytes(d) + 1), all = row_tiles(d);
    const int64_t blocks = ceil_div(all, fit < 4 ? 4 : fit);
    return ceil_div(ceil_div(all, blocks), 2) * 2;
  }

  char* sums_at(int64_t pair, int64_t c) const { return sums_ + (pair * chunks_ + c) * sums_bytes; }

  // All of a, Q row tiles, with P tiles of W at once.
  template <auto layout, int P, int Q> void narrow(Range columns) {
    int64_t n = columns.begin;
    for (; columns.end - n > (P - 1) * tile; n += P * tile) narrow_panel<layout, P, Q>(n, columns.end);
    if constexpr (P == 4)
      for (; columns.end - n > tile; n += 2 * tile) narrow_panel<layout, 2, Q>(n, columns.end);
    for (; n < columns.end; n += tile) narrow_panel<layout, 1, Q>(n, columns.end);
  }

  // Group g is decoded while group g - 1 is multiplied, some rows a step. The next panel is fetched meanwhile, in the order of memory: the
  // rows of a panel are more than the CPU follows on its own.
  template <auto layout, int P, int Q> void narrow_panel(int64_t n, int64_t end) {
    using S = Sums<P, Q>;
    constexpr int rows_a_step = 16 * P / S::steps;
    constexpr int64_t bytes_a_step = rows_a_step * Operand::bytes;
    Row rows[P * tile];
    operand_.template rows<layout>(n, P * tile, row_scratch_, rows);
    const auto table = operand_.table();  // this and the rest in registers: every tile load clobbers memory
    char *const weights = weights_, *sums = sums_;
    const char* const x = x_;
    const int64_t x_tile = x_tile_, x_tile_row = x_tile_row_;
    const char* const next = n + P * tile < end ? static_cast<const char*>(operand_.row(n + P * tile)) : nullptr;
    const auto decode_at = [&, weights, next](int64_t g, auto step) __attribute__((always_inline)) {
      constexpr int first = step() * rows_a_step;
      if (next)
        for (int64_t i = 0; i < bytes_a_step; i += 64) __builtin_prefetch(next + (g * S::steps + step()) * bytes_a_step + i, 0, 2);
      operand_.template decode<layout, rows_a_step>(table, rows + first, n + first, g, weights + (g % 2 * P * tile + first) * row_bytes);
    };
    const auto multiply_at = [=](int64_t g, auto step) __attribute__((always_inline)) {
      S::template step<step()>(weights + g % 2 * P * group_bytes, group_bytes, x + g * 2 * x_tile, x_tile, x_tile_row);
    };
    S::zero();
    if (groups_ > 0) S::each_step([&](auto step) { decode_at(0, step); });
    for (int64_t g = 1; g < groups_; ++g) {
      S::each_step([&](auto step) __attribute__((always_inline)) {
        multiply_at(g - 1, step);
        decode_at(g, step);
      });
      if (g % chunk == 0) {
        S::store(sums);
        S::zero();
        sums += sums_bytes;
      }
    }
    if (groups_ > 0) S::each_step([&](auto step) { multiply_at(groups_ - 1, step); });
    S::store(sums);
    for (int64_t p = 0; p < P && n + p * tile < d_.n; ++p) {
      operand_.columns(0, n + p * tile);
      for (int64_t q = 0; q < Q; ++q) write(0, sums_ + (p + P * q) * tile_bytes, q * tile);
    }
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

  // The chunks of W in the order of their use: one is decoded over the one before it, group by group as soon as that has been used.
  template <auto layout> struct Ahead {
    AmxGemm& g;
    int64_t end, n, c = 0, decoded = 0, count = 0;  // groups
    Row rows[panel];

    Ahead(AmxGemm& gemm, Range columns) : g(gemm), end(columns.end), n(columns.begin) { open(); }
    void open() {
      if (c == 0 && n < end) g.operand_.template rows<layout>(n, panel, g.row_scratch_, rows);
      decoded = 0, count = n < end ? smaller(chunk, g.groups_ - c * chunk) : 0;
    }
    void advance() {
      if (++c == g.chunks_) c = 0, n += panel;
      open();
    }
    template <class Table> BNB_INLINE void decode(const Table& table) {
      g.operand_.template decode<layout, panel>(table, rows, n, c * chunk + decoded, g.weights_ + decoded * 2 * group_bytes);
      ++decoded;
    }
  };

  // Sums of two row tiles x a panel, tile p + 2 q, that become y tile by tile.
  struct Finished {
    int64_t m = 0, n = 0, pair = 0;
    int tiles = 0;  // still to be written
  };
  void write(Finished& f) {
    const int u = 4 - f.tiles--, p = u % 2, q = u / 2;
    if (f.pair == 0 && u == 0)
      for (int i = 0; i < 2 && f.n + i * tile < d_.n; ++i) operand_.columns(i, f.n + i * tile);
    const int64_t m = f.m + q * tile;
    if (m < d_.m && f.n + p * tile < d_.n) write(p, sums_at(f.pair, 0) + u * tile_bytes, m);
  }

  // y[m .. m + 16) of 16 columns from their sums over the chunks.
  void write(int p, const char* sums, int64_t m) {
    __m512i x[tile];
    for (int64_t i = 0; i < tile; ++i) x[i] = _mm512_load_si512(sums + 64 * i);
    for (int64_t c = 1; c < chunks_; ++c) {
      sums += sums_bytes;
      for (int64_t i = 0; i < tile; ++i) x[i] = Operand::add(x[i], _mm512_load_si512(sums + 64 * i));
    }
    transpose(x);
    operand_.write(p, x, m, smaller(width(d_), d_.m - m));
  }

  // `count` row tiles of a from tile t on.
  template <auto layout> void wide(int64_t t, int64_t count, Range columns) {
    const auto table = operand_.table();
    const int64_t pairs = ceil_div(count, 2);
    Ahead<layout> ahead(*this, columns);
    Finished finished;
    char* done = sums_at(pairs, 0);  // where the sums that are in the tiles go; the first are none
    while (ahead.decoded < ahead.count) ahead.decode(table);
    for (int64_t n = columns.begin; n < columns.end; n += panel)
      for (int64_t c = 0; c < chunks_; ++c) {
        const int64_t first = c * chunk, count_of_groups = smaller(chunk, groups_ - first);
        ahead.advance();
        for (int64_t s = 0; s < pairs; ++s) {
          const bool last = s == pairs - 1;
          // Rows that this pair brings into L2: with two pairs there is too little time between fetching and decoding.
          const Range fetch = pairs > 2 && !last ? Range{s * panel / (pairs - 1), (s + 1) * panel / (pairs - 1)} : Range{};
          const auto between = [&](int64_t g) __attribute__((always_inline)) {
            if (g < ahead.count) {
              if (last) ahead.decode(table);
              for (int64_t i = fetch.begin; i < fetch.end; ++i) Operand::prefetch(ahead.rows[i], ahead.c * chunk + g);
            }
            if (g % 2 != 0 && finished.tiles > 0) write(finished);
          };
          const char* x = x_ + (t + 2 * s) * x_tile_row_ + first * 2 * tile_bytes;
          if (2 * s + 1 < count)
            multiply<2>(weights_, x, count_of_groups, done, between);
          else
            multiply<1>(weights_, x, count_of_groups, done, between);
          while (finished.tiles > 0) write(finished);
          done = sums_at(s, c);
          if (c == chunks_ - 1) finished = {(t + 2 * s) * tile, n, s, 4};
        }
        while (ahead.decoded < ahead.count) ahead.decode(table);
      }
    store<0, 1, 2, 3>(done);
    while (finished.tiles > 0) write(finished);
  }

  // Two tiles of W x Q tiles of a, over some groups. The sums that were in the tiles go to `done` on the way.
  template <int Q, class F> BNB_INLINE void multiply(const char* w, const char* x, int64_t groups, char* done, F&& between) const {
    if (groups == 0) {
      store<0, 1, 2, 3>(done);
      tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
      return;
    }
    load<Q>(w, x);
    store<0>(done), tile_zero<0>(), Operand::template dot<0, 4, 6>();
    store<1>(done), tile_zero<1>(), Operand::template dot<1, 5, 6>();
    store<2, 3>(done);
    if constexpr (Q == 2) {
      tile_zero<2>(), Operand::template dot<2, 4, 7>();
      tile_zero<3>(), Operand::template dot<3, 5, 7>();
    }
    for (int64_t g = 0;;) {
      step<Q>(w + 64, x + tile_bytes);
      between(g);
      if (++g == groups) break;
      w += 2 * group_bytes, x += 2 * tile_bytes;
      step<Q>(w, x);
    }
  }
  template <int Q> BNB_INLINE void load(const char* w, const char* x) const {
    tile_load<4>(w, row_bytes);
    tile_load_once<6>(x, 64);
    tile_load<5>(w + group_bytes, row_bytes);
    if constexpr (Q == 2) tile_load_once<7>(x + x_tile_row_, 64);
  }
  template <int Q> BNB_INLINE void step(const char* w, const char* x) const {
    load<Q>(w, x);
    Operand::template dot<0, 4, 6>();
    Operand::template dot<1, 5, 6>();
    if constexpr (Q == 2) Operand::template dot<2, 4, 7>(), Operand::template dot<3, 5, 7>();
  }
  template <int... t> BNB_INLINE static void store(char* sums) { (tile_store<t>(sums + t * tile_bytes, 64), ...); }

  const D& d_;
  Operand operand_;
  const char* x_;
  int64_t groups_, chunks_, row_tiles_;
  int64_t x_tile_, x_tile_row_;  // bytes of a tile of a, and of a row of them along k
  int64_t block_tiles_;
  Scratch scratch_;
  char *weights_, *sums_, *row_scratch_;
};

}  // namespace
}  // namespace bnb::cpu
