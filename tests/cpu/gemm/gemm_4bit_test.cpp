// gemm_4bit on every instruction set: against sums in fp64, and against itself for other batches, threads and orders.
#include <numeric>

#include "cases/gemm_cases.h"

namespace bnb::test {
namespace {

template <class T>
std::vector<T> multiply(const Weight& w, const std::vector<T>& a, int64_t m, ConstView bias = {}, size_t offset = 0,
                        bool invariant = true) {
  const Input<T> input(std::span<const T>(a).first(static_cast<size_t>(m * w.k)), offset);
  Output<T> out(m * w.n, offset);
  gemm_4bit(w.product(m, input.view(), out.view(), bias, invariant));
  return out.values();
}

// What sums of products may be off by, relatively to those of their magnitudes, where one row is computed in integers: half of what
// weights rounded to bf16 are.
template <class T> double digits_error() { return sizeof(T) == 2 && active_isa() == "amx" ? 0x1p-10 : 0; }

template <class T> class Gemm : public ::testing::Test {};
TYPED_TEST_SUITE(Gemm, AllTypes, TypeNames);

struct Shape {
  int64_t m, n, k;
};
// Rows in the middle of bytes and blocks, k around every step of vectors and panels, one row and many.
constexpr Shape kShapes[] = {{1, 1, 1},     {1, 2, 1},     {1, 1, 2},     {3, 5, 7},      {2, 3, 33},     {1, 7, 64},
                             {1, 16, 32},   {4, 9, 65},    {5, 17, 96},   {6, 31, 127},   {7, 16, 128},   {8, 33, 160},
                             {16, 19, 200}, {17, 64, 255}, {33, 37, 256}, {1, 100, 320},  {2, 67, 1000},  {1, 40, 2080},
                             {3, 21, 4160}, {1, 13, 8192}, {12, 9, 3001}, {257, 48, 576}, {1, 576, 1536}, {64, 70, 288}};

TYPED_TEST(Gemm, IsTheSumInDouble) {
  uint64_t seed = 0;
  for (const auto [m, n, k] : kShapes)
    for (const int64_t blocksize : {32, 64, 128, 4096}) {
      if (BNB_TEST_SANITIZED && m * n * k > 1 << 20) continue;
      ++seed;
      const Weight w(seed % 2 ? QuantType::nf4 : QuantType::fp4, n, k, blocksize, seed % 3 == 0, seed);
      const auto a = rounded_all<TypeParam>(normals(seed, m * k));
      const auto bias = normals(seed + 7, n);
      const auto narrow = rounded_all<BFloat16>(bias);
      const auto half = rounded_all<Half>(bias);
      const std::pair<ConstView, std::vector<double>> biases[] = {{{}, {}},
                                                                  {std::span(bias), {bias.begin(), bias.end()}},
                                                                  {std::span(narrow),
                                                                   [&] {
                                                                     const auto f = to_floats(narrow);
                                                                     return std::vector<double>(f.begin(), f.end());
                                                                   }()},
                                                                  {std::span(half), [&] {
                                                                     const auto f = to_floats(half);
                                                                     return std::vector<double>(f.begin(), f.end());
                                                                   }()}};
      const auto& [view, values] = biases[seed / 4 % 4];
      SCOPED_TRACE(std::to_string(m) + "x" + std::to_string(n) + "x" + std::to_string(k) + ", blocks of " + std::to_string(blocksize) +
                   (w.nested ? ", nested" : "") + (values.empty() ? "" : ", bias " + std::string(name(view.dtype))));
      for_each_isa([&] {
        const auto y = multiply(w, a, m, view, seed % 4);
        EXPECT_TRUE(close<TypeParam>(y, w, a, m, values));
        const auto fast = multiply(w, a, m, view, seed % 4, false);
        if (m == 1 && !same(fast, y))
          EXPECT_TRUE(close<float>(fast, w, a, m, values, digits_error<TypeParam>()));
        else
          EXPECT_TRUE(same(fast, y));
      });
    }
}

// One row of elements of any sizes: alike, far apart, with a few massive ones, tiny, zero. Errors are relative to the sum of magnitudes.
TYPED_TEST(Gemm, OneRowOfAnySpread) {
  constexpr int64_t n = 37;
  uint64_t seed = 0;
  for (const int64_t k : {64, 128, 192, 1600})
    for (const int64_t blocksize : {64, 256})
      for (const QuantType type : {QuantType::nf4, QuantType::fp4}) {
        ++seed;
        const Weight w(type, n, k, blocksize, seed % 2 == 0, seed);
        const auto plain = normals(seed, k);
        const auto with = [&](auto&& scale) {
          auto x = plain;
          for (int64_t i = 0; i < k; ++i) x[static_cast<size_t>(i)] *= scale(i);
          return rounded_all<TypeParam>(x);
        };
        const auto power = [&](int64_t i, int most) {
          return std::ldexp(1.0f, static_cast<int>(random(seed, static_cast<uint64_t>(i)) % static_cast<uint64_t>(2 * most + 1)) - most);
        };
        const std::pair<const char*, std::vector<TypeParam>> rows[] = {
            {"alike", with([](int64_t) { return 1.0f; })},
            {"apart", with([&](int64_t i) { return power(i, 4); })},
            {"far apart", with([&](int64_t i) { return power(i, 9); })},
            {"massive ones", with([](int64_t i) { return i % 50 == 7 ? 2000.0f : 1.0f; })},
            {"zeros", with([](int64_t i) { return i < 64 || i % 3 == 0 ? 0.0f : 1.0f; })},
            {"all zero", with([](int64_t) { return 0.0f; })},
            {"small", with([](int64_t) { return sizeof(TypeParam) == 2 && std::is_same_v<TypeParam, Half> ? 1e-3f : 1e-30f; })}};
        for (const auto& [name, x] : rows) {
          SCOPED_TRACE(std::string(name) + ", k " + std::to_string(k) + ", blocks of " + std::to_string(blocksize));
          for_each_isa([&] {
            const auto y = multiply(w, x, 1, {}, 0, false);
            EXPECT_TRUE(same(y, multiply(w, x, 1)) || close<float>(y, w, x, 1, {}, digits_error<TypeParam>()));
          });
        }
        if (w.nested) continue;
        if constexpr (!std::is_same_v<TypeParam, Half>) {
          // Scales whose sums overflow before x comes to them.
          auto huge = w;
          for (float& a : huge.absmax) a *= 0x1p115f;
          const auto x = with([](int64_t) { return 0x1p-50f; });
          for_each_isa([&] {
            const auto y = multiply(huge, x, 1, {}, 0, false);
            EXPECT_TRUE(same(y, multiply(huge, x, 1)) || close<float>(y, huge, x, 1, {}, digits_error<TypeParam>()));
          });
        }
        // Zeros do not hide a scale that is NaN, and no column hides an element that is.
        auto spoiled = w;
        spoiled.absmax[0] = std::nanf("");
        auto bad = rows[0].second;
        bad[static_cast<size_t>(k - 1)] = rounded_all<TypeParam>({std::numeric_limits<float>::infinity()})[0];
        for_each_isa([&] {
          const auto zero = multiply(spoiled, rows[5].second, 1, {}, 0, false), infinite = multiply(w, bad, 1, {}, 0, false);
          for (int64_t j = 0; j < n; ++j) {
            EXPECT_EQ(std::isnan(to_double(zero[static_cast<size_t>(j)])), j * k < blocksize) << j;
            EXPECT_FALSE(std::isfinite(to_double(infinite[static_cast<size_t>(j)]))) << j;
          }
        });
      }
}

// Large elements that meet zeros do not hide those of other blocks.
TYPED_TEST(Gemm, OneRowOfBlocksFarApart) {
  constexpr int64_t n = 5, k = 512, blocksize = 256;
  Weight w(QuantType::nf4, n, k, blocksize, false, 1);
  for (int64_t j = 0; j < n; ++j) w.absmax[static_cast<size_t>(j * k / blocksize)] = 0;
  for (const float large : {1e2f, 1e4f, 1e7f, 1e14f, 1e20f}) {
    if (std::is_same_v<TypeParam, Half> && large > 6e4f) continue;
    std::vector<float> row(k, 1.0f);
    for (int64_t i = 0; i < blocksize; ++i) row[static_cast<size_t>(i)] = large;
    const auto x = rounded_all<TypeParam>(row);
    for_each_isa([&] {
      const auto y = multiply(w, x, 1, {}, 0, false);
      EXPECT_TRUE(same(y, multiply(w, x, 1)) || close<float>(y, w, x, 1, {}, digits_error<TypeParam>())) << large;
    });
  }
}

// A row of y depends on its row of a alone, to the bit.
TYPED_TEST(Gemm, RowsDoNotDependOnTheBatch) {
  constexpr int64_t all = 257, others[] = {1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 17, 32, 33, 64, 128};
  uint64_t seed = 0;
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{37, 512}, {20, 96}, {18, 333}, {24, 2304}, {48, 1120}})
    for (const int64_t blocksize : {32, 64}) {
      if (BNB_TEST_SANITIZED && k > 600) continue;
      const Weight w(QuantType::nf4, n, k, blocksize, blocksize == 32, ++seed);
      const auto a = rounded_all<TypeParam>(normals(seed, all * k));
      const auto bias = normals(3, n);
      SCOPED_TRACE(std::to_string(n) + "x" + std::to_string(k) + ", blocks of " + std::to_string(blocksize));
      for_each_isa([&] {
        const auto expected = multiply(w, a, all, std::span(bias));
        for (const int64_t m : others)
          for (const int64_t first : {int64_t{0}, all - m}) {  // the same row at another place of another batch
            const std::vector<TypeParam> rows(a.begin() + first * k, a.begin() + (first + m) * k);
            EXPECT_TRUE(same(multiply(w, rows, m, std::span(bias)), {expected.begin() + first * n, expected.begin() + (first + m) * n}))
                << "m = " << m << " from row " << first;
          }
      });
    }
}

