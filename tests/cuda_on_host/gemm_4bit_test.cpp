// gemm_4bit for CUDA: every plan that can do a call, in all orders of threads, against sums in fp64.
#include <bnb/cuda.h>

#include <map>

#include "cases/gemm_cases.h"
#include "cuda/device/cublaslt.h"
#include "cuda/gemm_4bit/gemm_4bit.h"

namespace bnb::test {
namespace {

using cuda::Plan;

struct Call {
  ConstView bias = {};
  size_t offset = 0;  // misalignment of a and y, in bytes
  bool invariant = false;
};

template <class T> class Problem {
 public:
  Problem(const Weight& w, const std::vector<T>& a, int64_t m, const Call& call = {})
      : input_(std::span<const T>(a).first(static_cast<size_t>(m * w.k)), call.offset), out_(m * w.n, call.offset) {
    d_ = w.product(m, input_.view(), out_.view(), call.bias, call.invariant);
    d_.absmax.device_offset = w.nested ? &w.offset : nullptr;
    d_.absmax.offset = -7;  // must be ignored
  }
  const Gemm4bit& call() const { return d_; }
  std::vector<Plan> plans(const cuda::dev::Device& device = cuda::dev::device()) const { return cuda::gemm::plans(d_, device); }
  std::string describe(const Plan& p) const { return cuda::gemm::describe(p, d_); }

  std::vector<T> run(const Plan& p) {
    if (d_.out.size) std::memset(d_.out.data, 0xff, static_cast<size_t>(d_.out.size) * sizeof(T));
    on_device(d_, p.workspace, [&](const Gemm4bit& d, void* workspace) { cuda::gemm::run(p, d, workspace, nullptr); });
    return out_.values();
  }
  std::vector<T> run() {
    on_device(d_, cuda::gemm_4bit_workspace(d_), [](const Gemm4bit& d, void* workspace) { cuda::gemm_4bit(d, workspace, nullptr); });
    return out_.values();
  }

 private:
  Input<T> input_;
  Output<T> out_;
  Gemm4bit d_;
};

bool is_exact(const std::string& plan) { return plan.find("rows, ") == std::string::npos && plan.find("prescaled") == std::string::npos; }

// Kernels that scale sums of blocks are compared with the unrounded weight, within less than rounding it would lose.
template <class T>
::testing::AssertionResult close_to(bool exact, const std::vector<T>& y, const Weight& w, const std::vector<T>& a, int64_t m,
                                    const std::vector<double>& bias) {
  if (exact) return close<T>(y, w, a, m, bias);
  const bool half = std::is_same_v<T, Half>;
  return close<float>(y, w, a, m, bias, half ? 3.1e-4 : 2e-3, half ? 4e-4 : 2e-3);
}

template <class T> class CudaGemm : public ::testing::Test {};
TYPED_TEST_SUITE(CudaGemm, AllTypes, TypeNames);

struct Shape {
  int64_t m, n, k;
};
constexpr Shape kShapes[] = {// rows that begin in mid-byte and mid-block, tails of k
                             {1, 1, 1},
                             {1, 2, 1},
                             {3, 5, 7},
                             {2, 3, 33},
                             {4, 9, 65},
                             {5, 17, 97},
                             {8, 33, 161},
                             {16, 19, 200},
                             {17, 40, 255},
                             // tensor cores: k a multiple of 32, below and above a warp's, m and n around tiles
                             {1, 16, 32},
                             {2, 7, 64},
                             {3, 50, 96},
                             {4, 37, 320},
                             {5, 24, 288},
                             {8, 70, 256},
                             {9, 16, 576},
                             {16, 33, 544},
                             {17, 40, 192},
                             {32, 130, 128},
                             {33, 96, 160},
                             {48, 270, 64},
                             {64, 24, 288},
                             {65, 40, 96},
                             {128, 264, 64},
                             {129, 72, 128},
                             // k in several slices, many items per block
                             {1, 20, 8288},
                             {3, 800, 4160},
                             {7, 36, 4416},
                             {10, 100, 2240},
                             {1, 300, 1088},
                             {40, 16, 1024}};

// The output of a plan, which must be the same in every order.
template <class T> std::vector<T> in_all_orders(Problem<T>& problem, const Plan& p) {
  std::vector<T> first;
  for_each_isa([&] {
    auto y = problem.run(p);
    if (first.empty())
      first = std::move(y);
    else
      EXPECT_TRUE(same(y, first));
  });
  return first;
}

TYPED_TEST(CudaGemm, EveryPlanIsTheSumInDouble) {
  uint64_t seed = 0;
  std::map<std::string, int> used;
  for (const auto [m, n, k] : kShapes)
    for (const int64_t blocksize : {64, 32, 4096}) {
      ++seed;
      if (m * n * k > 1 << 15 && seed / 3 % 3 != seed % 3) continue;  // only one blocksize for large shapes
      const Weight w(seed % 2 ? QuantType::nf4 : QuantType::fp4, n, k, blocksize, seed % 3 == 0, seed);
      const auto a = rounded_all<TypeParam>(normals(seed, m * k));
      const auto bias = rounded_all<TypeParam>(normals(seed + 7, n));
      const auto wide = to_floats(bias);
      const Call call = {.bias = seed % 4 == 0 ? ConstView() : seed % 4 == 1 ? ConstView(std::span(wide)) : ConstView(std::span(bias))};
      const std::vector<double> values = seed % 4 == 0 ? std::vector<double>() : std::vector<double>(wide.begin(), wide.end());
      Problem<TypeParam> problem(w, a, m, call);
      for (const auto& plan : problem.plans()) {
        const auto text = problem.describe(plan);
        if ((plan.splits > 2 && plan.splits < 16) || (k > 1200 && text.find(": tile, ") != std::string::npos))
          continue;  // covered by others
        SCOPED_TRACE(text + ", blocks of " + std::to_string(blocksize) + (w.nested ? ", nested" : ""));
        ++used[text.substr(text.find(": ") + 2, text.find(", about") - text.find(": ") - 2)];
        EXPECT_TRUE(close_to(is_exact(text), in_all_orders(problem, plan), w, a, m, values));
        if (this->HasFailure()) return;
      }
    }
  for (const auto& [plan, count] : used) std::printf("    %4d x %s\n", count, plan.c_str());
}

// A row of y depends neither on the number of rows nor on the tile that computes it.
TYPED_TEST(CudaGemm, InvariantRows) {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{40, 160}, {18, 99}}) {
    const Weight w(QuantType::nf4, n, k, 64, true);
    const auto a = rounded_all<TypeParam>(normals(4, 130 * k));
    Problem<TypeParam> all(w, a, 130, {.invariant = true});
    const auto expected = all.run();
    for (const int64_t m : {1, 2, 16, 17, 64, 130}) {
      Problem<TypeParam> some(w, a, m, {.invariant = true});
      for (const auto& plan : some.plans())
        EXPECT_TRUE(same(some.run(plan), {expected.begin(), expected.begin() + m * n})) << some.describe(plan);
    }
  }
}

