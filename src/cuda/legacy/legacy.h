// Kernels that only the C functions of the released package (python/c_symbols) need, beside the operations of bnb/cuda.h. One element per
// thread; stream-ordered, without a wait, not tuned. Pointers are to device memory; with a size below 1 nothing is done.
#pragma once

#include <bnb/types.h>

#include <cstdint>

#include "cuda/device/device.h"

namespace bnb::cuda::legacy {

void fill(float* to, float value, int64_t n, Stream);
void fill(uint8_t* to, uint8_t value, int64_t n, Stream);
void fill(float* to, const float* value, int64_t n, Stream);                       // the value is on the device
void count(float* to, int64_t n, Stream);                                          // 0, 1, 2, ..
void multiply(float* a, const float* b, int64_t n, Stream);                        // a[i] *= b[i]
void clear_outliers(const Half* x, Half* to, float threshold, int64_t n, Stream);  // 0 for |x| >= threshold > 0

// to[row * columns + column] = from[row * row_stride + column * column_stride], and back into rows `pitch` elements apart.
void gather(const int8_t* from, int64_t row_stride, int64_t column_stride, int8_t* to, int64_t rows, int64_t columns, Stream);
void scatter(const int32_t* from, int32_t* to, int64_t pitch, int64_t rows, int64_t columns, Stream);
// sum * scale[column], to the nearest of -128 .. 127, ties to even. No scale: 1.
void narrow(const int32_t* from, const float* scale, int8_t* to, int64_t pitch, int64_t rows, int64_t columns, Stream);

// *to = max |x|; NaN counts as the greatest.
void largest_magnitude(const float* x, int64_t n, float* to, Stream);
// *to = the sum of x^2, summed in doubles in one order. `partial`: kSquares doubles.
inline constexpr int64_t kSquares = 4096;
void sum_of_squares(const ConstView& x, float* to, double* partial, Stream);

// The code of x * (1 / max(*absmax, 1e-38)) by an ascending map, as quantize_blockwise has it. No absmax: of x.
void encode(const float* x, const float* absmax, const float* map, uint8_t* codes, int64_t n, Stream);

// y [m, n] = x [m, k] times the transpose of a weight [n, k] of 4-bit codes with any 16 values. w = map[code] * absmax, rounded to the type
// of x as dequantize_4bit does; products are summed in fp32. One warp per row of the weight, whose k / 2 bytes it reads once per row of x.
struct Gemv {
  int64_t m = 0, n = 0, k = 0, blocksize = 64;
  ConstView x = {};                // m * k
  const uint8_t* codes = nullptr;  // n * k codes
  const float* absmax = nullptr;   // one per block of the flat weight
  const float* map = nullptr;      // 16
  void* y = nullptr;               // m * n, of x's type
};
void gemv_4bit(const Gemv&, Stream);

// sums[row[i]][j] += value[i] * b(column[i], j) for each i < nnz and j < n; b(k, j) = b[k * row_stride + j * column_stride], for int8 times
// scale[j] / 127. Coordinates outside the matrices are skipped. The order of additions is not fixed.
struct Sparse {
  int64_t nnz = 0, rows = 0, columns = 0, n = 0;
  const int32_t *row = nullptr, *column = nullptr;
  const Half* value = nullptr;
  const Half* b = nullptr;
  const int8_t* codes = nullptr;  // in place of b
  const float* scale = nullptr;   // for codes; null: 1
  int64_t row_stride = 0, column_stride = 1;
  float* sums = nullptr;  // rows * n
};
void add_product(const Sparse&, Stream);
void widen(const Half* from, int64_t pitch, float* to, int64_t rows, int64_t columns, Stream);
void round(const float* from, Half* to, int64_t pitch, int64_t rows, int64_t columns, Stream);

}  // namespace bnb::cuda::legacy
