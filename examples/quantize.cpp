// Quantizes a weight to NF4, decodes it again, and multiplies with it directly.
//   quantize_example [rows] [columns]
#include <bnb/bnb.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

std::vector<float> normal(int64_t n, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> distribution(0, 0.02f);
  std::vector<float> v(static_cast<size_t>(n));
  for (float& x : v) x = distribution(generator);
  return v;
}

// |actual - expected| / |expected|
double relative_error(const std::vector<float>& actual, const std::vector<float>& expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(actual[i] - expected[i], 2);
    norm += std::pow(expected[i], 2);
  }
  return std::sqrt(error / norm);
}

std::vector<float> product(const std::vector<float>& a, const std::vector<float>& w, int64_t n, int64_t k) {
  std::vector<float> y;
  for (int64_t j = 0; j < n; ++j) {
    double sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += double{a[static_cast<size_t>(i)]} * w[static_cast<size_t>(j * k + i)];
    y.push_back(static_cast<float>(sum));
  }
  return y;
}

int run(int64_t n, int64_t k) {
  const std::vector<float> weight = normal(n * k, 1), input = normal(k, 2);
  const bnb::Quantized4bit w = bnb::quantize(weight, bnb::Options4bit{.type = bnb::QuantType::nf4, .nested = true, .shape = {n, k}});
  const std::vector<float> decoded = bnb::dequantize(w), output = bnb::gemm(input, w);

  const size_t bytes = w.codes.size() + w.scales.codes.size() + w.scales.second.size() * sizeof(float);
  const double decoded_error = relative_error(decoded, weight), product_error = relative_error(output, product(input, decoded, n, k));
  std::printf("instruction set      %s\n", std::string(bnb::active_isa()).c_str());
  std::printf("weight %lld x %lld    %zu bytes in fp32, %zu in NF4 with nested scales (%.2f bits per element)\n", static_cast<long long>(n),
              static_cast<long long>(k), weight.size() * sizeof(float), bytes,
              8.0 * static_cast<double>(bytes) / static_cast<double>(weight.size()));
  std::printf("decoded weight       %.4f off the original, relative\n", decoded_error);
  std::printf("gemm                 %.1e off the product with the decoded weight, %.4f off that with the original\n", product_error,
              relative_error(output, product(input, weight, n, k)));
  return decoded_error < 0.15 && product_error < 1e-5 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? std::atoll(argv[1]) : 1024, argc > 2 ? std::atoll(argv[2]) : 1024);
  } catch (const bnb::Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
