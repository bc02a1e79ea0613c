// src/cuda/device/cublaslt.cpp over the library in this folder (cublaslt.cpp), which refuses what the real one would handle differently.
#include "cuda/device/cublaslt.h"

#include <gtest/gtest.h>

#include <bnb/gemm.h>

#include <cstdlib>
#include <memory>
#include <vector>

#include "cuda/gemm_4bit/gemm_4bit.h"

extern "C" int bnb_test_handles;

namespace bnb::cuda {
namespace {

// A graph of many rows may be captured after calls with one row only: the library must be initialized by then.
TEST(CudaLibrary, IsPreparedByTheFirstCallOfAnySize) {
  const std::vector<uint16_t> a(64);
  const std::vector<uint8_t> codes(16 * 64 / 2);
  const std::vector<float> absmax(16);
  std::vector<uint16_t> y(16);
  const Gemm4bit d{.m = 1,
                   .n = 16,
                   .k = 64,
                   .a = {a.data(), DType::bf16, 64},
                   .codes = codes,
                   .absmax = {.values = absmax},
                   .out = {y.data(), DType::bf16, 16}};
  gemm::plans(d, dev::device());
  EXPECT_EQ(bnb_test_handles, 1);
}

// Every alignment that an operand can have: the library is told exactly that.
TEST(CudaLibrary, IsToldTheAlignmentOfEachOperand) {
  constexpr int64_t m = 3, n = 4, k = 8;
  const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(256, 1 << 13), std::free);
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::aligned_alloc(256, library::kWorkspace), std::free);
  auto* const base = static_cast<char*>(memory.get());
  for (const int64_t first : {0, 16, 32, 64, 128})
    for (const int64_t second : {0, 16, 32, 64, 128}) {
      auto* a = reinterpret_cast<float*>(base + first);
      auto* w = reinterpret_cast<float*>(base + 2048 + second);
      auto* y = reinterpret_cast<float*>(base + 4096 + (first ^ second));
      for (int64_t i = 0; i < m * k; ++i) a[i] = static_cast<float>(i % 5);
      for (int64_t i = 0; i < n * k; ++i) w[i] = static_cast<float>(i % 7);
      library::multiply({.m = m, .n = n, .k = k, .pitch = n, .a = a, .w = w, .y = y, .workspace = workspace.get()}, 0, nullptr);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          float sum = 0;
          for (int64_t l = 0; l < k; ++l) sum += a[i * k + l] * w[j * k + l];
          EXPECT_EQ(y[i * n + j], sum) << i << ", " << j;
        }
    }
}

}  // namespace
}  // namespace bnb::cuda