TYPED_TEST(Gemm, DoesNotDependOnThreads) {
  const Weight w(QuantType::fp4, 1000, 320, 64);
  for (const int64_t m : {1, 3, 40})
    for (const bool invariant : {false, true}) {
      const auto a = rounded_all<TypeParam>(normals(5, m * w.k));
      const auto y = [&] { return multiply(w, a, m, {}, 0, invariant); };
      for_each_isa([&] {
        const auto expected = y();
        for_each_schedule([&](std::string_view schedule) { EXPECT_TRUE(same(y(), expected)) << schedule; });
      });
    }
}

// Nested statistics are those of the header, to the bit.
TYPED_TEST(Gemm, NestedAbsmaxIsTheSameProduct) {
  for (const auto& [n, k] : {std::pair<int64_t, int64_t>{40, 512}, {33, 96}, {300, 1001}, {9, 20000}})
    for (const int64_t blocksize : {32, 64, 256}) {
      Weight w(QuantType::nf4, n, k, blocksize, true);
      for (const int64_t m : {1, 7}) {
        const auto a = rounded_all<TypeParam>(normals(5, m * k));
        for_each_isa([&] {
          w.nested = true;
          const auto nested = multiply(w, a, m, {}, 0, m > 1);
          w.nested = false;
          EXPECT_TRUE(same(multiply(w, a, m, {}, 0, m > 1), nested)) << n << "x" << k << " in " << blocksize << ", m = " << m;
        });
      }
    }
}

