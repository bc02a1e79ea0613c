// gemm_4bit on a device: the choice of a plan. The kernels are in gemm_4bit_*.cu.
//   rows    few rows of a: W streams through registers into tensor cores; memory-bound
//   tile    more rows: tiles on tensor cores, W decoded in registers
//   panel   many rows: panels of W decoded into L2, then cuBLASLt, where present
//   fma     fp32, and everything that the others do not support
#include "cuda/gemm_4bit/gemm_4bit.h"

#include "common/arguments.h"

namespace bnb::cuda {
namespace gemm {
namespace {

constexpr Families<Gemm4bit, 4> kFamilies = {&kRows4bit, &kTile4bit, &kPanel4bit, &kFma4bit};

}  // namespace

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
  return offered_plans(kFamilies, d, device, d.batch_invariant);  // one family: the order of sums must not depend on m
}

std::string describe(const Plan& p, const Gemm4bit& d) {
  return "gemm_4bit " + std::string(name(d.a.dtype)) + " " + std::to_string(d.m) + " x " + std::to_string(d.n) + " x " +
         std::to_string(d.k) + ": " + describe_plan(kFamilies, p) + ", " + std::to_string(p.workspace) + " bytes of workspace";
}

void run(const Plan& p, const Gemm4bit& d, void* workspace, Stream stream) { kFamilies[p.family]->run(p, d, workspace, stream); }

}  // namespace gemm

int64_t gemm_4bit_workspace(const Gemm4bit& d) {
  check_arguments(d);
  return d.m == 0 || d.n == 0 ? 0 : gemm::plans(d, dev::device()).front().workspace;
}

std::string describe_gemm_4bit(const Gemm4bit& d) {
  check_arguments(d);
  if (d.m == 0 || d.n == 0) return "gemm_4bit: nothing to do";
  return gemm::describe(gemm::plans(d, dev::device()).front(), d);
}

void gemm_4bit(const Gemm4bit& d, void* workspace, Stream stream) {
  const Checker check = check_arguments(d);
  if (d.m == 0 || d.n == 0) return;
  const auto plan = gemm::plans(d, dev::device()).front();
  if (plan.workspace)
    check.that(workspace && dev::aligned(workspace, 256), "workspace", workspace ? "not aligned" : "null",
               std::to_string(plan.workspace) + " bytes aligned to 256");
  gemm::run(plan, d, workspace, stream);
}

}  // namespace bnb::cuda
