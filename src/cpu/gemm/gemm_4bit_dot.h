// The 4-bit product as dot products along k: any vector width, fp32 FMA or bf16 dot products.
//
// Work: 2 m n k operations. Four rows of W are decoded into a panel that stays in L1, as far as `chunk` elements; tiles of up to 6 rows of
// a and these 4 rows of W keep 24 vectors of sums, whose lanes are added once a chunk. Up to 4 rows of a need no panel: weights are
// multiplied as they are decoded. Both add the same products in the same order, so that a row of y does not depend on m.
#pragma once

#include "cpu/gemm/gemm_4bit_decode.h"
#include "cpu/runtime/scratch.h"

namespace bnb::cpu {
namespace {

// w and x in fp32; w rounded to T, as dequantize_4bit gives it.
template <class Isa, class T> struct FmaMath {
  using Ops = typename Isa::Gemm4bitOps;
  using Element = float;
  using Vec = typename Isa::F32;
  using Sum = typename Isa::F32;
  using Table = typename Ops::Table;
  static constexpr int lanes = Isa::lanes;
  static constexpr int64_t chunk = 1024;
  BNB_INLINE static Table table(const float* values) { return Ops::table(values); }
  template <bool split>
  BNB_INLINE static void decode(const Table& t, const uint8_t* codes, float first, float second, Vec (&w)[kGroup / lanes]) {
    Ops::template decode<T, split>(t, codes, first, second, w);
  }
  BNB_INLINE static void permute(const T* x, Element* to) { Ops::template permute<T>(x, to); }
  BNB_INLINE static Vec load(const Element* p) { return Isa::load(p); }
  BNB_INLINE static void store(Element* p, Vec v) { Isa::store(p, v); }
  BNB_INLINE static Element element(float w) { return to_float(rounded<T>(w)); }
};

// bf16 weights and activations, multiplied in pairs.
template <class Isa> struct Bf16Math {
  using Ops = typename Isa::Bf16DotOps;
  using Element = typename Ops::Element;
  using Vec = typename Ops::Vec;
  using Sum = typename Ops::Sum;
  using Table = typename Ops::Table;
  static constexpr int lanes = Ops::lanes;
  static constexpr int64_t chunk = 2048;
  BNB_INLINE static Table table(const float* values) { return Ops::table(values); }
  template <bool split>
  BNB_INLINE static void decode(const Table& t, const uint8_t* codes, float first, float second, Vec (&w)[kGroup / lanes]) {
    Ops::template decode<split>(t, codes, first, second, w);
  }
  BNB_INLINE static void permute(const BFloat16* x, Element* to) {
    Vec v[kGroup / lanes];
    Ops::permute(x, v);
    for (int i = 0; i < kGroup / lanes; ++i) store(to + i * lanes, v[i]);
  }
  BNB_INLINE static Vec load(const Element* p) { return Ops::load(p); }
  BNB_INLINE static void store(Element* p, Vec v) { Ops::store(p, v); }
  BNB_INLINE static Element element(float w) { return rounded<BFloat16>(w).bits; }
};

// y[m .. m + count)[n .. n + columns) = sums + bias, without what lies beyond n.
template <class T, int columns> void write_columns(const Gemm4bit& d, int64_t m, int64_t count, int64_t n, const float* sums) {
  const int64_t inside = smaller(columns, d.n - n);
  float bias[columns];
  load_bias(d.bias, n, bias);
  T* to = static_cast<T*>(d.out.data) + m * d.n + n;
  for (int64_t i = 0; i < count; ++i, to += d.n, sums += columns) {
    T out[columns];
    for (int j = 0; j < columns; ++j) from_float(sums[j] + bias[j], out[j]);
    if (inside == columns)
      std::memcpy(to, out, sizeof(out));
    else
      std::memcpy(to, out, static_cast<size_t>(inside) * sizeof(T));
  }
}

template <class Isa, class T, class Math> class DotGemm {
  using Element = typename Math::Element;
  using Vec = typename Math::Vec;
  using Sum = typename Math::Sum;
  using Tile = typename Isa::Gemm4bitOps;
  static constexpr int vectors = kGroup / Math::lanes, columns_at_once = 4, fused_rows = 4;
  static constexpr int64_t chunk_groups = Math::chunk / kGroup;
  static constexpr int64_t line = 64 / sizeof(Element), block_bytes = 1 << 20;
  static constexpr int64_t panel_stride = Math::chunk + line;

  // Rows an odd number of cache lines apart: they fall into different sets.
  static int64_t stride(const Gemm4bit& d) { return ceil_div(d.k, kGroup) * kGroup + line; }

 public:
  static int64_t pack_bytes(const Gemm4bit& d) { return d.m * stride(d) * static_cast<int64_t>(sizeof(Element)); }
  static int64_t pack_units(const Gemm4bit& d) { return d.m; }
  static void pack(const Gemm4bit& d, void* packed, Range rows) {
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const T* from = static_cast<const T*>(d.a.data) + m * d.k;
      Element* to = static_cast<Element*>(packed) + m * stride(d);
      int64_t k = 0;
      if (Math::lanes > 1)
        for (; k + kGroup <= d.k; k += kGroup) Math::permute(from + k, to + k);
      for (; k < d.k; k += kGroup) {
        T group[kGroup] = {};
        std::memcpy(group, from + k, static_cast<size_t>(smaller(kGroup, d.k - k)) * sizeof(T));
        Math::permute(group, to + k);
      }
    }
  }

