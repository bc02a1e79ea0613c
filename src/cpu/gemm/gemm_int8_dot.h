// The int8 product as dot products along k, and the way of its sums into y. Both operands are read as stored, but that rows of a are copied
// first: to `Element`, and to addresses that fall into different cache sets.
#pragma once

#include "cpu/gemm/product.h"
#include "cpu/isa/isa.h"
#include "cpu/runtime/scratch.h"

namespace bnb::cpu {
namespace {

inline constexpr int kSumColumns = 16;  // of y that are finished together

// The sums of some rows x 16 columns, on their way to y.
template <class Isa> class Finish8 {
 public:
  // The outlier columns of x as floats, [row][column].
  static int64_t pack_bytes(const GemmInt8& d) { return d.m * std::ssize(d.outliers) * 4; }
  static void pack(const GemmInt8& d, void* packed, Range rows) {
    const auto count = std::ssize(d.outliers);
    if (count == 0) return;
    visit(d.x.dtype, [&](auto t) {
      for (int64_t m = rows.begin; m < rows.end; ++m)
        for (int64_t c = 0; c < count; ++c)
          static_cast<float*>(packed)[m * count + c] =
              read(static_cast<const decltype(t)*>(d.x.data) + m * d.k + d.outliers[static_cast<size_t>(c)]);
    });
  }

  Finish8(const GemmInt8& d, const void* packed)
      : d_(d), x_(static_cast<const float*>(packed)), outliers_(std::ssize(d.outliers)), scratch_(outliers_ * kSumColumns * 4) {}

  // Columns [n, n + 16) come next.
  void columns(int64_t n) {
    n_ = n;
    count_ = smaller(kSumColumns, d_.n - n);
    if (!d_.sums.empty()) return;
    load_bias(d_.to.bias, n, bias_);
    for (int64_t j = 0; j < kSumColumns; ++j) {
      const float scale = j < count_ ? d_.to.column_scale[static_cast<size_t>(n + j)] : 0;
      scale_[j] = scale * (1 / 16129.0f);
      for (int64_t c = 0; c < outliers_; ++c) {
        const int64_t at = smaller(n + j, d_.n - 1) * d_.k + d_.outliers[static_cast<size_t>(c)];
        weights()[c * kSumColumns + j] = static_cast<float>(d_.b[static_cast<size_t>(at)]) * (scale * (1 / 127.0f));
      }
    }
  }

  // Rows [m, m + count): sums[i][16].
  void rows(int64_t m, int64_t count, const int32_t* sums) const {
    if (!d_.sums.empty()) {
      for (int64_t i = 0; i < count; ++i) {
        int32_t* to = d_.sums.data() + (m + i) * d_.n + n_;
        if (count_ == kSumColumns)
          std::memcpy(to, sums + i * kSumColumns, kSumColumns * 4);
        else
          std::memcpy(to, sums + i * kSumColumns, static_cast<size_t>(count_) * 4);
      }
      return;
    }
    visit(d_.to.out.dtype, [&](auto t) {
      tiles_of<4>(m, count, [&](int64_t i, auto height) {
        finish<height()>(sums + (i - m) * kSumColumns, i, static_cast<decltype(t)*>(d_.to.out.data) + i * d_.n + n_);
      });
    });
  }

 private:
  float* weights() const { return static_cast<float*>(scratch_.data()); }

  // `height` rows from m on.
  template <int height, class T> BNB_INLINE void finish(const int32_t* sums, int64_t m, T* to) const {
    for (int j = 0; j < kSumColumns; j += Isa::lanes) {
      typename Isa::F32 more[height];
      outlier_sums<height>(m, j, more);
      for (int i = 0; i < height; ++i) {
        auto y = Isa::mul(Isa::mul(Isa::load(sums + i * kSumColumns + j), Isa::load(scale_ + j)),
                          Isa::set1(d_.to.row_scale[static_cast<size_t>(m + i)]));
        if (outliers_ > 0) y = Isa::add(y, more[i]);
        y = Isa::add(y, Isa::load(bias_ + j));
        if (count_ == kSumColumns) {
          Isa::store(to + i * d_.n + j, y);
        } else if (j < count_) {
          alignas(64) T last[Isa::lanes];
          Isa::store(last, y);
          std::memcpy(to + i * d_.n + j, last, static_cast<size_t>(smaller(Isa::lanes, count_ - j)) * sizeof(T));
        }
      }
    }
  }

  template <int height> BNB_INLINE void outlier_sums(int64_t m, int j, typename Isa::F32 (&sums)[height]) const {
    const float* x = x_ + m * outliers_;
    for (auto& s : sums) s = Isa::zero();
    for (int64_t first = 0; first < outliers_; first += kOutlierGroup) {
      typename Isa::F32 part[height];
      for (auto& p : part) p = Isa::zero();
      for (int64_t c = first; c < smaller(first + kOutlierGroup, outliers_); ++c) {
        const auto w = Isa::load(weights() + c * kSumColumns + j);
#pragma GCC unroll 4
        for (int i = 0; i < height; ++i) part[i] = Isa::add(part[i], Isa::mul(Isa::set1(x[i * outliers_ + c]), w));
      }
      for (int i = 0; i < height; ++i) sums[i] = Isa::add(sums[i], part[i]);
    }
  }

  const GemmInt8& d_;
  const float* x_;
  int64_t outliers_, n_ = 0, count_ = 0;
  alignas(64) float bias_[kSumColumns] = {}, scale_[kSumColumns] = {};
  Scratch scratch_;
};

// Tiles of up to 6 rows of a and 4 rows of b keep 24 vectors of sums, whose lanes are added once a tile.
template <class Isa> class DotGemm8 {
  using Ops = typename Isa::GemmInt8Ops;
  using Element = typename Ops::Element;
  using Vec = typename Ops::Vec;
  static constexpr int columns_at_once = 4;
  static constexpr int64_t line = 64 / sizeof(Element), block_bytes = 1 << 20;

  // Rows an odd number of cache lines apart.
  static int64_t stride(const GemmInt8& d) { return (ceil_div(d.k, line) | 1) * line; }
  static int64_t rows_bytes(const GemmInt8& d) { return d.m * stride(d) * int64_t{sizeof(Element)}; }
  static int64_t sums_bytes(const GemmInt8& d) { return ceil_div(d.m, 16) * 64; }

 public:
  // | rows of a | 128 times their sums | outlier columns |
  static int64_t pack_bytes(const GemmInt8& d) { return rows_bytes(d) + sums_bytes(d) + Finish8<Isa>::pack_bytes(d); }
  static int64_t pack_units(const GemmInt8& d) { return d.m; }
  static void pack(const GemmInt8& d, void* packed, Range rows) {
    auto* shift = reinterpret_cast<uint32_t*>(static_cast<char*>(packed) + rows_bytes(d));
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      const int8_t* from = d.a.data() + m * d.k;
      Element* to = static_cast<Element*>(packed) + m * stride(d);
      const int64_t size = d.k, padded = ceil_div(size, line) * line;  // for all the compiler knows, to[k] may change d
      for (int64_t k = 0; k < size; ++k) to[k] = from[k];
      for (int64_t k = size; k < padded; ++k) to[k] = 0;
      if constexpr (Ops::shifted) {
        auto sums = Ops::zero();
        int32_t lanes[4];
        for (int64_t k = 0; k < padded; k += line) sums = Ops::add_bytes(to + k, sums);
        Ops::add_lanes(sums, Ops::zero(), Ops::zero(), Ops::zero(), lanes);
        shift[m] = 128 * static_cast<uint32_t>(lanes[0]);
      }
    }
    Finish8<Isa>::pack(d, reinterpret_cast<char*>(shift) + sums_bytes(d), rows);
  }

