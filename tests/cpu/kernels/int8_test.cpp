// LLM.int8() on every instruction set: codes and scales against the plain rule, products against exact sums, outputs against fp64.
#include <cmath>

#include "cases/cases.h"

namespace bnb::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// The rule as it is written down. Where fp32 has no room for 1 / scale, x and scale are lifted first.
int8_t plain_code(float x, float scale) {
  if (!(scale > 0) || std::isinf(scale)) return 0;
  const float lift = scale < 0x1p-100f ? 0x1p100f : 1;
  return static_cast<int8_t>(std::nearbyint(x * lift * (127.0f * (1.0f / (scale * lift)))));
}

Int8Rows plain_rows(const std::vector<float>& x, int64_t rows, int64_t columns, float threshold) {
  Int8Rows r{std::vector<int8_t>(x.size()), std::vector<float>(static_cast<size_t>(rows)), {}};
  std::vector<bool> out(static_cast<size_t>(columns));
  const auto at = [&](int64_t i, int64_t j) { return x[static_cast<size_t>(i * columns + j)]; };
  for (int64_t i = 0; i < rows; ++i) {
    float& scale = r.scale[static_cast<size_t>(i)];
    for (int64_t j = 0; j < columns; ++j) {
      const float magnitude = std::fabs(at(i, j));
      if (threshold > 0 && magnitude >= threshold)
        out[static_cast<size_t>(j)] = true;
      else if (std::isnan(magnitude) || std::isnan(scale))
        scale = std::bit_cast<float>(0x7fc00000u);
      else
        scale = std::max(scale, magnitude);
    }
  }
  for (int64_t j = 0; j < columns; ++j)
    if (out[static_cast<size_t>(j)]) r.outliers.push_back(j);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      r.codes[static_cast<size_t>(i * columns + j)] =
          out[static_cast<size_t>(j)] ? int8_t{0} : plain_code(at(i, j), r.scale[static_cast<size_t>(i)]);
  return r;
}

template <class T> class Int8 : public ::testing::Test {};
TYPED_TEST_SUITE(Int8, AllTypes, TypeNames);

// About normal, with some columns of outliers; a row of zeros, a tiny one, a NaN and an infinity.
template <class T> std::vector<T> activations(uint64_t seed, int64_t rows, int64_t columns) {
  auto x = normals(seed, rows * columns);
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows; ++i) {
      float& v = x[static_cast<size_t>(i * columns + j)];
      if (random(seed + 1, static_cast<uint64_t>(j)) % 37 == 0) v *= 8;
      if (rows > 4 && i == 1) v = 0;
      if (rows > 4 && i == 2) v *= 1e-37f;
      if (rows > 6 && i == 4 && j == columns / 2) v = NAN;
      if (rows > 6 && i == 6 && j == columns / 3) v = -kInf;
    }
  return rounded_all<T>(x);
}

TYPED_TEST(Int8, RowsFollowTheRule) {
  uint64_t seed = 0;
  for (const int64_t rows : {0, 1, 2, 5, 33})
    for (const int64_t columns : {0, 1, 31, 63, 64, 65, 200, 1027})
      for (const float threshold : {0.0f, 6.0f, 1.5f, 1e-3f, kInf}) {
        const auto x = activations<TypeParam>(++seed, rows, columns);
        const auto expected = plain_rows(to_floats(x), rows, columns, threshold);
        SCOPED_TRACE(std::to_string(rows) + "x" + std::to_string(columns) + ", threshold " + std::to_string(threshold));
        for_each_isa([&] {
          const auto r = run_quantize_int8(x, rows, columns, threshold, seed % 3);
          EXPECT_TRUE(same(r.codes, expected.codes)) << "codes";
          EXPECT_TRUE(same(r.scale, expected.scale)) << "scale";
          EXPECT_EQ(r.outliers, expected.outliers);
        });
      }
}