// One nonzero product per sum: y shows the weights themselves.
TYPED_TEST(CudaGemm, ExactWeightsAreThoseOfDequantize) {
  for (const auto type : kFormats)
    for (const int64_t k : {96, 77}) {
      const Weight w(type, 33, k, 32);
      const auto decoded = reference::dequantize_4bit<TypeParam>(type, w.codes, w.absmax, static_cast<size_t>(w.n * k), 32);
      std::vector<TypeParam> a(static_cast<size_t>(k * k)), expected;
      for (int64_t i = 0; i < k; ++i) {
        a[static_cast<size_t>(i * k + i)] = rounded<TypeParam>(1);
        for (int64_t j = 0; j < w.n; ++j) {
          const auto v = decoded[static_cast<size_t>(j * k + i)];
          expected.push_back(to_double(v) == 0 ? TypeParam{} : v);
        }
      }
      Problem<TypeParam> problem(w, a, k);
      for (const auto& plan : problem.plans())
        if (is_exact(problem.describe(plan))) { EXPECT_TRUE(same(problem.run(plan), expected)) << problem.describe(plan); }
    }
}

TYPED_TEST(CudaGemm, NestedAbsmaxIsTheSameProduct) {
  for (const int64_t m : {1, 6, 20, 70}) {
    Weight w(QuantType::nf4, 150, 320, 64, true);
    const auto a = rounded_all<TypeParam>(normals(5, m * w.k));
    Problem<TypeParam> nested(w, a, m);
    w.nested = false;
    Problem<TypeParam> plain(w, a, m);
    for (const auto& plan : plain.plans())
      for (const auto& other : nested.plans())
        if (plain.describe(plan).substr(0, 60) == nested.describe(other).substr(0, 60) && plan.config == other.config &&
            plan.splits == other.splits) {
          EXPECT_TRUE(same(nested.run(other), plain.run(plan))) << plain.describe(plan);
        }
  }
}

// Any address: misaligned calls take another kernel.
TYPED_TEST(CudaGemm, AnyAlignment) {
  for (const size_t offset : {1, 2, 4, 8, 12, 16, 48})  // 16 and 48 reach cuBLASLt
    for (const int64_t m : {1, 5, 40}) {
      const Weight w(QuantType::fp4, offset % 16 ? 30 : 32, 128, 64);
      const auto a = rounded_all<TypeParam>(normals(5, m * w.k));
      const Input<TypeParam> bias(rounded_all<TypeParam>(normals(6, w.n)), offset);
      std::vector<TypeParam> values(static_cast<size_t>(w.n));
      std::memcpy(values.data(), bias.view().data, values.size() * sizeof(TypeParam));
      const auto wide = to_floats(values);
      Problem<TypeParam> problem(w, a, m, {.bias = bias.view(), .offset = offset});
      for (const auto& plan : problem.plans())
        EXPECT_TRUE(close_to(is_exact(problem.describe(plan)), problem.run(plan), w, a, m, {wide.begin(), wide.end()}))
            << problem.describe(plan);
    }
}

