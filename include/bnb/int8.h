// LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339): products of int8 rows, and the few columns of activations that stay in 16 or 32
// bits.
//
// A row is stored as codes of -127..127 and one scale: x' = code * scale / 127. A product of two such matrices is exact in int32 and gets
// both scales, the bias and the outlier columns in fp32 on its way out, rounded once.
// Bytes do not depend on the number of threads or the instruction set. Errors: bnb::Error{invalid_argument} for sizes that do not fit and
// for an output that lies in an input or in another output.
#pragma once

#include <bnb/types.h>

#include <bit>
#include <cstdint>
#include <span>
#include <vector>

namespace bnb {

inline constexpr int kOutlierGroup = 16;                          // outlier columns are accumulated in groups of 16, the groups in order
inline constexpr int64_t kMaxInt8Depth = (int64_t{1} << 17) - 1;  // k for which no sum of k products leaves int32

constexpr int64_t outlier_words(int64_t columns) { return columns / 64 + (columns % 64 != 0); }

// The columns whose bits are set (QuantizeInt8::outliers), ascending.
inline std::vector<int64_t> outlier_columns(std::span<const uint64_t> words) {
  std::vector<int64_t> columns;
  for (size_t w = 0; w < words.size(); ++w)
    for (uint64_t left = words[w]; left != 0; left &= left - 1) columns.push_back(static_cast<int64_t>(64 * w) + std::countr_zero(left));
  return columns;
}

// Of each row: scale = max |x|, code = x * (127 * (1 / scale)), each step rounded to fp32, then to the nearest integer, ties to even. With
// a scale below 2^-100 both x and scale are first multiplied by 2^100. threshold > 0: elements with |x| >= threshold are outliers. They do
// not count in a scale, and every column that holds one has code 0 in all rows and its bit in `outliers`. A row that holds a NaN, or an
// infinity that is no outlier, has that scale and codes 0. x is read once.
struct QuantizeInt8 {
  int64_t rows = 0, columns = 0;
  ConstView x = {};  // rows * columns
  float threshold = 0;
  std::span<int8_t> codes = {};       // rows * columns
  std::span<float> scale = {};        // rows
  std::span<uint64_t> outliers = {};  // outlier_words(columns): column j is bit j % 64 of word j / 64; not used without a threshold
};
BNB_API void quantize_int8(const QuantizeInt8&);

// The same with a scale for each column; outliers are left out one by one and have code 0.
struct QuantizeColumnsInt8 {
  int64_t rows = 0, columns = 0;
  ConstView x = {};
  float threshold = 0;
  std::span<int8_t> codes = {};  // rows * columns
  std::span<float> scale = {};   // columns
};
BNB_API void quantize_columns_int8(const QuantizeColumnsInt8&);

// x' = fl(fl(code * scale[row]) / 127) in fp32, rounded once to the output's type; the division is a product with fl(1 / 127).
struct DequantizeInt8 {
  int64_t rows = 0, columns = 0;
  std::span<const int8_t> codes = {};  // rows * columns
  std::span<const float> scale = {};   // rows
  View out = {};                       // rows * columns
};
BNB_API void dequantize_int8(const DequantizeInt8&);

// What becomes of the int32 sums of a product: y = (sum * (column[j] / 127^2)) * row[i] + outliers + bias[j], each step in fp32.
struct Int8Epilogue {
  std::span<const float> row_scale = {};     // m
  std::span<const float> column_scale = {};  // n
  ConstView bias = {};                       // n elements, of any type; empty: none
  View out = {};                             // m * n
};

// y = epilogue(sums).
struct DequantizeSums {
  int64_t m = 0, n = 0;
  std::span<const int32_t> sums = {};  // m * n
  Int8Epilogue to = {};
};
BNB_API void dequantize_sums(const DequantizeSums&);

// a * b^T, rows along k as stored; k up to kMaxInt8Depth. Reads (m + n) * k bytes; work: 2 m n k operations.
struct GemmInt8 {
  int64_t m = 0, n = 0, k = 0;
  std::span<const int8_t> a = {};  // m * k
  std::span<const int8_t> b = {};  // n * k
  std::span<int32_t> sums = {};    // m * n: the sums themselves. Empty: they go through the epilogue, if `to` is given
  Int8Epilogue to = {};
  ConstView x = {};                        // m * k: what a was quantized from, read where there are outlier columns
  std::span<const int64_t> outliers = {};  // ascending; adds x[i][c] * (b[j][c] * (column_scale[j] / 127)) for each column c of these
};
BNB_API void gemm_int8(const GemmInt8&);

// y = x * W^T + bias for a W in int8: quantize_int8 and gemm_int8 in one call, in scratch memory of the library.
struct LinearInt8 {
  int64_t m = 0, n = 0, k = 0;
  ConstView x = {};  // m * k
  float threshold = 0;
  std::span<const int8_t> weight = {};       // n * k
  std::span<const float> weight_scale = {};  // n
  ConstView bias = {};                       // n elements, of any type; empty: none
  View out = {};                             // m * n
};
BNB_API void linear_int8(const LinearInt8&);

}  // namespace bnb