TYPED_TEST(Int8, EveryPatternIsARow) {
  const auto x = patterns<TypeParam>(1);
  const auto n = static_cast<int64_t>(x.size()), columns = int64_t{64}, rows = n / columns;
  const std::vector<TypeParam> whole(x.begin(), x.begin() + rows * columns);
  for (const float threshold : {0.0f, 3.0f}) {
    const auto expected = plain_rows(to_floats(whole), rows, columns, threshold);
    for_each_isa([&] {
      const auto r = run_quantize_int8(whole, rows, columns, threshold);
      EXPECT_TRUE(same(r.codes, expected.codes));
      EXPECT_TRUE(same(r.scale, expected.scale));
    });
  }
}

TYPED_TEST(Int8, ColumnsFollowTheRule) {
  uint64_t seed = 100;
  for (const int64_t rows : {0, 1, 7, 50})
    for (const int64_t columns : {0, 1, 63, 64, 65, 300})
      for (const float threshold : {0.0f, 2.0f}) {
        const auto x = activations<TypeParam>(++seed, rows, columns);
        auto f = to_floats(x);
        std::vector<float> scale(static_cast<size_t>(columns));
        std::vector<int8_t> codes(f.size());
        const auto out = [&](float v) { return threshold > 0 && std::fabs(v) >= threshold; };
        for (size_t i = 0; i < f.size(); ++i) {
          float& s = scale[i % scale.size()];
          if (std::isnan(f[i]) || std::isnan(s))
            s = std::bit_cast<float>(0x7fc00000u);
          else if (!out(f[i]))
            s = std::max(s, std::fabs(f[i]));
        }
        for (size_t i = 0; i < f.size(); ++i) codes[i] = out(f[i]) ? int8_t{0} : plain_code(f[i], scale[i % scale.size()]);
        SCOPED_TRACE(std::to_string(rows) + "x" + std::to_string(columns));
        for_each_isa([&] {
          const Input<TypeParam> input(x, seed % 3);
          Output<int8_t> q(rows * columns);
          Output<float> s(columns);
          quantize_columns_int8({rows, columns, input.view(), threshold, q.span(), s.span()});
          EXPECT_TRUE(same(q.values(), codes));
          EXPECT_TRUE(same(s.values(), scale));
        });
      }
}

TYPED_TEST(Int8, DequantizesEveryCode) {
  std::vector<int8_t> codes(256 * 3);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<int8_t>(i);
  const std::vector<float> scale = {1.7f, 0, 3e38f};
  for_each_isa([&] {
    Output<TypeParam> out(768, 1);
    dequantize_int8({3, 256, codes, scale, out.view()});
    std::vector<TypeParam> expected;
    for (size_t i = 0; i < codes.size(); ++i) {
      const float scaled = static_cast<float>(codes[i]) * scale[i / 256];
      expected.push_back(rounded<TypeParam>(scaled * (1 / 127.0f)));
    }
    EXPECT_TRUE(same(out.values(), expected));
  });
}

struct Shape {
  int64_t m, n, k;
};
// Around every tile, panel and vector; one row and many; k of no vector and of several chunks.
constexpr Shape kShapes[] = {{1, 1, 1},     {1, 4, 64},    {3, 5, 7},       {2, 17, 63},    {5, 16, 65},    {6, 31, 127},    {7, 33, 128},
                             {8, 66, 64},   {13, 5, 1300}, {16, 64, 129},   {17, 32, 255},  {31, 48, 577},  {33, 130, 1024}, {47, 20, 96},
                             {64, 96, 512}, {97, 3, 128},  {100, 77, 1000}, {1, 301, 4097}, {257, 40, 300}, {2, 3, 0},       {49, 18, 3},
                             {70, 21, 1},   {130, 35, 67}, {65, 17, 1026},  {90, 4, 0}};

std::vector<int8_t> random_codes(uint64_t seed, int64_t n) {
  const auto bytes = random_bytes(seed, n);
  return {bytes.begin(), bytes.end()};  // -128 too, which no quantization makes
}

std::vector<int32_t> plain_sums(const std::vector<int8_t>& a, const std::vector<int8_t>& b, Shape s) {
  std::vector<int32_t> sums(static_cast<size_t>(s.m * s.n));
  for (int64_t i = 0; i < s.m; ++i)
    for (int64_t j = 0; j < s.n; ++j) {
      int32_t sum = 0;
      for (int64_t k = 0; k < s.k; ++k) sum += a[static_cast<size_t>(i * s.k + k)] * b[static_cast<size_t>(j * s.k + k)];
      sums[static_cast<size_t>(i * s.n + j)] = sum;
    }
  return sums;
}

