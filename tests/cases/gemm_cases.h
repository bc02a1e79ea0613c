// What the tests of gemm_4bit share on all devices: weights, and the comparison with sums in fp64.
#pragma once

#include "cases/cases.h"

namespace bnb::test {

// A weight with random codes, and the absmax in both forms.
struct Weight {
  QuantType type;
  int64_t n, k, blocksize;
  std::vector<uint8_t> codes;
  std::vector<float> absmax;

  bool nested = false;
  std::vector<uint8_t> nested_codes;
  std::vector<float> map, nested_absmax;
  float offset = 0.05f;

  Weight(QuantType t, int64_t rows, int64_t columns, int64_t block, bool is_nested = false, uint64_t seed = 1)
      : type(t), n(rows), k(columns), blocksize(block), codes(random_bytes(seed, packed_size(rows * columns))), nested(is_nested) {
    const int64_t blocks = blocks_of(n * k, blocksize);
    for (int64_t i = 0; i < blocks; ++i)
      absmax.push_back(0.02f + 0.04f * static_cast<float>(random(seed + 1, static_cast<uint64_t>(i)) >> 40) * 0x1p-24f);
    if (!nested) return;
    map = create_dynamic_map();
    nested_codes = random_bytes(seed + 2, blocks);
    for (int64_t i = 0; i < blocks_of(blocks, 256); ++i) nested_absmax.push_back(0.03f + 0.001f * static_cast<float>(i % 7));
    for (int64_t i = 0; i < blocks; ++i) {
      const float scaled = map[nested_codes[static_cast<size_t>(i)]] * nested_absmax[static_cast<size_t>(i / 256)];
      absmax[static_cast<size_t>(i)] = scaled + offset;
    }
  }

  // y = a * W^T + bias with this weight.
  Gemm4bit product(int64_t m, const ConstView& a, const View& out, const ConstView& bias, bool invariant) const {
    return {.type = type,
            .blocksize = blocksize,
            .m = m,
            .n = n,
            .k = k,
            .a = a,
            .codes = codes,
            .absmax = given(),
            .bias = bias,
            .out = out,
            .batch_invariant = invariant};
  }

  Absmax given() const {
    if (!nested) return {.values = absmax, .codes = {}, .code = {}, .nested = {}};
    return {.values = {}, .codes = nested_codes, .code = map, .nested = nested_absmax, .nested_blocksize = 256, .offset = offset};
  }

  template <class T> std::vector<double> decoded() const {
    std::vector<double> w;
    for (const T v : reference::dequantize_4bit<T>(type, codes, absmax, static_cast<size_t>(n * k), blocksize)) w.push_back(to_double(v));
    return w;
  }
};

// Norm-wise limits of the issue for f32 and bf16; f16 rounds to 11 bits.
template <class T> inline constexpr double kNormLimit = sizeof(T) == 4 ? 1e-6 : std::is_same_v<T, Half> ? 5e-4 : 3e-3;

// The result is the sum in fp64, except for the rounding of sums of k products (elementwise) and of the output.
// W: the type that weights are rounded to. `weight_error`: a bound of what else weights may be off by, relatively.
template <class W, class T>
::testing::AssertionResult close(const std::vector<T>& y, const Weight& w, const std::vector<T>& a, int64_t m,
                                 const std::vector<double>& bias, double weight_error = 0, double norm_limit = kNormLimit<T>) {
  const auto weights = w.decoded<W>();
  const double sum_error = static_cast<double>(w.k + 8) * 0x1p-24,
               rounding = sizeof(T) == 4 ? 0x1p-24 : std::ldexp(1, -1 - layout_of<T>.mantissa);
  double error = 0, norm = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < w.n; ++j) {
      double sum = bias.empty() ? 0 : bias[static_cast<size_t>(j)], magnitude = std::fabs(sum);
      for (int64_t l = 0; l < w.k; ++l) {
        const double product = to_double(a[static_cast<size_t>(i * w.k + l)]) * weights[static_cast<size_t>(j * w.k + l)];
        sum += product, magnitude += std::fabs(product);
      }
      const double actual = to_double(y[static_cast<size_t>(i * w.n + j)]), e = std::fabs(actual - sum);
      if (!(e <= magnitude * (sum_error * 1.01 + weight_error) + std::fabs(sum) * rounding * 1.01 + 1e-7 * (sizeof(T) == 2)))
        return ::testing::AssertionFailure() << "y[" << i << ", " << j << "] is " << actual << ", expected " << sum << " (terms of "
                                             << magnitude << ")";
      error += e * e, norm += sum * sum;
    }
  // A few elements may all be near zero by cancellation: the norm says something where there are many.
  if (m * w.n >= 16 && !(std::sqrt(error) <= norm_limit * std::sqrt(norm)))
    return ::testing::AssertionFailure() << "norm-wise error " << std::sqrt(error / norm);
  return ::testing::AssertionSuccess();
}

}  // namespace bnb::test
