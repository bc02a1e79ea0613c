// LLM.int8() on CUDA against the CPU, byte for byte: every plan, extreme values, lists of outlier columns.
#include <bnb/cuda.h>

#include <cmath>
#include <set>

#include "cases/cases.h"
#include "cuda/gemm_int8/gemm_int8.h"

namespace bnb::test {
namespace {

using cuda::Plan;

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T> class CudaInt8 : public ::testing::Test {};
TYPED_TEST_SUITE(CudaInt8, AllTypes, TypeNames);

std::vector<int8_t> random_codes(uint64_t seed, int64_t n) {
  const auto bytes = random_bytes(seed, n);
  std::vector<int8_t> result(bytes.size());
  if (n > 0) std::memcpy(result.data(), bytes.data(), bytes.size());
  return result;
}

struct Shape {
  int64_t m, n, k;
};
constexpr Shape kShapes[] = {{1, 1, 16},   {1, 17, 64},   {3, 40, 80},   {8, 33, 1104}, {9, 16, 32},   {16, 70, 320},
                             {17, 8, 48},  {33, 65, 192}, {64, 36, 272}, {65, 33, 16},  {70, 130, 96}, {130, 264, 80},
                             {200, 40, 0}, {5, 9, 33},    {66, 67, 131}, {2, 3, 257}};

// A call with all optional parts, and the CPU's result.
template <class T> struct Problem {
  Shape s;
  std::vector<int8_t> a, b;
  std::vector<float> row, column;
  std::vector<T> x, bias;
  std::vector<int64_t> outliers;

  Problem(Shape shape, uint64_t seed, int64_t outlier_count)
      : s(shape),
        a(random_codes(seed, s.m * s.k)),
        b(random_codes(seed + 1, s.n * s.k)),
        row(normals(seed + 2, s.m)),
        column(normals(seed + 3, s.n)),
        x(rounded_all<T>(normals(seed + 4, s.m * s.k))),
        bias(rounded_all<T>(normals(seed + 5, s.n))) {
    std::set<int64_t> some;
    for (uint64_t i = 0; std::ssize(some) < std::min(outlier_count, s.k); ++i)
      some.insert(static_cast<int64_t>(random(seed + 6, i) % static_cast<uint64_t>(s.k)));
    outliers.assign(some.begin(), some.end());
  }
  GemmInt8 call(View out) const {
    return {
        .m = s.m, .n = s.n, .k = s.k, .a = a, .b = b, .to = {row, column, std::span(bias), out}, .x = std::span(x), .outliers = outliers};
  }
  std::vector<T> on_cpu() const {
    std::vector<T> y(static_cast<size_t>(s.m * s.n));
    bnb::gemm_int8(call(std::span(y)));
    return y;
  }
};

void run(const Plan& plan, const GemmInt8& d) {
  on_device(d, 0, [&](const GemmInt8& on, void*) { cuda::gemm::run(plan, cuda::gemm::product_of(on), nullptr, nullptr); });
}

TYPED_TEST(CudaInt8, EveryPlanHasTheBytesOfTheCpu) {
  uint64_t seed = 0;
  for (const Shape s : kShapes)
    for (const int64_t outliers : {0, 5, 40}) {
      if ((seed += 10) / 10 % 3 != 0 && s.m * s.n * s.k > 1 << 18) continue;
      const Problem<TypeParam> problem(s, seed, outliers);
      const auto expected = problem.on_cpu();
      Output<TypeParam> out(s.m * s.n, seed / 10 % 4 == 3);
      const auto d = problem.call(out.view());
      const auto product = cuda::gemm::product_of(d);
      for (const auto& plan : cuda::gemm::plans(product, cuda::dev::device())) {
        SCOPED_TRACE(cuda::gemm::describe(plan, product) + ", " + std::to_string(outliers) + " outliers");
        for_each_isa([&] {
          std::memset(d.to.out.data, 0xff, expected.size() * sizeof(TypeParam));
          run(plan, d);
          EXPECT_TRUE(same(out.values(), expected));
        });
        if (this->HasFailure()) return;
      }
    }
}

TEST(CudaInt8Sums, OfEveryPlan) {
  uint64_t seed = 3000;
  for (const Shape s : kShapes) {
    const Problem<float> problem(s, ++seed, 0);
    std::vector<int32_t> expected(static_cast<size_t>(s.m * s.n));
    Output<int32_t> sums(s.m * s.n);
    auto d = problem.call({});
    d.sums = expected;
    bnb::gemm_int8(d);
    d.sums = sums.span();
    const auto product = cuda::gemm::product_of(d);
    for (const auto& plan : cuda::gemm::plans(product, cuda::dev::device())) {
      std::memset(d.sums.data(), 0xff, expected.size() * 4);
      run(plan, d);
      EXPECT_TRUE(same(sums.values(), expected)) << cuda::gemm::describe(plan, product);
    }
  }
}

// Operands and outputs at any address.
TYPED_TEST(CudaInt8, AnyAddress) {
  for (const size_t offset : {1, 2, 4, 8}) {
    const Problem<TypeParam> problem({20, 36, 64}, offset, 7);
    std::vector<int8_t> a(offset), b(offset + 1);
    a.insert(a.end(), problem.a.begin(), problem.a.end()), b.insert(b.end(), problem.b.begin(), problem.b.end());
    const Input<TypeParam> x(problem.x, offset), bias(problem.bias, offset + 1);
    Output<TypeParam> out(20 * 36, offset);
    auto d = problem.call(out.view());
    d.a = std::span(a).subspan(offset);
    d.b = std::span(b).subspan(offset + 1);
    d.x = x.view();
    d.to.bias = bias.view();
    test::gemm_int8(d);
    EXPECT_TRUE(same(out.values(), problem.on_cpu()));
  }
}

TYPED_TEST(CudaInt8, OutOfRangeColumnsAreIgnored) {
  constexpr int64_t m = 3, n = 16, k = 32;  // one group of outliers, with the out-of-range ones too
  Problem<TypeParam> problem({m, n, k}, 1, n - 2);
  const auto expected = problem.on_cpu();
  problem.outliers.push_back(-1);  // last, so that the others stay in the same groups
  problem.outliers.push_back(k);
  Output<TypeParam> out(m * n), gathered(m * n);
  auto d = problem.call(out.view());
  test::gemm_int8(d);
  EXPECT_TRUE(same(out.values(), expected));
  d.to.out = gathered.view();  // n columns are gathered
  on_device(d, 0, [](const GemmInt8& on, void*) { cuda::gather_columns(on, on.to.out.data, nullptr); });
  std::vector<TypeParam> columns;
  for (int64_t i = 0; i < m * n; ++i) {
    const int64_t c = problem.outliers[static_cast<size_t>(i % n)];
    columns.push_back(c < 0 || c >= k ? TypeParam{} : problem.x[static_cast<size_t>(i / n * k + c)]);
  }
  EXPECT_TRUE(same(gathered.values(), columns));
}

// ---- quantization

// NaN or infinity sets a whole row of codes to 0, so only a third of the cases have them.
template <class T> std::vector<T> wild(uint64_t seed, int64_t n) {
  auto x = waves<T>(seed, n);
  if (seed % 3 != 0) return x;
  for (size_t i = 0; i < x.size(); ++i) {
    const uint64_t r = random(seed + 7, i);
    if (r % 1001 == 0) x[i] = from_bits<T>(r >> 20);
    if (r % 2997 == 1) x[i] = rounded<T>(r >> 32 & 1 ? kInf : -kInf);
    if (r % 2997 == 2) x[i] = rounded<T>(r >> 32 & 1 ? NAN : -NAN);
  }
  return x;
}

// Rows within the registers of a block and beyond them, one and several, aligned or not.
TYPED_TEST(CudaInt8, QuantizesWildNumbers) {
  uint64_t seed = 70;
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{1, 40}, {1, 3001}, {9, 1024}, {30, 333}, {16, 2056}, {1, 33000}, {2, 40001}, {3, 66000}, {230, 1100}})
    for (const float threshold : {0.0f, 1e-20f, 0.5f, kInf}) {
      const auto x = wild<TypeParam>(++seed, rows * columns);
      const auto check = [&](auto on_cpu, auto on_gpu, int64_t scales, auto d) {
        std::vector<int8_t> codes(x.size());
        std::vector<float> scale(static_cast<size_t>(scales));
        std::vector<uint64_t> outliers(static_cast<size_t>(outlier_words(columns)));
        d.rows = rows;
        d.columns = columns;
        d.x = std::span(x);
        d.threshold = threshold;
        d.codes = codes;
        d.scale = scale;
        if constexpr (requires { d.outliers; }) d.outliers = outliers;
        on_cpu(d);
        for_each_isa([&] {
          Output<int8_t> got_codes(rows * columns);
          Output<float> got_scale(scales);
          Output<uint64_t> got_outliers(outlier_words(columns));
          d.codes = got_codes.span();
          d.scale = got_scale.span();
          if constexpr (requires { d.outliers; }) d.outliers = got_outliers.span();
          on_gpu(d);
          EXPECT_TRUE(same(got_codes.values(), codes));
          EXPECT_TRUE(same(got_scale.values(), scale));
          if constexpr (requires { d.outliers; })
            if (threshold > 0) { EXPECT_EQ(got_outliers.values(), outliers); }
        });
      };
      SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(columns) + ", threshold " + std::to_string(threshold));
      check(bnb::quantize_int8, test::quantize_int8, rows, QuantizeInt8{});
      check(bnb::quantize_columns_int8, test::quantize_columns_int8, columns, QuantizeColumnsInt8{});
    }
}