void expect_exact_sums(Shape s, const std::vector<int8_t>& a, const std::vector<int8_t>& b, const std::vector<int32_t>& expected) {
  for_each_isa([&] {
    Output<int32_t> sums(s.m * s.n);
    gemm_int8({.m = s.m, .n = s.n, .k = s.k, .a = a, .b = b, .sums = sums.span()});
    EXPECT_TRUE(same(sums.values(), expected));
  });
}

TEST(Int8Product, SumsAreExact) {
  uint64_t seed = 0;
  for (const Shape s : kShapes) {
    const auto a = random_codes(++seed, s.m * s.k), b = random_codes(seed + 1000, s.n * s.k);
    SCOPED_TRACE(std::to_string(s.m) + "x" + std::to_string(s.n) + "x" + std::to_string(s.k));
    expect_exact_sums(s, a, b, plain_sums(a, b, s));
  }
}

// The largest sums there are, of some rows and of many.
TEST(Int8Product, LongestSums) {
  for (const auto& [x, w] : {std::pair<int8_t, int8_t>{-128, -128}, {-128, 127}, {127, -128}})
    for (const int64_t m : {18, 26}) {
      const Shape s{m, 1, kMaxInt8Depth};
      const std::vector<int8_t> a(static_cast<size_t>(s.m * s.k), x), b(static_cast<size_t>(s.k), w);
      expect_exact_sums(s, a, b, std::vector<int32_t>(static_cast<size_t>(s.m), static_cast<int32_t>(s.k * x * w)));
    }
}

#if !defined(BNB_TEST_DEVICE)  // whose kernels keep nothing in a cache
TEST(Int8Product, MoreRowsThanStayInTheCache) {
  const Shape s{341, 5, 4099};
  const auto a = random_codes(1, s.m * s.k), b = random_codes(2, s.n * s.k);
  expect_exact_sums(s, a, b, plain_sums(a, b, s));
}
#endif

// y against the fp64 value of what is stored: 1e-6 of the sum of magnitudes before y is rounded.
template <class T>
::testing::AssertionResult close(const std::vector<T>& y, const std::vector<double>& exact, const std::vector<double>& size) {
  const double step = std::ldexp(1.0, -1 - reference::layout_of<T>.mantissa), least = sizeof(T) == 4 ? 1e-37 : 6e-8;
  for (size_t i = 0; i < y.size(); ++i) {
    const double got = to_double(y[i]), error = std::fabs(got - exact[i]);
    if (!(error <= 1e-6 * size[i] + step * std::fabs(exact[i]) * 1.0001 + least))
      return ::testing::AssertionFailure() << "element " << i << " is " << got << ", exactly " << exact[i];
  }
  return ::testing::AssertionSuccess();
}

