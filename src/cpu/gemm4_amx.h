// The 4-bit product in bf16 on AMX tiles.
//
// W is the first operand: a tile is 16 rows of W x 32 k, so that decoded rows need no transposition. a is the second one: k-pairs x up to 16
// rows of a, packed once a call in the order of k in which groups of W are decoded. A tile of sums is 16 columns of y x 16 rows of y, and is
// transposed on its way out. Sums run over k one pair after the other in fp32, whatever the tiling: a row of y does not depend on m.
// tdpbf16ps takes subnormals for zero, in its operands and its sums.
#pragma once

#if defined(__AMX_BF16__)

#include "gemm4_dot.h"

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

template <class Isa>
class AmxGemm {
  using Math = Bf16Math<Isa>;
  static constexpr int64_t tile = 16, tile_bytes = 1024, tile_elements = 512, tiles_per_group = 2;
  static constexpr int64_t panel_rows = 2 * tile;          // rows of W at once
  static constexpr int64_t short_chunk = 2, chunk = 8;     // groups of k that are decoded at once, for at most 32 rows of a and for more
  static constexpr int64_t block_bytes = 5 << 18;          // of packed a that stay in L2

  static int64_t groups(const Gemm4bit& d) { return ceil_div(d.k, kGroup); }
  // Rows of a in a tile. Up to 16 they are packed without gaps; more come in tiles of 16, the last one filled with zeros.
  static int64_t width(const Gemm4bit& d) { return smaller(d.m, tile); }
  static int64_t packed_tile_bytes(const Gemm4bit& d) { return width(d) * 64; }
  static int64_t row_tiles(const Gemm4bit& d) { return ceil_div(d.m, tile); }

 public:
  static int64_t pack_bytes(const Gemm4bit& d) { return row_tiles(d) * groups(d) * tiles_per_group * packed_tile_bytes(d); }
  static int64_t pack_units(const Gemm4bit& d) { return row_tiles(d); }