TYPED_TEST(CudaInt8, DequantizesWildScales) {
  std::vector<float> scale = {0, -0.0f, 1, kInf, -kInf, 0x1p-149f, 3.4e38f, NAN, -NAN, -1, 1e-40f};
  for (const uint32_t nan : {0x7fc12345u, 0xff800001u, 0x7fffffffu, 0x7f801fffu}) scale.push_back(std::bit_cast<float>(nan));
  const auto rows = std::ssize(scale);
  for (const int64_t columns : {64, 77, 5000}) {
    const auto codes = random_codes(1, rows * columns);
    std::vector<TypeParam> expected(codes.size());
    bnb::dequantize_int8({rows, columns, codes, scale, std::span(expected)});
    Output<TypeParam> out(rows * columns);
    test::dequantize_int8({rows, columns, codes, scale, out.view()});
    EXPECT_TRUE(same(out.values(), expected));
  }
}

// ---- the whole

TYPED_TEST(CudaInt8, LinearHasTheBytesOfTheCpu) {
  uint64_t seed = 900;
  for (const auto [m, n, k] : {Shape{1, 40, 512}, {2, 33, 256}, {7, 20, 100}, {12, 48, 1040}, {40, 70, 144}, {130, 40, 1056}, {3, 2, 0}})
    for (const float threshold : {0.0f, 6.0f, 2.5f, 1.0f}) {
      auto xs = normals(++seed, m * k);
      for (size_t i = 0; i < xs.size(); ++i)
        if (random(seed, i % static_cast<size_t>(k)) % 29 == 0) xs[i] *= 10;
      const auto x = rounded_all<TypeParam>(xs), bias = rounded_all<TypeParam>(normals(seed + 1, n));
      const auto weight = random_codes(seed + 2, n * k);
      const auto scale = normals(seed + 3, n);
      std::vector<TypeParam> expected(static_cast<size_t>(m * n));
      LinearInt8 d{m, n, k, std::span(x), threshold, weight, scale, std::span(bias), std::span(expected)};
      bnb::linear_int8(d);
      SCOPED_TRACE(std::to_string(m) + " x " + std::to_string(n) + " x " + std::to_string(k) + ", threshold " + std::to_string(threshold));
      for_each_isa([&] {
        Output<TypeParam> out(m * n);
        d.out = out.view();
        test::linear_int8(d);
        EXPECT_TRUE(same(out.values(), expected));
      });
    }
}