TYPED_TEST(CudaGemm, EmptySizes) {
  const auto bias = normals(1, 5);
  const auto row = rounded_all<TypeParam>(bias);
  auto twice = row;
  twice.insert(twice.end(), row.begin(), row.end());
  EXPECT_TRUE(same(Problem<TypeParam>(Weight(QuantType::nf4, 5, 0, 64), {}, 2, {.bias = std::span(bias)}).run(), twice));
  EXPECT_TRUE(same(Problem<TypeParam>(Weight(QuantType::nf4, 5, 0, 64), {}, 3).run(), std::vector<TypeParam>(15)));
  EXPECT_TRUE(Problem<TypeParam>(Weight(QuantType::nf4, 0, 64, 64), std::vector<TypeParam>(128), 2).run().empty());
  EXPECT_TRUE(Problem<TypeParam>(Weight(QuantType::nf4, 5, 64, 64), {}, 0).run().empty());
}

// Non-finite values affect only their own row or columns.
TYPED_TEST(CudaGemm, NonFiniteStaysWhereItBelongs) {
  constexpr int64_t n = 21;
  for (const int64_t k : {64, 96, 100, 320})
    for (const int64_t m : {1, 6, 12, 33}) {
      Weight w(QuantType::nf4, n, k, 32);
      const auto a = rounded_all<TypeParam>(normals(6, m * k));
      for (const float bad : {std::numeric_limits<float>::infinity(), std::nanf("")}) {
        auto spoiled = w;
        const int64_t block = blocks_of(n * k, 32) / 2;
        spoiled.absmax[static_cast<size_t>(block)] = bad;
        auto x = a;
        const int64_t row = m / 2;
        x[static_cast<size_t>(row * k + k / 3)] = rounded<TypeParam>(bad);
        Problem<TypeParam> clean(w, a, m), bad_weight(spoiled, a, m), bad_row(w, x, m);
        for (const auto& plan : clean.plans()) {
          SCOPED_TRACE(clean.describe(plan));
          const auto expected = clean.run(plan), y = bad_weight.run(plan), z = bad_row.run(plan);
          for (int64_t i = 0; i < m * n; ++i) {
            const int64_t begin = i % n * k, end = begin + k;
            const auto at = static_cast<size_t>(i);
            if (begin < (block + 1) * 32 && block * 32 < end)
              EXPECT_FALSE(std::isfinite(to_double(y[at]))) << "row " << i / n << " column " << i % n;
            else
              EXPECT_EQ(std::memcmp(&y[at], &expected[at], sizeof(TypeParam)), 0) << "row " << i / n << " column " << i % n;
            if (i / n == row)
              EXPECT_FALSE(std::isfinite(to_double(z[at]))) << "row " << i / n << " column " << i % n;
            else
              EXPECT_EQ(std::memcmp(&z[at], &expected[at], sizeof(TypeParam)), 0) << "row " << i / n << " column " << i % n;
          }
          if (this->HasFailure()) return;
        }
      }
    }
}

// Several panels of W, each with its part of bias and y.
TYPED_TEST(CudaGemm, SeveralPanels) {
  auto device = cuda::dev::device();
  device.l2_bytes = 1 << 10;
  const Weight w(QuantType::nf4, 4104, 32, 64, true);
  const auto a = rounded_all<TypeParam>(normals(6, 32 * w.k));
  const auto bias = rounded_all<TypeParam>(normals(7, w.n));
  const auto wide = to_floats(bias);
  Problem<TypeParam> problem(w, a, 32, {.bias = std::span(bias)});
  int panels = 0;
  for (const auto& plan : problem.plans(device))
    if (plan.panel) {
      ++panels;
      EXPECT_EQ(plan.panel, 1536);
      EXPECT_TRUE(close<TypeParam>(problem.run(plan), w, a, 32, {wide.begin(), wide.end()}));
    }
  EXPECT_EQ(panels, cuda::library::available(device.index));
}

TEST(CudaGemmPlans, SayWhatTheyAre) {
  const Weight w(QuantType::nf4, 4096, 4096, 64);
  const std::vector<BFloat16> a(size_t{16} * 4096);
  Problem<BFloat16> problem(w, a, 1);
  const auto text = cuda::describe_gemm_4bit(problem.call());
  EXPECT_EQ(text.rfind("gemm_4bit bf16 1 x 4096 x 4096: ", 0), 0u) << text;
  EXPECT_NE(text.find(cuda::dev::device().arch >= 80 ? ": rows, 4 rows per pass, scales of 64, loads of 16 bytes" : ": fma, "),
            std::string::npos)
      << text;
  EXPECT_EQ(cuda::gemm_4bit_workspace(problem.call()), 0);
}

TEST(CudaGemmPlans, RefuseWrongArguments) {
  const Weight w(QuantType::nf4, 16, 64, 64);
  const std::vector<BFloat16> a(64 * 4);
  Problem<BFloat16> problem(w, a, 4);
  auto d = problem.call();
  d.absmax.values = d.absmax.values.first(15);
  EXPECT_THROW(cuda::gemm_4bit(d, nullptr, nullptr), Error);
  d = problem.call();
  d.k = 65;
  EXPECT_THROW(cuda::gemm_4bit(d, nullptr, nullptr), Error);
}

}  // namespace
}  // namespace bnb::test
