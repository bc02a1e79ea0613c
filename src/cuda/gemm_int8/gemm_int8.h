// gemm_int8 on a device: its families of kernels and their plans.
#pragma once

#include <bnb/int8.h>

#include <string>
#include <vector>

#include "cuda/device/plan.h"

namespace bnb::cuda::gemm {

// Columns of x that are multiplied in floats: the bits of quantize_int8, or a list. Both in device memory.
struct Outliers {
  const uint64_t* words = nullptr;  // null: the list
  int64_t word_count = 0;
  const int64_t* list = nullptr;
  int64_t listed = 0;
};

// What becomes of the sums, m x n (bnb::Int8Epilogue), and where it goes.
struct EpilogueInt8 {
  int64_t m = 0, n = 0, k = 0;
  const float *row_scale = nullptr, *column_scale = nullptr;
  const void* bias = nullptr;  // null: none
  DType bias_type = {};
  void* out = nullptr;
  DType out_type = {};
  bool sums_only = false;  // out takes the int32 sums
  bool vectors = false;    // rows of out are aligned to 16 bytes
  bool elements = false;   // elements of out are aligned
  const int8_t* b = nullptr;
  const void* x = nullptr;
  DType x_type = {};
  bool may_have_outliers = false;  // otherwise `outliers` is empty
  Outliers outliers = {};
};
EpilogueInt8 epilogue_of(const Int8Epilogue&, int64_t m, int64_t n, int32_t* sums = nullptr);

struct ProductInt8 {
  const char* op = "gemm_int8";
  const int8_t *a = nullptr, *b = nullptr;
  EpilogueInt8 to = {};
};
ProductInt8 product_of(const GemmInt8&);

extern const Family<ProductInt8> kRowsInt8, kTileInt8;

// All plans that can do the call, the cheapest first. Sizes m and n are not 0.
std::vector<Plan> plans(const ProductInt8&, const dev::Device&);
std::string describe(const Plan&, const ProductInt8&);
void run(const Plan&, const ProductInt8&, void* workspace, Stream);

// The quantization of linear_int8: also clears the codes of outlier columns.
void quantize_rows(const char* op, const QuantizeInt8&, Stream);

// Whether rows of a and b can be read 16 bytes at a time.
bool rows_aligned(const ProductInt8&);

}  // namespace bnb::cuda::gemm
