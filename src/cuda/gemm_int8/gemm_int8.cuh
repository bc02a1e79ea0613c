// What the kernels of int8 products share: outlier columns and the epilogue, which takes sums to y at any address.
#pragma once

#include "cuda/device/span.cuh"
#include "cuda/gemm_int8/gemm_int8.h"

namespace bnb::cuda::gemm {

using dev::Bits;

// By one warp: writes outliers first .. first + most - 1, in order, to `columns` and returns how many there are in all. An out-of-range
// column of the list becomes -1.
BNB_DEVICE int select_outliers(const Outliers& from, int64_t k, int first, int most, int32_t* columns) {
  const int lane = static_cast<int>(dev::lane());
  if (!from.words) {
    for (int64_t i = lane; i < most && first + i < from.listed; i += dev::kWarp) {
      const int64_t c = from.list[first + i];
      columns[i] = c >= 0 && c < k ? static_cast<int32_t>(c) : -1;
    }
    return static_cast<int>(from.listed);
  }
  int total = 0;
  for (int64_t base = 0; base < from.word_count; base += dev::kWarp) {
    const int64_t word = base + lane;
    uint64_t bits = word < from.word_count ? from.words[word] : 0;
    if (!dev::any(bits != 0)) continue;
    const int mine = static_cast<int>(dev::popcount(bits));
    int until = mine;
    BNB_UNROLL
    for (int by = 1; by < static_cast<int>(dev::kWarp); by *= 2) {
      const int other = dev::shuffle(until, static_cast<unsigned>(lane - by));
      if (lane >= by) until += other;
    }
    for (int at = total + until - mine - first; bits; bits &= bits - 1, ++at)
      if (at >= 0 && at < most) columns[at] = static_cast<int32_t>(word * 64 + dev::popcount((bits & (0 - bits)) - 1));
    total += dev::shuffle(until, dev::kWarp - 1);
  }
  return total;
}

inline constexpr int kChunk = kOutlierGroup;  // outliers staged at once

// What a tile of rows x columns needs of a chunk of outliers. All threads of the block call fill().
template <int rows, int columns> struct OutlierStage {
  float w[kChunk][columns], x[rows][kChunk];
  int32_t column[kChunk];
  int32_t total;

  BNB_DEVICE void fill(const EpilogueInt8& e, int64_t first_row, int64_t first_column, int chunk) {
    if (dev::warp() == 0) {
      const int all = select_outliers(e.outliers, e.k, chunk * kChunk, kChunk, column);
      if (dev::lane() == 0) total = all;
    }
    dev::barrier();
    const int count = total - chunk * kChunk, used = count < kChunk ? count : kChunk;
    for (int p = static_cast<int>(dev::thread()); p < rows * used; p += static_cast<int>(dev::threads())) {
      const int row = p % rows, c = p / rows;
      const bool in = first_row + row < e.m && column[c] >= 0;
      x[row][c] = in ? value_at(e.x, e.x_type, (first_row + row) * e.k + column[c]) : 0;
    }
    for (int p = static_cast<int>(dev::thread()); p < columns * used; p += static_cast<int>(dev::threads())) {
      const int at = p % columns, c = p / columns;
      const int64_t j = first_column + at;
      const bool in = j < e.n && column[c] >= 0;
      w[c][at] = in ? dev::mul(static_cast<float>(e.b[j * e.k + column[c]]), dev::mul(e.column_scale[j], 1 / 127.0f)) : 0;
    }
    dev::barrier();
  }
};

// Stores `wide` elements of y, given as bits, from (row, column) on; column is a multiple of `wide`.
template <int wide>
BNB_DEVICE void store_values(const EpilogueInt8& e, int64_t row, int64_t column, const uint32_t (&bits)[wide], int size) {
  auto* to = static_cast<uint8_t*>(e.out) + (row * e.n + column) * size;
  if constexpr (wide == 8)
    if (e.vectors && column + wide <= e.n) {
      if (size == 4) {
        dev::store(to, Bits<16>{bits[0], bits[1], bits[2], bits[3]});
        dev::store(to + 16, Bits<16>{bits[4], bits[5], bits[6], bits[7]});
      } else {
        dev::store(to, Bits<16>{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16, bits[4] | bits[5] << 16, bits[6] | bits[7] << 16});
      }
      return;
    }
  BNB_UNROLL
  for (int j = 0; j < wide; ++j, to += size) {
    if (column + j >= e.n) break;
    if (!e.elements)
      store_bytes(to, 0, size, Bits<4>{bits[j]});
    else if (size == 4)
      dev::store(to, Bits<4>{bits[j]});
    else
      dev::store(to, Bits<2>{static_cast<uint16_t>(bits[j])});
  }
}
template <class T, int wide> BNB_DEVICE void store_rounded(const EpilogueInt8& e, int64_t row, int64_t column, const float (&y)[wide]) {
  uint32_t bits[wide];
  BNB_UNROLL
  for (int j = 0; j < wide; ++j)
    if constexpr (sizeof(T) == 4)
      bits[j] = dev::float_bits(y[j]);
    else
      bits[j] = dev::round_to<T>(y[j]).bits;
  store_values(e, row, column, bits, sizeof(T));
}

// The epilogue of a tile: y = (sum * (column / 127^2)) * row + outliers + bias, each step in fp32 and in this order. All threads of the
// block call it; each takes `tall` rows of `wide` columns at a time. sum(row, column, int32_t[wide]) reads the tile. `staged` holds the
// first chunk of outliers; null if there cannot be any.
template <int rows, int columns, int threads, int tall, int wide, class Sum>
BNB_DEVICE void apply_epilogue(const EpilogueInt8& e, OutlierStage<rows, columns>* staged, int64_t first_row, int64_t first_column,
                               Sum sum) {
  constexpr int kBeside = columns / wide, kSlots = threads / kBeside;
  const int column = static_cast<int>(dev::thread()) % kBeside * wide, slot = static_cast<int>(dev::thread()) / kBeside;
  float scale[wide] = {}, bias[wide] = {};
  BNB_UNROLL
  for (int j = 0; j < wide; ++j) {
    const int64_t at = first_column + column + j;
    if (e.sums_only || at >= e.n) break;
    scale[j] = dev::mul(e.column_scale[at], 1 / 16129.0f);
    if (e.bias) bias[j] = value_at(e.bias, e.bias_type, at);
  }
  const int total = staged ? staged->total : 0;
  int held = 0;  // the staged chunk
  BNB_KEEP_LOOP
  for (int pass = 0; pass < rows; pass += kSlots * tall) {
    const int first = pass + slot * tall;
    float more[tall][wide] = {};
    BNB_KEEP_LOOP
    for (int chunk = 0; chunk * kChunk < total; ++chunk) {
      if (chunk != held) staged->fill(e, first_row, first_column, held = chunk);
      const int count = total - chunk * kChunk;
      BNB_UNROLL
      for (int i = 0; i < tall; ++i) {
        float part[wide] = {};
        BNB_KEEP_LOOP
        for (int c = 0; c < kChunk && c < count; ++c) {
          const float x = first + i < rows ? staged->x[first + i][c] : 0;
          BNB_UNROLL
          for (int j = 0; j < wide; ++j) part[j] = dev::add(part[j], dev::mul(x, staged->w[c][column + j]));
        }
        BNB_UNROLL
        for (int j = 0; j < wide; ++j) more[i][j] = dev::add(more[i][j], part[j]);
      }
    }
    BNB_UNROLL
    for (int i = 0; i < tall; ++i) {
      const int64_t row = first_row + first + i;
      if (first + i >= rows || row >= e.m) break;
      int32_t sums[wide];
      sum(first + i, column, sums);
      if (e.sums_only) {
        uint32_t bits[wide];
        BNB_UNROLL
        for (int j = 0; j < wide; ++j) bits[j] = static_cast<uint32_t>(sums[j]);
        store_values(e, row, first_column + column, bits, 4);
        continue;
      }
      const float row_scale = e.row_scale[row];
      float y[wide];
      BNB_UNROLL
      for (int j = 0; j < wide; ++j) {
        y[j] = dev::mul(dev::mul(static_cast<float>(sums[j]), scale[j]), row_scale);
        if (total > 0) y[j] = dev::add(y[j], more[i][j]);
        y[j] = dev::add(y[j], bias[j]);
      }
      if (e.out_type == DType::f32)
        store_rounded<float>(e, row, first_column + column, y);
      else if (e.out_type == DType::f16)
        store_rounded<Half>(e, row, first_column + column, y);
      else
        store_rounded<BFloat16>(e, row, first_column + column, y);
    }
  }
}

}  // namespace bnb::cuda::gemm