TYPED_TEST(Gemm, EmptySizes) {
  const auto bias = normals(1, 5);
  for_each_isa([&] {
    const Weight no_columns(QuantType::nf4, 5, 0, 64);
    EXPECT_TRUE(same(multiply<TypeParam>(no_columns, {}, 3), std::vector<TypeParam>(15)));
    const auto row = rounded_all<TypeParam>(bias);
    auto twice = row;
    twice.insert(twice.end(), row.begin(), row.end());
    EXPECT_TRUE(same(multiply<TypeParam>(no_columns, {}, 2, std::span(bias)), twice));
    EXPECT_TRUE(multiply<TypeParam>(Weight(QuantType::nf4, 0, 70, 64), std::vector<TypeParam>(140), 2).empty());
    EXPECT_TRUE(multiply<TypeParam>(Weight(QuantType::nf4, 5, 70, 64), {}, 0, std::span(bias)).empty());
    EXPECT_TRUE(multiply<TypeParam>(Weight(QuantType::nf4, 0, 0, 64), {}, 0).empty());
  });
}

// What is not finite stays in its own row and its own columns; the end of a block beyond a row touches no sum.
TYPED_TEST(Gemm, NonFiniteStaysWhereItBelongs) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  for (const int64_t k : {64, 96, 100, 160, 1056})
    for (const int64_t blocksize : {32, 64, 128})
      for (const int64_t m : {1, 3, 9, 33}) {
        constexpr int64_t n = 21;
        Weight w(QuantType::nf4, n, k, blocksize);
        auto a = rounded_all<TypeParam>(normals(6, m * k));
        SCOPED_TRACE("k " + std::to_string(k) + ", blocks of " + std::to_string(blocksize) + ", m " + std::to_string(m));
        for_each_isa([&] {
          const auto clean = multiply(w, a, m);
          for (const float bad : {inf, std::nanf("")}) {
            // A block of W: columns that share it are lost, all others keep their bits.
            auto spoiled = w;
            const int64_t block = blocks_of(n * k, blocksize) / 2;
            spoiled.absmax[static_cast<size_t>(block)] = bad;
            const auto y = multiply(spoiled, a, m);
            for (int64_t i = 0; i < m * n; ++i) {
              const int64_t begin = i % n * k, end = begin + k;
              const bool hit = begin < (block + 1) * blocksize && block * blocksize < end;
              const auto at = static_cast<size_t>(i);
              if (hit)
                EXPECT_FALSE(std::isfinite(to_double(y[at]))) << "row " << i / n << " column " << i % n;
              else
                EXPECT_EQ(std::memcmp(&y[at], &clean[at], sizeof(TypeParam)), 0) << "row " << i / n << " column " << i % n;
            }
            // An element of a: its row alone.
            auto x = a;
            const int64_t row = m / 2;
            x[static_cast<size_t>(row * k + k / 3)] = rounded<TypeParam>(bad);
            const auto z = multiply(w, x, m);
            for (int64_t i = 0; i < m * n; ++i) {
              const auto at = static_cast<size_t>(i);
              if (i / n == row)
                EXPECT_FALSE(std::isfinite(to_double(z[at])));
              else
                EXPECT_EQ(std::memcmp(&z[at], &clean[at], sizeof(TypeParam)), 0) << "row " << i / n;
            }
          }
        });
      }
}