  static void run(const Gemm4bit& d, const void* packed, Range columns) { DotGemm(d, packed).run(columns); }

 private:
  DotGemm(const Gemm4bit& d, const void* packed)
      : d_(d),
        decoder_(d),
        x_(static_cast<const Element*>(packed)),
        stride_(stride(d)),
        groups_(ceil_div(d.k, kGroup)),
        layout_(layout_of(d)),
        block_rows_(block_rows(d)),
        scratch_(scratch_bytes(d)),
        sums_(static_cast<float*>(scratch_.data())),
        absmax_(sums_ + block_rows_ * columns_at_once),
        panel_(reinterpret_cast<Element*>(absmax_ + Decoder<Isa, Math>::scratch_floats(d, columns_at_once))) {}

  // Rows of a that stay in L2.
  static int64_t block_rows(const Gemm4bit& d) {
    const int64_t fit = block_bytes / (stride(d) * static_cast<int64_t>(sizeof(Element))) / Tile::tile_rows;
    return smaller(ceil_div(d.m, 16) * 16, (fit < 2 ? 2 : fit) * Tile::tile_rows + 15) / 16 * 16;
  }
  static int64_t scratch_bytes(const Gemm4bit& d) {
    return (block_rows(d) * columns_at_once + Decoder<Isa, Math>::scratch_floats(d, columns_at_once)) * 4 +
           columns_at_once * panel_stride * int64_t{sizeof(Element)};
  }

  void run(Range columns) {
    for (int64_t m = 0; m < d_.m; m += block_rows_) {
      const int64_t count = smaller(block_rows_, d_.m - m);
      with(layout_, [&](auto layout) {
        for (int64_t n = columns.begin; n < columns.end; n += columns_at_once) columns_of<layout()>(m, count, n);
      });
    }
  }

