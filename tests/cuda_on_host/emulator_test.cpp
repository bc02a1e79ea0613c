// The emulator must catch what it is there to catch: kernels with one planted fault each, and the same kernels without it.
#include "cuda_on_host/emulator.h"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "cuda/ptx.cuh"

namespace bnb::cuda {
namespace {

using emulator::Order;

std::vector<float> ramp(size_t n) {
  std::vector<float> x(n);
  std::iota(x.begin(), x.end(), 1.0f);
  return x;
}

// out[block] = sum of 128 values, in 4 warps that meet in shared memory.
template <bool has_barrier> BNB_KERNEL(128, 1) sum(const float* x, float* out) {
  auto& s = dev::shared<float[4]>();
  float v = x[dev::block().x * 128 + dev::thread()];
  for (unsigned k = 16; k; k /= 2) v += dev::shuffle_xor(v, k);
  if (dev::lane() == 0) s[dev::warp()] = v;
  if constexpr (has_barrier) dev::barrier();
  if (dev::thread() == 0) out[dev::block().x] = s[0] + s[1] + s[2] + s[3];
}

// What `kernel` writes in each order.
template <class... P, class... A>
std::vector<std::vector<float>> in_all_orders(size_t n, const dev::Launch& l, void (*kernel)(P...), const A&... arguments) {
  std::vector<std::vector<float>> results;
  emulator::for_each_order([&](Order) {
    std::vector<float> out(n, -1.0f);
    dev::launch(l, kernel, arguments..., out.data());
    results.push_back(out);
  });
  return results;
}
bool same_bytes(const std::vector<std::vector<float>>& results) {
  for (const auto& r : results)
    if (std::memcmp(r.data(), results[0].data(), r.size() * sizeof(float)) != 0) return false;
  return true;
}

TEST(CudaOnHost, SumsWithBarrier) {
  const auto x = ramp(128 * 5);
  const auto results = in_all_orders(5, {.op = "sum", .grid = {5}, .threads = 128, .shared = 16}, sum<true>, x.data());
  EXPECT_TRUE(same_bytes(results));
  for (size_t b = 0; b < 5; ++b) EXPECT_EQ(results[0][b], std::accumulate(x.begin() + b * 128, x.begin() + (b + 1) * 128, 0.0f));
}

TEST(CudaOnHost, MissingBarrierShows) {
  const auto x = ramp(128 * 5);
  EXPECT_FALSE(same_bytes(in_all_orders(5, {.op = "sum", .grid = {5}, .threads = 128, .shared = 16}, sum<false>, x.data())));
}

}  // namespace
}  // namespace bnb::cuda