// One product a sum, so that nothing hides the rounding of a weight: y is the exact product of a power of two and the decoded weight.
TYPED_TEST(Gemm, WeightsAreThoseOfDequantize) {
  for (const auto type : kFormats)
    for (const int64_t k : {64, 96, 77, 1100}) {
      const Weight w(type, 64, k, 64);
      const auto decoded = reference::dequantize_4bit<TypeParam>(type, w.codes, w.absmax, static_cast<size_t>(w.n * k), 64);
      std::vector<TypeParam> a(static_cast<size_t>(k * k)), expected;
      for (int64_t i = 0; i < k; ++i) {
        a[static_cast<size_t>(i * k + i)] = rounded<TypeParam>(1);
        for (int64_t j = 0; j < w.n; ++j) {
          auto v = decoded[static_cast<size_t>(j * k + i)];
          if (to_double(v) == 0) v = TypeParam{};  // sums start at +0
          expected.push_back(v);
        }
      }
      if (BNB_TEST_SANITIZED && k > 1000) continue;
      for_each_isa([&] { EXPECT_TRUE(same(multiply(w, a, k), expected)) << name(type) << " k = " << k; });
    }
}

RC_GTEST_PROP(GemmProperty, AnySize, ()) {
  const auto m = *rc::gen::inRange<int64_t>(0, 14), n = *rc::gen::inRange<int64_t>(0, 80), k = *rc::gen::inRange<int64_t>(0, 300);
  const auto blocksize = *rc::gen::elementOf(std::vector<int64_t>(std::begin(kBlocksizes), std::end(kBlocksizes)));
  const auto type = *rc::gen::element(QuantType::nf4, QuantType::fp4);
  const auto seed = *rc::gen::arbitrary<uint16_t>();
  const auto offset = *rc::gen::inRange<size_t>(0, 65);
  const Weight w(type, n, k, blocksize, seed % 2, seed);
  const auto floats = normals(seed, m * k);
  const auto check = [&]<class T>(T) {
    const auto a = rounded_all<T>(floats);
    for (const auto isa : supported_isas()) {
      const ForcedIsa forced(isa);
      require(close<T>(multiply(w, a, m, {}, offset), w, a, m, {}), std::string(isa) + " " + std::string(name(dtype_of<T>)));
    }
  };
  check(float{}), check(Half{}), check(BFloat16{});
}

}  // namespace
}  // namespace bnb::test
