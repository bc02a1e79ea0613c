// A dense product by cuBLASLt, opened at run time if present and never linked. Tests on the host bring a library of their own.
#pragma once

#include <bnb/cuda.h>
#include <bnb/types.h>

namespace bnb::cuda::library {

inline constexpr int64_t kWorkspace = int64_t{32} << 20;

// y = a * w^T + bias, all of one type, sums in fp32, rounded once. Rows of a and w are k elements apart, rows of y `pitch`.
struct Product {
  DType type = DType::f32;
  int64_t m = 0, n = 0, k = 0, pitch = 0;
  const void *a = nullptr, *w = nullptr, *bias = nullptr;  // m x k, n x k, n or null
  void* y = nullptr;                                       // m x n
  void* workspace = nullptr;                               // kWorkspace bytes
};

// Opens the library once, and creates a handle once per device. `device`: index of the current one.
bool available(int device);
void multiply(const Product&, int device, Stream);

}  // namespace bnb::cuda::library
