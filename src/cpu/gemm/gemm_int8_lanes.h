// The int8 product of many rows of a, each in a lane of its own: 2 m n k operations.
//
// a is packed first, 4 bytes along k to a lane. Tiles of up to 4 vectors of a x 6 rows of b keep their sums in registers over all of
// k, and no lanes are to be added; 4 bytes of b at a time go to all lanes, out of its rows as they are stored. The n * k bytes of b are
// read once for as many rows of a as stay in L2. Bytes are packed as a + 128, so that 128 times the sum of a row of b comes off.
#pragma once

#include "cpu/gemm/gemm_int8_dot.h"

namespace bnb::cpu {
namespace {

template <class Isa> class LanesGemm8 {
  using Ops = typename Isa::GemmInt8Ops;
  using Element = typename Ops::Element;
  using Vec = typename Ops::Vec;
  static constexpr int64_t lanes = Isa::lanes, word = 4, group = word / sizeof(Element);  // bytes and elements of k in a lane
  static constexpr bool widens = sizeof(Element) > 1;                                     // b too is needed as `Element`
  static constexpr int64_t line = 64, block_bytes = 5 << 18, ahead_bytes = 2048;
  static constexpr int tile_vectors = Ops::tile_vectors;
  template <int height> static constexpr int width = Ops::tile_sums / height < 8 ? Ops::tile_sums / height : 8;

  static int64_t vectors(const GemmInt8& d) { return ceil_div(d.m, lanes); }
  static int64_t vector_bytes(const GemmInt8& d) { return ceil_div(d.k, group) * int64_t{sizeof(Vec)}; }
  static int64_t rows_bytes(const GemmInt8& d) { return vectors(d) * vector_bytes(d); }

 public:
  static constexpr int64_t few_rows = widens ? 3 * lanes : 3 * lanes / 2;  // DotGemm8 is faster up to here

  // [tile][k][vector of the tile][lane][group], then outlier columns. A unit is a vector.
  static int64_t pack_bytes(const GemmInt8& d) { return rows_bytes(d) + Finish8<Isa>::pack_bytes(d); }
  static int64_t pack_units(const GemmInt8& d) { return vectors(d); }
  static void pack(const GemmInt8& d, void* packed, Range units) {
    char* x = static_cast<char*>(packed);
    Finish8<Isa>::pack(d, x + rows_bytes(d), {units.begin * lanes, smaller(units.end * lanes, d.m)});
    for_blocks(d, [&](int64_t first, int64_t count) {
      tiles_of<tile_vectors>(first, count, [&](int64_t v, auto height) {
        for (int64_t p = 0; p < height; ++p)
          if (units.begin <= v + p && v + p < units.end)
            pack_vector(d, v + p, x + v * vector_bytes(d) + p * int64_t{sizeof(Vec)}, height * int64_t{sizeof(Vec)});
      });
    });
  }

  static void run(const GemmInt8& d, const void* packed, Range columns) { LanesGemm8(d, packed).run(columns); }

 private:
  LanesGemm8(const GemmInt8& d, const void* packed)
      : d_(d),
        x_(static_cast<const char*>(packed)),
        bytes_(widens ? ceil_div(d.k, group) * word : d.k / word * word),
        stride_((ceil_div(bytes_, line) | 1) * line),
        finish_(d, x_ + rows_bytes(d)),
        scratch_(widens ? kSumColumns * stride_ : 0),
        wide_(static_cast<char*>(scratch_.data())) {}

  // f(first vector, vectors): those that stay in L2.
  template <class F> static void for_blocks(const GemmInt8& d, F&& f) {
    const int64_t fit = block_bytes / (vector_bytes(d) + 1) / tile_vectors, block = (fit < 1 ? 1 : fit) * tile_vectors;
    for (int64_t v = 0; v < vectors(d); v += block) f(v, smaller(block, vectors(d) - v));
  }

  // One group of a row as it lies in a lane.
  BNB_INLINE static uint32_t lane_of(const int8_t* from) {
    if constexpr (widens)
      return static_cast<uint16_t>(from[0]) | static_cast<uint32_t>(from[1]) << 16;
    else
      return static_cast<uint32_t>(load_word(from)) ^ 0x80808080;
  }

  static void pack_vector(const GemmInt8& d, int64_t v, char* to, int64_t step) {
    const int64_t size = d.k, count = smaller(lanes, d.m - v * lanes);
    const int8_t* rows = d.a.data() + v * lanes * size;
    for (int64_t first = 0; first < size; first += line)
      for (int64_t i = 0; i < lanes; ++i) {
        const int8_t* from = rows + smaller(i, count - 1) * size;  // lanes beyond the last row repeat it
        char* lane = to + first / group * step + i * word;
        for (int64_t k = first; k < smaller(first + line, size); k += group, lane += step) {
          int8_t last[group] = {};
          if (k + group > size) std::memcpy(last, from + k, static_cast<size_t>(size - k));
          const uint32_t value = lane_of(k + group > size ? last : from + k);
          std::memcpy(lane, &value, sizeof(value));
        }
      }
  }

  void run(Range columns) {
    for_blocks(d_, [&](int64_t first, int64_t count) {
      for (int64_t n = columns.begin; n < columns.end; n += kSumColumns) {
        weights(n);
        finish_.columns(n);
        tiles_of<tile_vectors>(first, count, [&](int64_t v, auto height) {
          const char* x = x_ + v * vector_bytes(d_);
          if (v == first)
            rows<height(), true>(x);
          else
            rows<height(), false>(x);
          finish_.rows(v * lanes, smaller(height * lanes, d_.m - v * lanes), rows_);
        });
      }
    });
  }

  // Rows [n, n + 16) of b; those beyond n repeat the last.
  void weights(int64_t n) {
    const int64_t size = d_.k;
    for (int64_t j = 0; j < kSumColumns; ++j) {
      const int8_t* from = d_.b.data() + smaller(n + j, d_.n - 1) * size;
      b_[j] = from, next_[j] = from + kSumColumns * size;
      if constexpr (widens) {
        auto* to = reinterpret_cast<Element*>(wide_ + j * stride_);
        for (int64_t k = 0; k < size; ++k) to[k] = from[k];
        if (size % group != 0) to[size] = 0;
        b_[j] = wide_ + j * stride_;
      } else {
        if (bytes_ < size) std::memcpy(&last_[j], from + bytes_, static_cast<size_t>(size - bytes_));
      }
    }
    if constexpr (Ops::shifted) std::memset(sums_, 0, sizeof(sums_));
  }

  // `height` vectors of a and 16 rows of b, to rows of sums.
  template <int height, bool is_first> void rows(const char* x) {
    tiles_of<width<height>>(0, kSumColumns, [&](int64_t j, auto columns) { tile<height, columns(), is_first>(x, j); });
    for (int p = 0; p < height; ++p)
      for (int j = 0; j < kSumColumns; j += 4) {
        const auto column = [&](int i) { return Ops::load_a(columns_ + ((j + i) * height + p) * lanes); };
        Ops::put_rows(column(0), column(1), column(2), column(3), rows_ + p * lanes * kSumColumns + j, kSumColumns);
      }
  }

  // The first tiles of a fetch the next rows of b, and add up what the shift of a makes of these.
  template <int height, int columns, bool is_first> [[gnu::noinline]] void tile(const char* x, int64_t first) {
    constexpr int64_t step = height * sizeof(Vec);
    const int64_t bytes = bytes_;
    const char* b[columns];
    Vec c[columns][height];
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) {
      b[j] = static_cast<const char*>(b_[first + j]);
      for (auto& sum : c[j]) sum = Ops::zero();
    }
    for (int64_t k = 0; k < bytes;) {
      const int64_t end = smaller(k + line, bytes);
      if constexpr (is_first) {
#pragma GCC unroll 8
        for (int j = 0; j < columns; ++j) {
          __builtin_prefetch(next_[first + j] + k / int64_t{sizeof(Element)}, 0, 2);
          if constexpr (Ops::shifted)
            if (end - k == line) Ops::store(sums_[first + j], Ops::add_bytes(b[j] + k, Ops::load_a(sums_[first + j])));
        }
      }
#pragma GCC unroll 1
      for (; k < end; k += word, x += step) {
        Vec v[height];  // kept to the end, or GCC 12 takes their registers for sums that it then copies back
#pragma GCC unroll 4
        for (int p = 0; p < height; ++p) v[p] = Ops::load_a(x + p * int64_t{sizeof(Vec)});
#pragma GCC unroll 4
        for (int64_t p = 0; p < step; p += line) __builtin_prefetch(x + ahead_bytes + p);
#pragma GCC unroll 8
        for (int j = 0; j < columns; ++j) {
          const Vec w = Ops::broadcast(b[j] + k);
#pragma GCC unroll 4
          for (int p = 0; p < height; ++p) c[j][p] = Ops::dot(v[p], w, c[j][p]);
          Ops::keep(w);
        }
#pragma GCC unroll 4
        for (int p = 0; p < height; ++p) Ops::keep(v[p]);
      }
    }
    if constexpr (!widens) {
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) {
        if constexpr (is_first) shift_[first + j] = -128 * sum_of_row(first + j);
#pragma GCC unroll 4
        for (int p = 0; p < height; ++p) {
          if (bytes < d_.k) c[j][p] = Ops::dot(Ops::load_a(x + p * int64_t{sizeof(Vec)}), Ops::broadcast(&last_[first + j]), c[j][p]);
          c[j][p] = Ops::add(c[j][p], Ops::broadcast(&shift_[first + j]));
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j)
#pragma GCC unroll 4
      for (int p = 0; p < height; ++p) Ops::store(columns_ + ((first + j) * height + p) * lanes, c[j][p]);
  }

  // Of row j of b: its whole lines are in sums_.
  int32_t sum_of_row(int64_t j) const {
    int32_t sum = 0;
    for (const int32_t lane : sums_[j]) sum += lane;
    for (int64_t k = bytes_ / line * line; k < d_.k; ++k) sum += static_cast<const int8_t*>(b_[j])[k];
    return sum;
  }

  const GemmInt8& d_;
  const char* x_;
  int64_t bytes_, stride_;  // of a row of b as it is multiplied, without its last incomplete word
  Finish8<Isa> finish_;
  Scratch scratch_;
  char* wide_;
  const void* b_[kSumColumns];  // as they are multiplied
  const int8_t* next_[kSumColumns];
  int32_t shift_[kSumColumns] = {};               // -128 times the sums of rows of b
  alignas(64) int32_t sums_[kSumColumns][lanes];  // those sums by lanes
  uint32_t last_[kSumColumns] = {};               // the last incomplete words of rows of b
  alignas(64) int32_t columns_[kSumColumns * tile_vectors * lanes];
  alignas(64) int32_t rows_[tile_vectors * lanes * kSumColumns];
};

}  // namespace
}  // namespace bnb::cpu
