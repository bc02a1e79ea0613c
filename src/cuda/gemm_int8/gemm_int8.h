// How products of int8 are done on a device: one family of kernels for few rows, one for tiles. A plan is data, and can be printed.
#pragma once

#include <bnb/int8.h>

#include <string>
#include <vector>

#include "cuda/device/device.h"

namespace bnb::cuda::int8 {

// Columns of x that are added in floats: the bits of quantize_int8, or a list. Both lie on the device.
struct Outliers {
  const uint64_t* words = nullptr;  // null: the list
  int64_t word_count = 0;
  const int64_t* list = nullptr;
  int64_t listed = 0;
};

// Where sums of m x n go, and what they become on the way (Int8Epilogue).
struct Epilogue {
  int64_t m = 0, n = 0, k = 0;
  const float *row_scale = nullptr, *column_scale = nullptr;
  const void* bias = nullptr;  // null: none
  DType bias_type = {};
  void* out = nullptr;
  DType out_type = {};
  bool raw = false;       // out takes the sums themselves
  bool vectors = false;   // rows of out are aligned to 16 bytes
  bool elements = false;  // elements of out are aligned
  const int8_t* b = nullptr;
  const void* x = nullptr;
  DType x_type = {};
  bool possible = false;  // that there are outliers
  Outliers outliers = {};
};
Epilogue epilogue_of(const Int8Epilogue&, int64_t m, int64_t n, int32_t* sums = nullptr);

struct Product {
  const char* op = "gemm_int8";
  const int8_t *a = nullptr, *b = nullptr;
  Epilogue to = {};
};
Product product_of(const GemmInt8&);

struct Plan {
  const char* family = "";
  std::string text;   // its configuration
  double clocks = 0;  // estimate of the time
  int config = 0;
  void (*run)(const Plan&, const Product&, Stream) = nullptr;
};
// All plans that can do the call, the cheapest first. Sizes m and n are not 0.
std::vector<Plan> plans(const Product&, const dev::Device&);
void offer_rows(const Product&, const dev::Device&, std::vector<Plan>&);
void offer_tiles(const Product&, const dev::Device&, std::vector<Plan>&);

// The quantization of linear_int8: clears the codes of outlier columns too.
void quantize_rows(const char* op, const QuantizeInt8&, Stream);

// Rows of a and b can be read by 16 bytes.
bool rows_aligned(const Product&);

}  // namespace bnb::cuda::int8