  // Four columns of y (the last ones may lie beyond n: they repeat the last) of `count` rows.
  template <Layout layout> void columns_of(int64_t m, int64_t count, int64_t n) {
    Row rows[columns_at_once];
    decoder_.template rows<layout>(n, columns_at_once, absmax_, rows);
    int64_t g = 0;
    do {
      const int64_t end = smaller(g + chunk_groups, groups_);
      if (layout != Layout::anywhere && d_.m <= fused_rows) {
        tiles_of<fused_rows>(m, count, [&](int64_t i, auto height) { fused<layout, height()>(rows, i, g, end, sums_); });
      } else {
        const auto table = decoder_.table();
        for (int64_t i = g; i < end; ++i)
          decoder_.template group_of_rows<layout, columns_at_once>(table, rows, n, i, panel_ + (i - g) * kGroup, panel_stride, Math::lanes);
        tiles_of<Tile::tile_rows>(m, count, [&](int64_t i, auto height) { tile<height()>(i, g, end, sums_ + (i - m) * columns_at_once); });
      }
      g = end;
    } while (g < groups_);
    write_columns<T, columns_at_once>(d_, m, count, n, sums_);
  }

  // sums[i][j] (+)= a[m + i] . panel[j] over the groups [begin, end); the first chunk sets.
  template <int height> [[gnu::noinline]] void tile(int64_t m, int64_t begin, int64_t end, float* sums) const {
    const Element *x = x_ + m * stride_ + begin * kGroup, *w = panel_;
    Sum c[height][columns_at_once];
    for (auto& row : c)
      for (auto& sum : row) sum = Isa::zero();
    for (int64_t left = (end - begin) * vectors; left > 0; --left, x += Math::lanes, w += Math::lanes) {
      Vec v[height];
#pragma GCC unroll 8
      for (int i = 0; i < height; ++i) v[i] = Math::load(x + i * stride_);
#pragma GCC unroll 4
      for (int j = 0; j < columns_at_once; ++j) {
        const Vec weight = Math::load(w + j * panel_stride);
#pragma GCC unroll 8
        for (int i = 0; i < height; ++i) c[i][j] = Math::Ops::mul_add(weight, v[i], c[i][j]);
      }
    }
    finish<height>(c, begin == 0, sums);
  }

  // The same for rows of W that are decoded on the way.
  template <Layout layout, int height>
  [[gnu::noinline]] void fused(const Row (&rows)[columns_at_once], int64_t m, int64_t begin, int64_t end, float* sums) const {
    const Element* x = x_ + m * stride_;
    Sum c[height][columns_at_once];
    for (auto& row : c)
      for (auto& sum : row) sum = Isa::zero();
    const auto add = [&](int64_t g, int j, const Vec(&w)[vectors]) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 8
        for (int i = 0; i < height; ++i)
          c[i][j] = Math::Ops::mul_add(w[v], Math::load(x + i * stride_ + g * kGroup + v * Math::lanes), c[i][j]);
    };
    const auto table = decoder_.table();
    const int64_t whole = smaller(end, d_.k / kGroup), ahead = 2 * d_.k;
    for (int64_t g = begin; g < whole; ++g) {
#pragma GCC unroll 4
      for (int j = 0; j < columns_at_once; ++j) {
        Vec w[vectors];
        __builtin_prefetch(rows[j].codes + g * (kGroup / 2) + ahead);
        Decoder<Isa, Math>::template group<layout>(table, rows[j], g, w);
        add(g, j, w);
      }
    }
    if (layout == Layout::halves && whole < end)
#pragma GCC unroll 4
      for (int j = 0; j < columns_at_once; ++j) {
        Vec w[vectors];
        decoder_.half_group(rows[j], whole, w);
        add(whole, j, w);
      }
    finish<height>(c, begin == 0, sums);
  }

  template <int height> BNB_INLINE static void finish(const Sum (&c)[height][columns_at_once], bool first, float* sums) {
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) Tile::add_lanes(c[i][0], c[i][1], c[i][2], c[i][3], first, sums + i * columns_at_once);
  }

  const Gemm4bit& d_;
  Decoder<Isa, Math> decoder_;
  const Element* x_;
  int64_t stride_, groups_;
  Layout layout_;
  int64_t block_rows_;
  Scratch scratch_;
  float *sums_, *absmax_;
  Element* panel_;
};

}  // namespace
}  // namespace bnb::cpu