  static void run(const GemmInt8& d, const void* packed, Range columns) { DotGemm8(d, packed).run(columns); }

 private:
  DotGemm8(const GemmInt8& d, const void* packed)
      : d_(d),
        x_(static_cast<const Element*>(packed)),
        stride_(stride(d)),
        shift_(reinterpret_cast<const uint32_t*>(static_cast<const char*>(packed) + rows_bytes(d))),
        block_rows_(block_rows(d)),
        finish_(d, reinterpret_cast<const char*>(shift_) + sums_bytes(d)),
        scratch_(block_rows_ * kSumColumns * 4),
        sums_(static_cast<int32_t*>(scratch_.data())) {}

  // Rows of a that stay in L2.
  static int64_t block_rows(const GemmInt8& d) {
    const int64_t fit = block_bytes / (stride(d) * int64_t{sizeof(Element)}) / Ops::tile_rows;
    return smaller(d.m, (fit < 4 ? 4 : fit) * Ops::tile_rows);
  }

  void run(Range columns) {
    for (int64_t m = 0; m < d_.m; m += block_rows_) {
      const int64_t count = smaller(block_rows_, d_.m - m);
      for (int64_t n = columns.begin; n < columns.end; n += kSumColumns) {
        for (int64_t j = 0; j < kSumColumns && n + j < d_.n; j += columns_at_once) {
          const int8_t* b[columns_at_once];  // those beyond n repeat the last
          for (int64_t i = 0; i < columns_at_once; ++i) b[i] = d_.b.data() + smaller(n + j + i, d_.n - 1) * d_.k;
          int64_t fetched = 0;  // of the next rows of b: all by one tile, or two by each of two
          tiles_of<Ops::tile_rows>(m, count, [&](int64_t i, auto height) {
            int32_t* sums = sums_ + (i - m) * kSumColumns + j;
            if (count <= Ops::tile_rows)
              tile<height(), columns_at_once>(b, i, sums, 0);
            else if (fetched < columns_at_once)
              tile<height(), 2>(b, i, sums, fetched);
            else
              tile<height(), 0>(b, i, sums, 0);
            fetched += 2;
          });
        }
        finish_.columns(n);
        finish_.rows(m, count, sums_);
      }
    }
  }

