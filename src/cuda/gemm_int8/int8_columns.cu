// int8 codes of columns; docs/NUMERICS.md has the rules.
//
// Two passes over x, 2 sizeof(T) + 1 bytes per element. Lower bound: those at copy bandwidth.
#include <algorithm>

#include "common/arguments.h"
#include "common/formats.h"
#include "cuda/gemm_int8/int8_codes.cuh"

namespace bnb::cuda {
namespace gemm {
namespace {

// A lane has the columns of a unit, its rows are dealt to the warps of a block
constexpr int kColumnWarps = 8, kColumnThreads = kColumnWarps * static_cast<int>(dev::kWarp);

template <class T> struct Stripe {
  int64_t column, row, end;  // the lane's first column, the warp's first row
  template <class F> BNB_DEVICE void for_each_row(const uint8_t* x, int64_t columns, bool vectors, F&& f) const {
    const int64_t unit = column / kPerUnit<T>;
    for (int64_t r = row; r < end; r += kColumnWarps) f(r, Row<T>(x, r, columns, vectors).load(unit));
  }
};
template <class T> BNB_DEVICE Stripe<T> stripe(int64_t rows, int64_t groups, int64_t rows_of_part) {
  const int64_t group = dev::block().x % groups, begin = dev::block().x / groups * rows_of_part, end = begin + rows_of_part;
  return {(group * dev::kWarp + dev::lane()) * kPerUnit<T>, begin + dev::warp(), end < rows ? end : rows};
}

// scale: zeros at first, then the bits of the maximum.
template <class T>
BNB_KERNEL(kColumnThreads, 4)
largest_of_columns(const uint8_t* x, int64_t rows, int64_t columns, bool vectors, uint32_t limit, int64_t groups, int64_t rows_of_part,
                   uint32_t* scale) {
  constexpr int kPer = kPerUnit<T>, kWide = kPer * static_cast<int>(dev::kWarp);
  auto& s = dev::shared<uint32_t[kColumnWarps][kWide]>();
  const auto mine = stripe<T>(rows, groups, rows_of_part);
  uint32_t most[kPer] = {};
  mine.for_each_row(x, columns, vectors, [&](int64_t, const Bits<16>& raw) {
    float v[kPer];
    to_floats<T>(raw, v);
    BNB_UNROLL
    for (int i = 0; i < kPer; ++i) {
      const uint32_t magnitude = dev::float_bits(v[i]) & 0x7fffffff;
      if (!is_outlier(v[i], limit) && magnitude > most[i]) most[i] = magnitude;
    }
  });
  BNB_UNROLL
  for (int i = 0; i < kPer; ++i) s[dev::warp()][i * static_cast<int>(dev::kWarp) + static_cast<int>(dev::lane())] = most[i];
  dev::barrier();
  for (int p = static_cast<int>(dev::thread()); p < kWide; p += kColumnThreads) {
    uint32_t all = 0;
    BNB_UNROLL
    for (int w = 0; w < kColumnWarps; ++w) all = s[w][p] > all ? s[w][p] : all;
    const int64_t column = (dev::block().x % groups * dev::kWarp + p % dev::kWarp) * kPer + p / static_cast<int>(dev::kWarp);
    if (column < columns) dev::atomic_max(scale + column, all > kInfinity ? kNaN : all);
  }
}

template <class T>
BNB_KERNEL(kColumnThreads, 4)
quantize_columns_kernel(const uint8_t* x, int64_t rows, int64_t columns, bool vectors, uint32_t limit, int64_t groups, int64_t rows_of_part,
                        uint8_t* codes, const float* scale) {
  constexpr int kPer = kPerUnit<T>;
  const auto mine = stripe<T>(rows, groups, rows_of_part);
  if (mine.column >= columns) return;
  float first[kPer], second[kPer];
  BNB_UNROLL
  for (int i = 0; i < kPer; ++i) {
    const Factors f(mine.column + i < columns ? scale[mine.column + i] : 0);
    first[i] = f.first;
    second[i] = f.second;
  }
  mine.for_each_row(x, columns, vectors, [&](int64_t r, const Bits<16>& raw) {
    float v[kPer];
    to_floats<T>(raw, v);
    uint32_t q[kPer];
    BNB_UNROLL
    for (int i = 0; i < kPer; ++i)
      q[i] = code(is_outlier(v[i], limit) || second[i] == 0 ? 0 : dev::mul(dev::mul(v[i], first[i]), second[i]));
    if (vectors)
      dev::store(codes + r * columns + mine.column, pack_codes(q));
    else
      store_bytes(codes + r * columns, mine.column, columns, pack_codes(q));
  });
}

}  // namespace
}  // namespace gemm

void quantize_columns_int8(const QuantizeColumnsInt8& d, Stream stream) {
  using namespace gemm;
  check_arguments(d);
  if (d.columns == 0) return;
  dev::zero_async("quantize_columns_int8", d.scale.data(), d.columns * 4, stream);
  if (d.rows == 0) return;
  auto* codes = reinterpret_cast<uint8_t*>(d.codes.data());
  visit(d.x.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr int kWide = kPerUnit<T> * static_cast<int>(dev::kWarp);
    const bool vectors = vectors_of<T>(d.x.data, d.columns, codes);
    const int64_t groups = ceil_div(d.columns, kWide), wanted = std::max<int64_t>(1, 8 * dev::device().sms / groups);
    const int64_t rows_of_part = std::max<int64_t>(4 * kColumnWarps, ceil_div(d.rows, wanted)),
                  blocks = groups * ceil_div(d.rows, rows_of_part);
    const auto* x = static_cast<const uint8_t*>(d.x.data);
    dev::Launch l = {.op = "quantize_columns_int8",
                     .dtype = d.x.dtype,
                     .shape = {d.rows, d.columns},
                     .grid = {static_cast<uint32_t>(std::min<int64_t>(blocks, UINT32_MAX))},
                     .threads = kColumnThreads,
                     .shared = kColumnWarps * kWide * 4,
                     .stream = stream};
    dev::launch(l, largest_of_columns<T>, x, d.rows, d.columns, vectors, limit_of(d.threshold), groups, rows_of_part,
                reinterpret_cast<uint32_t*>(d.scale.data()));
    l.shared = 0;
    dev::launch(l, quantize_columns_kernel<T>, x, d.rows, d.columns, vectors, limit_of(d.threshold), groups, rows_of_part, codes,
                d.scale.data());
  });
}

}  // namespace bnb::cuda
