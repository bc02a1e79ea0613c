// The epilogue of gemm_int8 for sums that are already in memory, and the outlier columns of x gathered.
//
// Sums: reads 4 and writes sizeof(T) bytes per element, each once. Columns: reads and writes sizeof(T) bytes per element. Lower bound:
// those bytes at copy bandwidth.
#include <algorithm>

#include "common/arguments.h"
#include "cuda/gemm_int8/gemm_int8.cuh"

namespace bnb::cuda {
namespace gemm {
namespace {

constexpr int kSumRows = 32, kSumColumns = 256, kSumThreads = 256;
BNB_KERNEL(kSumThreads, 3) finish_sums(const int32_t* sums, EpilogueInt8 e, bool vectors, int64_t row_blocks) {
  const int64_t first_row = dev::block().x % row_blocks * kSumRows, first_column = dev::block().x / row_blocks * kSumColumns;
  const auto sum = [&](int row, int column, int32_t (&to)[8]) {
    const int32_t* from = sums + (first_row + row) * e.n + first_column + column;
    const int64_t left = e.n - first_column - column;
    BNB_UNROLL
    for (int i = 0; i < 8; i += 4) {
      Bits<16> v = {};
      if (vectors && i < left) v = dev::load_once<Bits<16>>(from + i);
      BNB_UNROLL
      for (int j = 0; j < 4; ++j) to[i + j] = vectors ? static_cast<int32_t>(v.word[j]) : i + j < left ? from[i + j] : 0;
    }
  };
  apply_epilogue<kSumRows, kSumColumns, kSumThreads, 4, 8>(e, static_cast<OutlierStage<kSumRows, kSumColumns>*>(nullptr), first_row,
                                                           first_column, sum);
}

template <int size> BNB_KERNEL(256, 4) gather(const uint8_t* x, int64_t rows, int64_t columns, Outliers from, uint8_t* to) {
  for (int64_t p = int64_t{dev::block().x} * 256 + dev::thread(); p < rows * from.listed; p += int64_t{dev::grid().x} * 256) {
    const int64_t column = from.list[p % from.listed], at = (p / from.listed * columns + column) * size;
    const bool in = column >= 0 && column < columns;
    dev::store(to + p * size, in ? load_bytes<Bits<size>>(x, at, at + size) : Bits<size>{});
  }
}

}  // namespace
}  // namespace gemm

void dequantize_sums(const DequantizeSums& d, Stream stream) {
  using namespace gemm;
  check_arguments(d);
  if (d.m == 0 || d.n == 0) return;
  const int64_t row_blocks = ceil_div(d.m, kSumRows);
  dev::launch({.op = "dequantize_sums",
               .dtype = d.to.out.dtype,
               .shape = {d.m, d.n},
               .grid = {static_cast<uint32_t>(std::min<int64_t>(row_blocks * ceil_div(d.n, kSumColumns), UINT32_MAX))},
               .threads = kSumThreads,
               .stream = stream},
              finish_sums, d.sums.data(), epilogue_of(d.to, d.m, d.n), dev::aligned(d.sums.data(), 16) && d.n % 4 == 0, row_blocks);
}

void gather_columns(const GemmInt8& d, void* to, Stream stream) {
  using namespace gemm;
  check_arguments(d, false);
  const int64_t count = d.m * std::ssize(d.outliers);
  if (count == 0) return;
  const dev::Launch l = {.op = "gather_columns",
                         .dtype = d.x.dtype,
                         .shape = {d.m, d.k, std::ssize(d.outliers)},
                         .grid = {static_cast<uint32_t>(std::min<int64_t>(ceil_div(count, 256), int64_t{16} * dev::device().sms))},
                         .threads = 256,
                         .stream = stream};
  const Outliers from = {.list = d.outliers.data(), .listed = std::ssize(d.outliers)};
  const auto* x = static_cast<const uint8_t*>(d.x.data);
  dev::launch(l, size_of(d.x.dtype) == 4 ? gather<4> : gather<2>, x, d.m, d.k, from, static_cast<uint8_t*>(to));
}

}  // namespace bnb::cuda