  // [row tile][k / 32][16 pairs of k][width]
  static void pack(const Gemm4bit& d, void* packed, Range units) {
    const int64_t columns = width(d), bytes = packed_tile_bytes(d);
    const auto mask = static_cast<__mmask16>((1u << columns) - 1);
    for (int64_t u = units.begin; u < units.end; ++u) {
      auto* to = static_cast<char*>(packed) + u * groups(d) * tiles_per_group * bytes;
      const int64_t m = u * tile, count = smaller(tile, d.m - m);
      const BFloat16* from = static_cast<const BFloat16*>(d.a.data) + m * d.k;
      for (int64_t k = 0; k < d.k; k += kGroup, to += tiles_per_group * bytes) {
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
        for (int64_t t = 0; t < tiles_per_group; ++t) {
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
    const Tiles configured(static_cast<int>(width(d)));
    gemm.run(columns);
  }

 private:
  // Tiles 0-3: sums; 4, 5: weights; 6, 7: activations.
  struct Tiles {
    explicit Tiles(int width) {
      struct {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
      } config;
      for (int i = 0; i < 8; ++i) {
        config.rows[i] = 16;
        config.row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? 64 : 4 * width);
      }
      _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
  };

  AmxGemm(const Gemm4bit& d, const void* packed)
      : d_(d),
        decoder_(d),
        x_(static_cast<const char*>(packed)),
        groups_(groups(d)),
        layout_(layout_of(d)),
        x_tile_(packed_tile_bytes(d)),
        x_tile_row_(groups_ * tiles_per_group * x_tile_),
        chunk_(d.m <= 2 * tile ? short_chunk : chunk),
        block_tiles_(block_tiles(d)),
        scratch_((2 * chunk_ * tiles_per_group + 2 * block_tiles_) * tile_bytes + panel_rows * absmax_floats() * 4),
        panel_(static_cast<char*>(scratch_.data())),
        sums_(panel_ + 2 * chunk_ * tiles_per_group * tile_bytes),
        absmax_(reinterpret_cast<float*>(sums_ + 2 * block_tiles_ * tile_bytes)) {}

  int64_t absmax_floats() const { return Decoder<Math>::absmax_floats(d_); }
  // Row tiles of a that stay in L2: an even number.
  static int64_t block_tiles(const Gemm4bit& d) {
    const int64_t fit = block_bytes / (groups(d) * tiles_per_group * tile_bytes + 1) / 2 * 2, all = (row_tiles(d) + 1) / 2 * 2;
    return smaller(all, fit < 4 ? 4 : fit);
  }

  void run(Range columns) const {
    for (int64_t t = 0; t < row_tiles(d_); t += block_tiles_) {
      const int64_t count = smaller(block_tiles_, row_tiles(d_) - t);
      with(layout_, [&](auto layout) {
        for (int64_t n = columns.begin; n < columns.end; n += panel_rows) {
          if (columns.end - n > tile)
            columns_of<layout(), 2>(t, count, n);
          else
            columns_of<layout(), 1>(t, count, n);
        }
      });
    }
  }

  // 16 * P columns of y from n on, rows of `count` tiles from tile t on.
  template <Layout layout, int P>
  void columns_of(int64_t t, int64_t count, int64_t n) const {
    Row rows[P * tile];
    for (int64_t i = 0; i < P * tile; ++i) rows[i] = decoder_.row(smaller(n + i, d_.n - 1), absmax_ + i * absmax_floats());
    const char* x = x_ + t * x_tile_row_;
    int64_t g = 0;
    do {
      const int64_t end = smaller(g + chunk_, groups_), k_tiles = (end - g) * tiles_per_group;
      for (int64_t p = 0; p < P; ++p)
        for (int64_t i = 0; i < tile; ++i) {
          auto* to = reinterpret_cast<uint16_t*>(panel_ + p * chunk_ * tiles_per_group * tile_bytes) + i * 32;
          decoder_.template groups<layout>(rows[p * tile + i], g, end, to, tile_elements);
        }
      for (int64_t s = 0; s < count; s += 2) {
        const char* b = x + s * x_tile_row_ + g * tiles_per_group * x_tile_;
        char* sums = sums_ + s * P * tile_bytes;
        if (count - s > 1)
          multiply<P, 2>(k_tiles, b, sums, g == 0);
        else
          multiply<P, 1>(k_tiles, b, sums, g == 0);
      }
      g = end;
    } while (g < groups_);
    for (int64_t s = 0; s < count; ++s)
      for (int64_t p = 0; p < P; ++p) write(sums_ + (s * P + p) * tile_bytes, n + p * tile, (t + s) * tile);
  }

  // P x Q tiles of sums over k_tiles tiles of the panel.
  template <int P, int Q>
  [[gnu::noinline]] void multiply(int64_t k_tiles, const char* b, char* sums, bool first) const {
    const int64_t row = width(d_) * 4;
    const char *a = panel_, *a2 = panel_ + chunk_ * tiles_per_group * tile_bytes;
    if (first) {
      _tile_zero(0);
      if (P > 1) _tile_zero(1);
      if (Q > 1) _tile_zero(2);
      if (P > 1 && Q > 1) _tile_zero(3);
    } else {
      _tile_loadd(0, sums, 64);
      if (P > 1) _tile_loadd(1, sums + tile_bytes, 64);
      if (Q > 1) _tile_loadd(2, sums + P * tile_bytes, 64);
      if (P > 1 && Q > 1) _tile_loadd(3, sums + (P + 1) * tile_bytes, 64);
    }
    for (int64_t i = 0; i < k_tiles; ++i, a += tile_bytes, a2 += tile_bytes, b += x_tile_) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, row);
      _tile_dpbf16ps(0, 4, 6);
      if (P > 1) {
        _tile_loadd(5, a2, 64);
        _tile_dpbf16ps(1, 5, 6);
      }
      if (Q > 1) {
        _tile_loadd(7, b + x_tile_row_, row);
        _tile_dpbf16ps(2, 4, 7);
        if (P > 1) _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums, 64);
    if (P > 1) _tile_stored(1, sums + tile_bytes, 64);
    if (Q > 1) _tile_stored(2, sums + P * tile_bytes, 64);
    if (P > 1 && Q > 1) _tile_stored(3, sums + (P + 1) * tile_bytes, 64);
  }

  // y[m .. m + width)[n .. n + 16) from a tile of sums.
  void write(const char* sums, int64_t n, int64_t m) const {
    const int64_t count = smaller(width(d_), d_.m - m), columns = smaller(tile, d_.n - n);
    if (columns <= 0) return;
    const auto mask = static_cast<__mmask16>((1u << columns) - 1);
    alignas(64) float bias[tile] = {};
    if (d_.bias.size != 0)
      visit(d_.bias.dtype, [&]<class B>(B) {
        B values[tile] = {};
        std::memcpy(values, static_cast<const B*>(d_.bias.data) + n, static_cast<size_t>(columns) * sizeof(B));
        Isa::store(bias, Isa::load(values));
      });
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
  Decoder<Math> decoder_;
  const char* x_;
  int64_t groups_;
  Layout layout_;
  int64_t x_tile_, x_tile_row_;  // bytes of a tile of a, and of a row of them along k
  int64_t chunk_, block_tiles_;
  Scratch scratch_;
  char *panel_, *sums_;
  float* absmax_;
};

}  // namespace
}  // namespace bnb::cpu

#endif