  // sums[i][j] = a[m + i] . b[j]. Fetches so many of the next rows of b, from `first` on.
  template <int height, int fetches>
  [[gnu::noinline]] void tile(const int8_t* const (&b)[columns_at_once], int64_t m, int32_t* sums, int64_t first) const {
    const Element* x = x_ + m * stride_;
    const int64_t k_size = d_.k, ahead = (columns_at_once + first) * k_size, stride = stride_;
    Vec c[height][columns_at_once];
    for (auto& row : c)
      for (auto& sum : row) sum = Ops::zero();
    const auto add = [&](int64_t k, const Vec(&w)[columns_at_once]) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int i = 0; i < height; ++i) {
        const Vec v = Ops::load_a(x + i * stride + k);
#pragma GCC unroll 4
        for (int j = 0; j < columns_at_once; ++j) c[i][j] = Ops::dot(w[j], v, c[i][j]);
      }
    };
    int64_t k = 0;
    for (; k + Ops::step <= k_size; k += Ops::step) {
      Vec w[columns_at_once];
#pragma GCC unroll 4
      for (int j = 0; j < columns_at_once; ++j) {
        if (j < fetches) __builtin_prefetch(b[j] + k + ahead, 0, 2);
        w[j] = Ops::load_b(b[j] + k);
      }
      add(k, w);
    }
    if (k < k_size) {
      Vec w[columns_at_once];
#pragma GCC unroll 4
      for (int j = 0; j < columns_at_once; ++j) w[j] = Ops::load_b(b[j] + k, k_size - k);
      add(k, w);
    }
#pragma GCC unroll 8
    for (int i = 0; i < height; ++i) {
      int32_t* to = sums + i * kSumColumns;
      Ops::add_lanes(c[i][0], c[i][1], c[i][2], c[i][3], to);
      if constexpr (Ops::shifted)
        for (int j = 0; j < columns_at_once; ++j) to[j] = static_cast<int32_t>(static_cast<uint32_t>(to[j]) - shift_[m + i]);
    }
  }

  const GemmInt8& d_;
  const Element* x_;
  int64_t stride_;
  const uint32_t* shift_;
  int64_t block_rows_;
  Finish8<Isa> finish_;
  Scratch scratch_;
  int32_t* sums_;
};

// y = epilogue(sums) of a product made elsewhere.
template <class Isa> void dequantize_sums(const DequantizeSums& d, Range rows) {
  GemmInt8 g{.m = d.m, .n = d.n, .to = d.to};
  Finish8<Isa> finish(g, nullptr);
  for (int64_t n = 0; n < d.n; n += kSumColumns) {
    finish.columns(n);
    for (int64_t m = rows.begin; m < rows.end; ++m) {
      alignas(64) int32_t sums[kSumColumns] = {};
      std::memcpy(sums, d.sums.data() + m * d.n + n, static_cast<size_t>(smaller(kSumColumns, d.n - n)) * 4);
      finish.rows(m, 1, sums);
    }
  }
}

}  // namespace
}  // namespace bnb::cpu
