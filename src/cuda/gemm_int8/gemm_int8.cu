// gemm_int8 on a device: the choice of a plan; and linear_int8. The kernels are in gemm_int8_*.cu.
//   rows    few rows of a: W streams through registers into tensor cores; memory-bound
//   tile    more rows, and whatever is not aligned
#include "common/arguments.h"
#include "cuda/gemm_int8/gemm_int8.h"

namespace bnb::cuda {
namespace gemm {

EpilogueInt8 epilogue_of(const Int8Epilogue& to, int64_t m, int64_t n, int32_t* sums) {
  EpilogueInt8 e = {.m = m, .n = n};
  e.sums_only = sums != nullptr;
  e.out = sums ? sums : to.out.data;
  e.out_type = sums ? DType::f32 : to.out.dtype;  // of the same size
  const int64_t size = size_of(e.out_type);
  e.vectors = dev::aligned(e.out, 16) && n * size % 16 == 0;
  e.elements = dev::aligned(e.out, size);
  if (sums) return e;
  e.row_scale = to.row_scale.data();
  e.column_scale = to.column_scale.data();
  if (to.bias.size) {
    e.bias = to.bias.data;
    e.bias_type = to.bias.dtype;
  }
  return e;
}

ProductInt8 product_of(const GemmInt8& d) {
  ProductInt8 p = {.a = d.a.data(), .b = d.b.data(), .to = epilogue_of(d.to, d.m, d.n, d.sums.empty() ? nullptr : d.sums.data())};
  p.to.k = d.k;
  p.to.b = d.b.data();
  if (p.to.sums_only || d.outliers.empty()) return p;
  p.to.x = d.x.data;
  p.to.x_type = d.x.dtype;
  p.to.outliers = {.list = d.outliers.data(), .listed = std::ssize(d.outliers)};
  p.to.may_have_outliers = true;
  return p;
}

bool rows_aligned(const ProductInt8& p) { return p.to.k % 16 == 0 && dev::aligned(p.a, 16) && dev::aligned(p.b, 16); }

namespace {

constexpr Families<ProductInt8, 2> kFamilies = {&kRowsInt8, &kTileInt8};

}  // namespace

std::vector<Plan> plans(const ProductInt8& p, const dev::Device& device) { return offered_plans(kFamilies, p, device); }

std::string describe(const Plan& plan, const ProductInt8& p) {
  return "gemm_int8 " + std::to_string(p.to.m) + " x " + std::to_string(p.to.n) + " x " + std::to_string(p.to.k) + ": " +
         describe_plan(kFamilies, plan);
}

void run(const Plan& plan, const ProductInt8& p, void* workspace, Stream stream) {
  kFamilies[plan.family]->run(plan, p, workspace, stream);
}

namespace {

void run_cheapest(const ProductInt8& p, Stream stream) {
  if (p.to.m == 0 || p.to.n == 0) return;
  run(plans(p, dev::device()).front(), p, nullptr, stream);
}

// | bits of outlier columns | row scales | codes |
struct Workspace {
  int64_t words, scale, codes, size;
  explicit Workspace(const LinearInt8& d) {
    const auto after = [](int64_t at, int64_t bytes) { return (at + bytes + 255) / 256 * 256; };
    words = 0;
    scale = after(words, d.threshold > 0 ? outlier_words(d.k) * 8 : 0);
    codes = after(scale, d.m * 4);
    size = after(codes, d.m * d.k);
  }
};

}  // namespace
}  // namespace gemm

void gemm_int8(const GemmInt8& d, Stream stream) {
  check_arguments(d, false);
  gemm::run_cheapest(gemm::product_of(d), stream);
}

std::string describe_gemm_int8(const GemmInt8& d) {
  check_arguments(d, false);
  if (d.m == 0 || d.n == 0) return "gemm_int8: nothing to do";
  const auto product = gemm::product_of(d);
  return gemm::describe(gemm::plans(product, dev::device()).front(), product);
}

int64_t linear_int8_workspace(const LinearInt8& d) {
  check_arguments(d);
  return d.m == 0 || d.n == 0 ? 0 : gemm::Workspace(d).size;
}

void linear_int8(const LinearInt8& d, void* workspace, Stream stream) {
  const Checker check = check_arguments(d);
  if (d.m == 0 || d.n == 0) return;
  const gemm::Workspace at(d);
  if (at.size)
    check.that(workspace && dev::aligned(workspace, 256), "workspace", workspace ? "not aligned" : "null",
               std::to_string(at.size) + " bytes aligned to 256");
  auto* memory = static_cast<std::byte*>(workspace);
  auto* words = reinterpret_cast<uint64_t*>(memory + at.words);
  auto* scale = reinterpret_cast<float*>(memory + at.scale);
  auto* codes = reinterpret_cast<int8_t*>(memory + at.codes);
  const int64_t word_count = d.threshold > 0 ? outlier_words(d.k) : 0;
  const auto m = static_cast<size_t>(d.m), size = static_cast<size_t>(d.m * d.k);
  gemm::quantize_rows("linear_int8", {d.m, d.k, d.x, d.threshold, {codes, size}, {scale, m}, {words, static_cast<size_t>(word_count)}},
                      stream);
  gemm::ProductInt8 p = {.op = "linear_int8",
                         .a = codes,
                         .b = d.weight.data(),
                         .to = gemm::epilogue_of({{scale, m}, d.weight_scale, d.bias, d.out}, d.m, d.n)};
  p.to.k = d.k;
  p.to.b = d.weight.data();
  if (word_count > 0) {
    p.to.x = d.x.data;
    p.to.x_type = d.x.dtype;
    p.to.outliers = {.words = words, .word_count = word_count};
    p.to.may_have_outliers = true;
  }
  gemm::run_cheapest(p, stream);
}

}  // namespace bnb::cuda