TEST(CudaInt8Plans, SayWhatTheyAre) {
  const std::vector<int8_t> a(4096 * 16), b(4096 * 64);
  std::vector<int32_t> sums(16 * 64);
  const auto text = [&](int64_t m, int64_t n, int64_t k) {
    return cuda::describe_gemm_int8({.m = m, .n = n, .k = k, .a = a, .b = b, .sums = sums});
  };
  EXPECT_EQ(text(1, 64, 4096).rfind("gemm_int8 1 x 64 x 4096: rows, 8 rows, 16 columns per block, about ", 0), 0u) << text(1, 64, 4096);
  EXPECT_NE(text(2, 64, 4095).find("any alignment"), std::string::npos) << text(2, 64, 4095);
  EXPECT_NE(text(64, 16, 1024).find(": tile, "), std::string::npos) << text(64, 16, 1024);
  EXPECT_EQ(text(0, 64, 4096), "gemm_int8: nothing to do");
}

TEST(CudaInt8Errors, NameTheArgument) {
  std::vector<float> x(64), scale(4), out(8);
  std::vector<int8_t> weight(128);
  LinearInt8 d{2, 4, 32, std::span(x), 6, weight, scale, {}, std::span(out)};
  const auto message = [&](void* workspace) -> std::string {
    try {
      cuda::linear_int8(d, workspace, nullptr);
    } catch (const Error& e) { return e.what(); }
    return "no error";
  };
  EXPECT_EQ(message(nullptr), "linear_int8: workspace is null, expected 768 bytes aligned to 256");
  EXPECT_EQ(cuda::linear_int8_workspace(d), 768);
  d.weight = d.weight.first(127);
  EXPECT_EQ(message(nullptr), "linear_int8: weight is 127 elements, expected at least 128");
}

}  // namespace
}  // namespace bnb::test
