// Sizes of 0 in every operation, with and without each output that may be left out: what there is to write is written, nothing else.
#include "cases/cases.h"

namespace bnb::test {
namespace {

constexpr int64_t kFew[] = {0, 1, 5};

size_t size(int64_t n) { return static_cast<size_t>(n); }

template <class F> void for_each_shape(F&& f) {
  for (const int64_t m : kFew)
    for (const int64_t n : kFew)
      for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{70}}) {
        SCOPED_TRACE(::testing::Message() << "m = " << m << ", n = " << n << ", k = " << k);
        f(m, n, k);
      }
}

// 2 * 3 * k in every place.
TEST(ZeroSizes, SumsOfInt8) {
  for_each_isa([] {
    for_each_shape([](int64_t m, int64_t n, int64_t k) {
      const std::vector<int8_t> a(size(m * k), 2), b(size(n * k), 3);
      Output<int32_t> sums(m * n);
      EXPECT_NO_THROW(gemm_int8({.m = m, .n = n, .k = k, .a = a, .b = b, .sums = sums.span()}));
      EXPECT_TRUE(same(sums.values(), std::vector<int32_t>(size(m * n), static_cast<int32_t>(6 * k))));
    });
  });
}

// An epilogue that is given is checked, whatever there is to write.
TEST(ZeroSizes, TheEpilogueIsChecked) {
  const std::vector<float> scale(5, 1.0f);
  const GemmInt8 d{.m = 0, .n = 5, .k = 0, .to = {.column_scale = std::span(scale).first(4)}};
  EXPECT_THROW(gemm_int8(d), Error);
  EXPECT_THROW(gemm_int8({.m = 5, .n = 0, .k = 0, .to = {.bias = std::span<const float>(scale)}}), Error);
  EXPECT_THROW(gemm_int8({.m = 0, .n = 0, .k = 1, .b = {}, .to = {.out = {const_cast<float*>(scale.data()), DType::f32, 5}}}), Error);
  EXPECT_THROW(gemm_int8({.m = 0, .n = 5, .k = 1}), Error);  // b is short
}

// (2 * 3 * k) / 127^2 * 127 * 127 + 1, exact where k = 0.
TEST(ZeroSizes, EpiloguesOfInt8) {
  for_each_isa([] {
    for_each_shape([](int64_t m, int64_t n, int64_t k) {
      const std::vector<int8_t> a(size(m * k), 2), b(size(n * k), 3);
      const std::vector<int32_t> given(size(m * n), static_cast<int32_t>(6 * k));
      const std::vector<float> rows(size(m), 127), columns(size(n), 127), bias(size(n), 1), x(size(m * k), 2);
      for (const bool biased : {false, true}) {
        Output<float> product(m * n), scaled(m * n), linear(m * n);
        const ConstView offset = biased ? ConstView(std::span<const float>(bias)) : ConstView{};
        gemm_int8({.m = m, .n = n, .k = k, .a = a, .b = b, .to = {rows, columns, offset, product.view()}});
        dequantize_sums({.m = m, .n = n, .sums = given, .to = {rows, columns, offset, scaled.view()}});
        linear_int8({.m = m,
                     .n = n,
                     .k = k,
                     .x = std::span<const float>(x),
                     .threshold = biased ? 1.0f : 0.0f,
                     .weight = b,
                     .weight_scale = columns,
                     .bias = offset,
                     .out = linear.view()});
        for (auto* out : {&product, &scaled, &linear})
          for (const float y : out->values()) EXPECT_NEAR(y, static_cast<float>(6 * k + biased), 1e-3);
      }
    });
  });
}

TEST(ZeroSizes, Gemm4bit) {
  for_each_isa([] {
    for_each_shape([](int64_t m, int64_t n, int64_t k) {
      const std::vector<float> a(size(m * k), 2), bias(size(n), 1), map = create_dynamic_map();
      const std::vector<uint8_t> codes(size(packed_size(n * k)), 0xff), ones(size(blocks_of(n * k, 64)), 255);  // 1.0
      const std::vector<float> absmax(ones.size(), 3), nested(size(blocks_of(std::ssize(ones), 256)), 3);
      for (const bool biased : {false, true})
        for (const bool coded : {false, true}) {
          Output<float> y(m * n);
          Gemm4bit d{.m = m, .n = n, .k = k, .a = std::span<const float>(a), .codes = codes, .out = y.view()};
          if (biased) d.bias = std::span<const float>(bias);
          if (coded)
            d.absmax = {.codes = ones, .code = map, .nested = nested};
          else
            d.absmax.values = absmax;
          gemm_4bit(d);
          EXPECT_TRUE(same(y.values(), std::vector<float>(size(m * n), static_cast<float>(6 * k + biased))));
        }
    });
  });
}

