// The 4-bit product in bf16 on AMX tiles.
//
// W is the first operand: a tile is 16 rows of W x 32 k, so that decoded rows need no transposition. a is the second one: k-pairs x up to
// 16 rows of a, packed once a call in the order of k in which groups of W are decoded. A tile of sums is 16 columns of y x 16 rows of y,
// and is transposed on its way out. Sums run over k one pair after the other in fp32, whatever the tiling: a row of y does not depend on m.
// tdpbf16ps takes subnormals for zero, in its operands and its sums.
#pragma once

#if defined(__AMX_BF16__)

#include "gemm4_dot.h"
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

template <class Isa> class AmxGemm {
  using Math = Bf16Math<Isa>;
  static constexpr int64_t tile = 16, tile_bytes = 1024;
  static constexpr int64_t row_bytes = 128, group_bytes = tile * row_bytes;  // of a decoded group of 1 and of 16 rows of W
  static constexpr int64_t panel_tiles = 4;  // times 16 rows of W at once, for up to 16 rows of a; half of that for more
  static constexpr int64_t chunk = 4;        // groups of k that are decoded at once, for more than 32 rows of a
  static constexpr int64_t panel_bytes = 2 * panel_tiles * group_bytes;
  static_assert(2 * chunk * group_bytes <= panel_bytes);
  static constexpr int64_t block_bytes = 5 << 18;  // of packed a that stay in L2

  static int64_t groups(const Gemm4bit& d) { return ceil_div(d.k, kGroup); }
  // Rows of a in a tile. Up to 16 they are packed without gaps; more come in tiles of 16, the last one filled with zeros.
  static int64_t width(const Gemm4bit& d) { return smaller(d.m, tile); }
  static int64_t packed_tile_bytes(const Gemm4bit& d) { return width(d) * 64; }
  static int64_t row_tiles(const Gemm4bit& d) { return ceil_div(d.m, tile); }

 public:
  static int64_t pack_bytes(const Gemm4bit& d) { return row_tiles(d) * groups(d) * 2 * packed_tile_bytes(d); }
  static int64_t pack_units(const Gemm4bit& d) { return row_tiles(d); }

  // [row tile][k / 32][16 pairs of k][width]
  static void pack(const Gemm4bit& d, void* packed, Range units) {
    const int64_t columns = width(d), bytes = packed_tile_bytes(d);
    const auto mask = static_cast<__mmask16>((1u << columns) - 1);
    for (int64_t u = units.begin; u < units.end; ++u) {
      auto* to = static_cast<char*>(packed) + u * groups(d) * 2 * bytes;
      const int64_t m = u * tile, count = smaller(tile, d.m - m);
      const BFloat16* from = static_cast<const BFloat16*>(d.a.data) + m * d.k;
      for (int64_t k = 0; k < d.k; k += kGroup, to += 2 * bytes) {
        __m512i x[2][tile];
        for (int64_t i = 0; i < tile; ++i) {
          __m512i v[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
          if (i < count && k + kGroup <= d.k) {
            Math::Ops::permute(from + i * d.k + k, v);
          } else if (i < count) {
            BFloat16 group[kGroup] = {};
            std::memcpy(group, from + i * d.k + k, static_cast<size_t>(d.k - k) * sizeof(BFloat16));
            Math::Ops::permute(group, v);
          }
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

  static void run(const Gemm4bit& d, const void* packed, Range columns) {
    const AmxGemm gemm(d, packed);
    const Tiles tiles(std::integer_sequence<int, 4, 5>{}, width(d));  // 0-3: sums; 4, 5: weights; 6, 7: activations
    gemm.run(columns);
  }

 private:
  AmxGemm(const Gemm4bit& d, const void* packed)
      : d_(d),
        decoder_(d),
        x_(static_cast<const char*>(packed)),
        groups_(groups(d)),
        layout_(layout_of(d)),
        x_tile_(packed_tile_bytes(d)),
        x_tile_row_(groups_ * 2 * x_tile_),
        block_tiles_(block_tiles(d)),
        scratch_(panel_bytes + sum_tiles(d) * tile_bytes + Decoder<Isa, Math>::scratch_floats(d, panel_tiles * tile) * 4),
        panel_(static_cast<char*>(scratch_.data())),
        sums_(panel_ + panel_bytes),
        absmax_(reinterpret_cast<float*>(sums_ + sum_tiles(d) * tile_bytes)) {}

  // Row tiles of a that stay in L2: an even number.
  static int64_t block_tiles(const Gemm4bit& d) {
    const int64_t fit = block_bytes / (groups(d) * 2 * tile_bytes + 1) / 2 * 2, all = (row_tiles(d) + 1) / 2 * 2;
    return smaller(all, fit < 4 ? 4 : fit);
  }

  static int64_t sum_tiles(const Gemm4bit& d) { return 2 * block_tiles(d) > panel_tiles ? 2 * block_tiles(d) : panel_tiles; }

  void run(Range columns) const {
    for (int64_t t = 0; t < row_tiles(d_); t += block_tiles_) {
      const int64_t count = smaller(block_tiles_, row_tiles(d_) - t);
      with(layout_, [&](auto layout) {
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
  template <Layout layout, int P, int Q> void columns_of(int64_t t, int64_t count, int64_t n) const {
    Row rows[P * tile];
    decoder_.template rows<layout>(n, P * tile, absmax_, rows);
    const char* x = x_ + t * x_tile_row_;
    if constexpr (Q == 0)
      wide<layout, P>(rows, n, x, count);
    else
      narrow<layout, P, Q>(rows, n, x);
    for (int64_t s = 0; s < count; ++s)
      for (int64_t p = 0; p < P; ++p) write(sums_ + (s * P + p) * tile_bytes, n + p * tile, (t + s) * tile);
  }

  // Up to 2 tiles of rows of a: sums stay in registers; group g is decoded while group g - 1 is multiplied, some rows a step.
  template <Layout layout, int P, int Q> void narrow(const Row* rows, int64_t n, const char* x) const {
    using S = Sums<P, Q>;
    constexpr int rows_a_step = 16 * P / S::steps;
    const auto table = decoder_.table();  // this and the rest in registers: every tile load clobbers memory
    char* const panel = panel_;
    const int64_t ahead = P * tile * d_.k / 2, x_tile = x_tile_, x_tile_row = x_tile_row_;
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

  template <Layout layout, int P> void wide(const Row* rows, int64_t n, const char* x, int64_t count) const {
    constexpr int64_t stride = chunk * group_bytes;
    const auto table = decoder_.table();
    for (int64_t g = 0; g < groups_; g += chunk) {
      const int64_t end = smaller(g + chunk, groups_);
      for (int64_t i = g; i < end; ++i)
        for (int p = 0; p < P; ++p)
          decode<layout, tile>(table, rows + p * tile, n + p * tile, i, panel_ + (i - g) * group_bytes + p * stride, P * tile * d_.k / 2);
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

  // Group g of some rows to the panel: [row][64 k].
  template <Layout layout, int count>
  BNB_INLINE void decode(__m512 table, const Row* rows, int64_t n, int64_t g, char* to, int64_t ahead) const {
    decoder_.template group_of_rows<layout, count>(table, rows, n, g, reinterpret_cast<uint16_t*>(to), kGroup, kGroup / 2, ahead);
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
      tile_dot<p + P * q, 4 + p % 2, 6 + q>();
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

  // y[m .. m + width)[n .. n + 16) from a tile of sums.
  void write(const char* sums, int64_t n, int64_t m) const {
    const int64_t count = smaller(width(d_), d_.m - m), columns = smaller(tile, d_.n - n);
    if (columns <= 0) return;
    const auto mask = static_cast<__mmask16>((1u << columns) - 1);
    alignas(64) float bias[tile];
    load_bias(d_.bias, n, bias);
    __m512i x[tile];
    for (int64_t i = 0; i < tile; ++i) x[i] = _mm512_load_si512(sums + 64 * i);
    transpose(x);
    auto* out = static_cast<BFloat16*>(d_.out.data) + m * d_.n + n;
#pragma GCC unroll 16
    for (int64_t i = 0; i < tile; ++i) {
      if (i >= count) break;
      const __m512 y = _mm512_add_ps(_mm512_castsi512_ps(x[i]), _mm512_load_ps(bias));
      _mm256_mask_storeu_epi16(out + i * d_.n, mask, Isa::template round16<BFloat16>(y));
    }
  }

  const Gemm4bit& d_;
  Decoder<Isa, Math> decoder_;
  const char* x_;
  int64_t groups_;
  Layout layout_;
  int64_t x_tile_, x_tile_row_;  // bytes of a tile of a, and of a row of them along k
  int64_t block_tiles_;
  Scratch scratch_;
  char *panel_, *sums_;
  float* absmax_;
};

}  // namespace
}  // namespace bnb::cpu

#endif
