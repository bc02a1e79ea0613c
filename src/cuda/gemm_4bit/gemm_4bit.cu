// gemm_4bit on a device: which family of kernels does a call, and with what. The kernels are in gemm_4bit_*.cu.
//   rows    few rows of a: W streams through registers into tensor cores; bound by memory
//   tile    more rows: tiles with tensor cores, W decoded on the way
//   panel   many rows: parts of W decoded into the cache, then cuBLASLt, where there is one
//   fma     fp32, and whatever the others do not take
#include "cuda/gemm_4bit/gemm_4bit.h"

#include <algorithm>

#include "common/arguments.h"

namespace bnb::cuda {
namespace gemm4 {

namespace {

const Family* const kFamilies[] = {&kRows, &kTile, &kPanel, &kFma};

// Products of 16-bit floats a clock and multiprocessor: of the vendor's tables, less what mma.sync does not reach.
struct ArchRates {
  int from;
  Rates rates;
};
constexpr ArchRates kRates[] = {{120, {512, 450, 32}}, {100, {1024, 3300, 40}}, {90, {1200, 1700, 36}},
                                {86, {512, 450, 32}},  {80, {1024, 900, 32}},   {0, {512, 400, 24}}};

}  // namespace

Rates rates_of(int arch) {
  const auto* r = kRates;
  while (arch < r->from) ++r;
  return r->rates;
}

bool elements_aligned(const Gemm4bit& d) {
  return dev::aligned(d.a.data, size_of(d.a.dtype)) && dev::aligned(d.out.data, size_of(d.out.dtype)) &&
         (d.bias.size == 0 || dev::aligned(d.bias.data, size_of(d.bias.dtype)));
}

bool fits_tensor_cores(const Gemm4bit& d, const dev::Device& device) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return d.a.dtype != DType::f32 && (device.arch >= 80 || (device.arch >= 75 && d.a.dtype == DType::f16)) && d.k > 0 && d.k % 32 == 0 &&
         d.k < kMost && d.n < kMost && d.m < kMost && d.n <= (int64_t{1} << 36) / d.k && dev::aligned(d.a.data, 16) &&
         dev::aligned(d.codes.data(), 16) && elements_aligned(d);
}

std::vector<Plan> plans(const Gemm4bit& d, const dev::Device& device) {
  std::vector<Plan> all;
  all.reserve(16);
  for (size_t i = 0; i < std::size(kFamilies); ++i) {
    const size_t first = all.size();
    if (d.batch_invariant && first > 0) break;  // the order of sums must not depend on m
    kFamilies[i]->offer(d, device, all);
    for (size_t j = first; j < all.size(); ++j) all[j].family = static_cast<int>(i);
  }
  std::ranges::stable_sort(all, {}, &Plan::clocks);
  return all;
}

std::string describe(const Plan& p, const Gemm4bit& d) {
  return "gemm_4bit " + std::string(name(d.a.dtype)) + " " + std::to_string(d.m) + " x " + std::to_string(d.n) + " x " +
         std::to_string(d.k) + ": " + kFamilies[p.family]->name + ", " + p.describe(p) + ", about " +
         std::to_string(static_cast<int64_t>(p.clocks)) + " clocks, " + std::to_string(p.workspace) + " bytes of workspace";
}

void run(const Plan& p, const Gemm4bit& d, void* workspace, Stream stream) { kFamilies[p.family]->run(p, d, workspace, stream); }

}  // namespace gemm4

int64_t gemm_4bit_workspace(const Gemm4bit& d) {
  check_arguments(d);
  return d.m == 0 || d.n == 0 ? 0 : gemm4::plans(d, dev::device()).front().workspace;
}

std::string describe_gemm_4bit(const Gemm4bit& d) {
  check_arguments(d);
  if (d.m == 0 || d.n == 0) return "gemm_4bit: nothing to do";
  return gemm4::describe(gemm4::plans(d, dev::device()).front(), d);
}

void gemm_4bit(const Gemm4bit& d, void* workspace, Stream stream) {
  const Checker check = check_arguments(d);
  if (d.m == 0 || d.n == 0) return;
  const auto plan = gemm4::plans(d, dev::device()).front();
  if (plan.workspace)
    check.that(workspace && dev::aligned(workspace, 256), "workspace", workspace ? "not aligned" : "null",
               std::to_string(plan.workspace) + " bytes aligned to 256");
  gemm4::run(plan, d, workspace, stream);
}

}  // namespace bnb::cuda