// Scales of rows and columns without an element are 0.
TEST(ZeroSizes, Int8) {
  for_each_isa([] {
    for (const int64_t rows : kFew)
      for (const int64_t columns : kFew)
        for (const float threshold : {0.0f, 1.0f}) {
          const std::vector<float> x(size(rows * columns), 0.5f);
          Output<int8_t> codes(rows * columns);
          Output<float> scale(rows), columns_scale(columns), back(rows * columns);
          Output<uint64_t> outliers(outlier_words(columns));
          quantize_int8({rows, columns, std::span<const float>(x), threshold, codes.span(), scale.span(), outliers.span()});
          EXPECT_TRUE(same(codes.values(), std::vector<int8_t>(x.size(), 127)));
          EXPECT_TRUE(same(scale.values(), std::vector<float>(size(rows), columns ? 0.5f : 0.0f)));
          if (threshold > 0) EXPECT_TRUE(same(outliers.values(), std::vector<uint64_t>(size(outlier_words(columns)), 0)));
          dequantize_int8({rows, columns, codes.span(), scale.span(), back.view()});
          EXPECT_TRUE(same(back.values(), x));
          quantize_columns_int8({rows, columns, std::span<const float>(x), threshold, codes.span(), columns_scale.span()});
          EXPECT_TRUE(same(columns_scale.values(), std::vector<float>(size(columns), rows ? 0.5f : 0.0f)));
        }
  });
}

// Tensors without an element among others, with states of either width and with norms that are asked for.
TEST(ZeroSizes, Optimizers) {
  const auto map = create_dynamic_map(), positive = create_dynamic_map(false);
  for_each_isa([&] {
    for (int rule = 0; rule < kOptimizers; ++rule)
      for (const double max_unorm : {0.0, 1.0})
        for (const bool coded : {false, true}) {
          std::vector<OptimizerTensor> tensors;
          std::vector<float> norms(size(std::ssize(kFew)), -1);
          std::vector<std::unique_ptr<std::vector<float>>> memory;
          const auto floats = [&](int64_t n, float value) -> std::span<float> {
            return *memory.emplace_back(std::make_unique<std::vector<float>>(size(n), value));
          };
          std::vector<uint8_t> codes(64);
          uint8_t* at = codes.data();
          for (const int64_t n : kFew) {
            const int64_t first = first_states(static_cast<Optimizer>(rule)) * n, blocks = blocks_of(n, kOptimizerBlock);
            OptimizerTensor& t = tensors.emplace_back();
            t.p = floats(n, 1), t.g = std::span<const float>(floats(n, 1));
            t.u_norm = &norms[tensors.size() - 1];
            if (coded) {
              t.codes1 = {at, size(first)}, t.codes2 = {at + first, size(n)}, at += first + n;
              t.absmax1 = floats(2 * blocks, 0), t.absmax2 = floats(blocks, 0);
            } else {
              t.state1 = floats(first, 0), t.state2 = floats(n, 0);
            }
          }
          OptimizerStep s{.config = {.rule = static_cast<Optimizer>(rule), .max_unorm = max_unorm}, .tensors = tensors};
          if (coded) s.code1 = map, s.code2 = positive;
          EXPECT_NO_THROW(optimizer_step(s)) << name(s.config.rule);
          EXPECT_EQ(norms[0], max_unorm > 0 ? 0.0f : -1.0f) << name(s.config.rule);
          for (size_t i = 1; i < tensors.size(); ++i) EXPECT_LT(*static_cast<float*>(tensors[i].p.data), 1.0f) << name(s.config.rule);
          EXPECT_NO_THROW(optimizer_step({.config = s.config, .tensors = std::span(tensors).first(1)}));
          EXPECT_NO_THROW(optimizer_step({.config = s.config}));
        }
  });
}

}  // namespace
}  // namespace bnb::test
