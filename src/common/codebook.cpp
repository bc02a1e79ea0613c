#include <bnb/codebook.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "common/check.h"
#include "common/formats.h"

namespace bnb {
namespace {

// Abnormal float for blocks of 64 (Yoshida 2023, arXiv 2306.06965), in the order of the released package.
constexpr std::array<float, 16> kAf4 = {1.0f,
                                        0.7242486476898193f,
                                        0.5549623370170593f,
                                        0.4256388247013092f,
                                        0.3167566657066345f,
                                        0.2196127474308014f,
                                        0.12934483587741852f,
                                        0.0427316389977932f,
                                        0.0f,
                                        -0.049348119646310806f,
                                        -0.14982478320598602f,
                                        -0.25607553124427795f,
                                        -0.37369510531425476f,
                                        -0.5124374032020569f,
                                        -0.6944100856781006f,
                                        -1.0f};

// n points from a to b, computed inwards from both ends in fp32 with one rounding each, as torch.linspace does.
std::vector<float> linspace(float a, float b, int n) {
  std::vector<float> points(n, a);
  const float step = n > 1 ? (b - a) / static_cast<float>(n - 1) : 0.0f;
  for (int i = 0; i < n; ++i)
    points[i] = i < n / 2 || n == 1 ? std::fma(step, static_cast<float>(i), a) : std::fma(-step, static_cast<float>(n - 1 - i), b);
  return points;
}

std::vector<float> padded_and_sorted(std::vector<float> values) {
  values.resize(256, 0.0f);
  std::ranges::stable_sort(values);
  return values;
}

std::vector<float> scaled_to_one(std::vector<float> values) {
  const float most = *std::ranges::max_element(values);
  for (float& v : values) v /= most;
  return values;
}

// The x that a normal variable stays below with probability p >= 0.5. Newton's steps on the concave branch only ever grow towards it.
double normal_quantile(double p) {
  const double sqrt_half = 1 / std::numbers::sqrt2, density_at_zero = sqrt_half * std::numbers::inv_sqrtpi;
  double x = 0;
  for (;;) {
    const double missing = 0.5 * std::erfc(x * sqrt_half) - (1 - p), next = x + missing / (density_at_zero * std::exp(-0.5 * x * x));
    if (!(next > x)) return x;
    x = next;
  }
}

void check_bits(const Checker& check, int total_bits) {
  check.that(total_bits >= 1 && total_bits <= 8, "total_bits", total_bits, "1 to 8");
}

}  // namespace

std::span<const float, 16> values_of(QuantType type) {
  return visit(type, [](auto format) -> std::span<const float, 16> { return decltype(format)::values; });
}

std::vector<float> create_4bit_map(std::string_view name) {
  if (name == "nf4") return {Nf4::values.begin(), Nf4::values.end()};
  if (name == "fp4") return {Fp4::values.begin(), Fp4::values.end()};
  if (name == "af4") return {kAf4.begin(), kAf4.end()};
  if (name == "int4") {
    std::vector<float> values;
    for (int i = 7; i >= 0; --i) values.push_back(static_cast<float>(i) / 7);
    for (int i = 0; i <= 7; ++i) values.push_back(static_cast<float>(0 - i) / 7);
    return values;
  }
  Checker("create_4bit_map").fail("name", std::string(1, '"').append(name).append(1, '"'), "nf4, fp4, int4 or af4");
}

std::vector<float> create_dynamic_map(bool is_signed, int max_exponent_bits, int total_bits) {
  const Checker check("create_dynamic_map");
  check_bits(check, total_bits);
  check.that(max_exponent_bits >= 0 && max_exponent_bits <= 255, "max_exponent_bits", max_exponent_bits, "0 to 255");
  const int fraction_bits = total_bits - 1 - max_exponent_bits;  // of the smallest decade; negative: decades that hold nothing come first
  std::vector<float> values = {0.0f, 1.0f};
  const auto add_means = [&](int count, int decade) {
    const auto points = linspace(0.1f, 1.0f, count + 1);
    const auto scale = static_cast<float>(std::pow(10.0, decade));
    for (int j = 0; j < count; ++j) {
      const float mean = (points[j] + points[j + 1]) / 2 * scale;
      values.push_back(mean);
      if (is_signed) values.push_back(-mean);
    }
  };
  for (int i = 0; i < max_exponent_bits; ++i)
    if (const int bits = i + fraction_bits + !is_signed; bits >= 0) add_means(1 << bits, i + 1 - max_exponent_bits);
  // Codes that no exponent uses refine the greatest decade.
  if (fraction_bits > 0 && max_exponent_bits > 0) add_means((1 << fraction_bits) - 1, 0);
  check.that(values.size() == size_t{1} << total_bits, "max_exponent_bits", max_exponent_bits,
             is_signed ? "at least 1" : "total_bits - 1 for an unsigned map");
  return padded_and_sorted(std::move(values));
}

std::vector<float> create_linear_map(bool is_signed, int total_bits, bool add_zero) {
  check_bits(Checker("create_linear_map"), total_bits);
  const bool odd = is_signed && (add_zero || total_bits < 8);  // an odd number of points, symmetric about zero
  auto values = linspace(is_signed ? -1.0f : 0.0f, 1.0f, (1 << total_bits) - odd);
  values.insert(values.begin() + static_cast<int64_t>(values.size() / 2), 256 - values.size(), 0.0f);
  return values;
}

std::vector<float> create_normal_map(double offset, bool use_extra_value) {
  Checker("create_normal_map").that(offset > 0.5 && offset < 1, "offset", offset, "a probability above 0.5 and below 1");
  std::vector<float> values;
  const auto add_quantiles = [&](int count, float sign) {
    const auto points = linspace(static_cast<float>(offset), 0.5f, count + 1);
    for (int i = 0; i < count; ++i) values.push_back(sign * static_cast<float>(normal_quantile(points[i])));
  };
  add_quantiles(use_extra_value ? 8 : 7, 1);
  add_quantiles(7, -1);
  return scaled_to_one(padded_and_sorted(std::move(values)));
}

std::vector<float> create_fp8_map(bool is_signed, int exponent_bits, int precision_bits, int total_bits) {
  const Checker check("create_fp8_map");
  check_bits(check, total_bits);
  const int most = std::min(7, total_bits - is_signed);
  check.that(exponent_bits >= is_signed && exponent_bits <= most, "exponent_bits", exponent_bits,
             (is_signed ? "1 to " : "0 to ") + std::to_string(most));
  check.that(precision_bits == total_bits - is_signed - exponent_bits, "precision_bits", precision_bits,
             std::to_string(total_bits - is_signed - exponent_bits) + ", what total_bits leaves");
  std::vector<float> values;
  const double bias = std::exp2(exponent_bits - 1);  // half of one without exponents, as in the released package
  for (int e = 0; e < 1 << exponent_bits; ++e)
    for (int f = 0; f < 1 << precision_bits; ++f) {
      // e counts down from the greatest power; 0 stands for subnormal numbers, two binades below the least normal one.
      const double fraction = std::ldexp(f, -precision_bits);
      const auto value = static_cast<float>(e == 0 ? fraction * std::exp2(-bias) : (1 + fraction) * std::exp2(bias + 1 - e));
      values.push_back(value);
      if (is_signed) values.push_back(-value);
    }
  return scaled_to_one(padded_and_sorted(std::move(values)));
}

}  // namespace bnb