TYPED_TEST(Int8, LinearIsTheSumInDouble) {
  uint64_t seed = 500;
  for (const auto [m, n, k] : kShapes)
    for (const float threshold : {0.0f, 6.0f, 2.0f}) {
      if (BNB_TEST_SANITIZED && m * n * k > 1 << 20) continue;
      auto xs = normals(++seed, m * k);
      for (size_t i = 0; i < xs.size(); ++i)
        if (random(seed, i % static_cast<size_t>(k)) % 29 == 0) xs[i] *= 10;
      const auto x = rounded_all<TypeParam>(xs);
      const auto weight = random_codes(seed + 1, n * k);
      const auto scale = random_absmax(seed + 2, n), bias = seed % 2 ? normals(seed + 3, n) : std::vector<float>{};
      std::vector<float> column(scale);
      for (float& s : column) s = std::fmin(s, 4.0f);
      const auto rows = plain_rows(to_floats(x), m, k, threshold);
      std::vector<double> exact(static_cast<size_t>(m * n)), size(exact.size());
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) {
          const double c = column[static_cast<size_t>(j)] / 127.0, r = rows.scale[static_cast<size_t>(i)] / 127.0;
          double sum = 0, magnitude = 0;
          for (int64_t p = 0; p < k; ++p) sum += rows.codes[static_cast<size_t>(i * k + p)] * weight[static_cast<size_t>(j * k + p)];
          sum *= c * r, magnitude = std::fabs(sum);
          for (const int64_t p : rows.outliers) {
            const double more = to_double(x[static_cast<size_t>(i * k + p)]) * weight[static_cast<size_t>(j * k + p)] * c;
            sum += more, magnitude += std::fabs(more);
          }
          if (!bias.empty()) sum += bias[static_cast<size_t>(j)], magnitude += std::fabs(bias[static_cast<size_t>(j)]);
          exact[static_cast<size_t>(i * n + j)] = sum, size[static_cast<size_t>(i * n + j)] = magnitude;
        }
      SCOPED_TRACE(std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + ", threshold " + std::to_string(threshold));
      std::vector<TypeParam> first;
      for_each_isa([&] {
        const Input<TypeParam> input(x, seed % 2);
        Output<TypeParam> out(m * n, seed % 3);
        linear_int8({.m = m,
                     .n = n,
                     .k = k,
                     .x = input.view(),
                     .threshold = threshold,
                     .weight = weight,
                     .weight_scale = column,
                     .bias = bias.empty() ? ConstView{} : ConstView(std::span(bias)),
                     .out = out.view()});
        EXPECT_TRUE(close(out.values(), exact, size));
        if (first.empty()) first = out.values();
        EXPECT_TRUE(same(out.values(), first)) << "another instruction set gave other bytes";
      });
    }
}

TYPED_TEST(Int8, SumsBecomeTheOutputOfTheProduct) {
  const int64_t m = 19, n = 37, k = 100;
  const auto a = random_codes(1, m * k), b = random_codes(2, n * k);
  const auto sums = plain_sums(a, b, {m, n, k});
  const auto row = random_absmax(3, m), column = random_absmax(4, n), bias = normals(5, n);
  for_each_isa([&] {
    Output<TypeParam> one(m * n), two(m * n);
    Int8Epilogue to{row, column, std::span(bias), one.view()};
    gemm_int8({.m = m, .n = n, .k = k, .a = a, .b = b, .to = to});
    to.out = two.view();
    dequantize_sums({m, n, sums, to});
    EXPECT_TRUE(same(one.values(), two.values()));
  });
}

// Scales whose product with the sum has no room in fp32 before the other scale comes.
TEST(Int8Product, LargeRowsStayFinite) {
  const int64_t k = 4096;
  const std::vector<float> x(static_cast<size_t>(k), 1e36f), scale = {1e-3f};
  const std::vector<int8_t> weight(static_cast<size_t>(k), 127);
  for_each_isa([&] {
    Output<float> out(1);
    linear_int8({.m = 1, .n = 1, .k = k, .x = std::span(x), .weight = weight, .weight_scale = scale, .out = out.view()});
    EXPECT_NEAR(out.values()[0] / 4.096e36, 1, 1e-6);
  });
}

TEST(Int8Product, ThreadsAndOrderDoNotShow) {
  const int64_t m = 70, n = 90, k = 700;
  auto x = activations<float>(9, m, k);
  const auto weight = random_codes(10, n * k);
  const auto scale = random_absmax(11, n);
  for_each_isa([&] {
    Int8Rows rows;
    std::vector<float> y;
    for_each_schedule([&](std::string_view schedule) {
      SCOPED_TRACE(std::string(schedule));
      const auto r = run_quantize_int8(x, m, k, 6.0f);
      Output<float> out(m * n);
      linear_int8({.m = m, .n = n, .k = k, .x = std::span(x), .threshold = 6, .weight = weight, .weight_scale = scale, .out = out.view()});
      if (y.empty()) rows = r, y = out.values();
      EXPECT_TRUE(same(r.codes, rows.codes));
      EXPECT_EQ(r.outliers, rows.outliers);
      EXPECT_TRUE(same(out.values(), y));
    });
  });
}

template <class F> std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Errc::invalid_argument);
    return e.what();
  }
  return "no error";
}

TEST(Int8Errors, NameTheArgument) {
  std::vector<float> x(12), scale(4), out(16);
  std::vector<int8_t> codes(12), b(12);
  std::vector<uint64_t> none;
  const std::vector<int64_t> far = {3};
  const auto has = [](const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; };
  // In parentheses: the operation of the device that is tested.
  QuantizeInt8 q{4, 3, std::span(x), 0, codes, scale, none};
  (quantize_int8)(q);
  q.threshold = -1;
  EXPECT_TRUE(has(message_of([&] { (quantize_int8)(q); }), "quantize_int8: threshold is -1"));
  q.threshold = NAN;
  EXPECT_TRUE(has(message_of([&] { (quantize_int8)(q); }), "threshold is"));
  q.threshold = 6;
  EXPECT_TRUE(has(message_of([&] { (quantize_int8)(q); }), "outliers is 0 elements, expected at least 1"));
  q.threshold = 0, q.rows = 5;
  EXPECT_TRUE(has(message_of([&] { (quantize_int8)(q); }), "x is 12 elements, expected 15"));
  q.rows = 4, q.scale = std::span(scale).first(3);
  EXPECT_TRUE(has(message_of([&] { (quantize_int8)(q); }), "scale is 3 elements, expected at least 4"));

  GemmInt8 g{.m = 4, .n = 4, .k = 3, .a = codes, .b = b, .to = {scale, scale, {}, std::span(out)}};
  (gemm_int8)(g);
  g.outliers = far, g.x = std::span(x);
#if !defined(BNB_TEST_DEVICE)  // there the list is not looked at, and such a column is passed over
  EXPECT_TRUE(has(message_of([&] { (gemm_int8)(g); }), "outliers is 3, expected columns below k = 3"));
#endif
  g.outliers = {}, g.b = std::span(b).first(11);
  EXPECT_TRUE(has(message_of([&] { (gemm_int8)(g); }), "b is 11 elements, expected at least 12"));
  g.b = b, g.k = kMaxInt8Depth + 1;
  EXPECT_TRUE(has(message_of([&] { (gemm_int8)(g); }), "k is 131072"));
  g.k = 3, g.to.column_scale = std::span(scale).first(2);
  EXPECT_TRUE(has(message_of([&] { (gemm_int8)(g); }), "column_scale is 2 elements"));
  // What is written may not lie in what is read.
  g.to.column_scale = scale, g.to.out = {b.data() + 8, DType::f16, 16};
  EXPECT_TRUE(has(message_of([&] { (gemm_int8)(g); }), "gemm_int8: out is in the memory of b"));
  std::vector<int32_t> sums(16);
  EXPECT_TRUE(
      has(message_of([&] { (gemm_int8)({.m = 4, .n = 4, .k = 3, .a = {reinterpret_cast<int8_t*>(&sums[15]), 12}, .b = b, .sums = sums}); }),
          "sums is in the memory of a"));
  EXPECT_TRUE(has(message_of([&] { (dequantize_sums)({4, 4, sums, {scale, scale, {}, {&sums[15], DType::f32, 16}}}); }),
                  "out is in the memory of sums"));
  g.to.out = {scale.data() + 3, DType::f32, 16};
  EXPECT_TRUE(has(message_of([&] { (gemm_int8)(g); }), "out is in the memory of row_scale"));
  q = {4, 3, std::span(x), 6, codes, scale, {reinterpret_cast<uint64_t*>(x.data()), 1}};
  EXPECT_TRUE(has(message_of([&] { (quantize_int8)(q); }), "outliers is in the memory of x"));
  q = {4, 3, std::span(x), 0, {reinterpret_cast<int8_t*>(&x[11]), 12}, scale, none};
  EXPECT_TRUE(has(message_of([&] { (quantize_int8)(q); }), "codes is in the memory of x"));
  EXPECT_TRUE(has(message_of([&] {
                    (linear_int8)(
                        {.m = 4, .n = 4, .k = 3, .x = std::span(x), .weight = b, .weight_scale = scale, .out = {&x[11], DType::f32, 16}});
                  }),
                  "out is in the memory of x"));
  EXPECT_TRUE(has(message_of([&] { linear_int8({.m = -1, .n = 2, .k = 3}); }), "linear_int8: m * n"));
}

}  // namespace
}  // namespace bnb::test
