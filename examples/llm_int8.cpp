// LLM.int8(): a linear layer in 8 bits whose input has a few columns of large numbers, with and without keeping those in 16 bits.
//   llm_int8_example
#include <bnb/bnb.h>

#include <cmath>
#include <cstdio>
#include <vector>

namespace {

constexpr int64_t kRows = 8, kOutputs = 256, kInputs = 1024;

std::vector<float> uniform(int64_t n, uint64_t seed, float scale) {
  std::vector<float> v(static_cast<size_t>(n));
  for (size_t i = 0; i < v.size(); ++i) v[i] = scale * (static_cast<float>((i + seed) * 0x9E3779B97F4A7C15 >> 40) * 0x1p-23f - 1);
  return v;
}

// |y - x * w^T| / |x * w^T|
double relative_error(const std::vector<bnb::Half>& y, const std::vector<float>& x, const std::vector<float>& w) {
  double error = 0, norm = 0;
  for (int64_t i = 0; i < kRows; ++i)
    for (int64_t j = 0; j < kOutputs; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < kInputs; ++l)
        sum += double{x[static_cast<size_t>(i * kInputs + l)]} * w[static_cast<size_t>(j * kInputs + l)];
      error += std::pow(bnb::to_fp32(y[static_cast<size_t>(i * kOutputs + j)]) - sum, 2);
      norm += sum * sum;
    }
  return std::sqrt(error / norm);
}

int run() {
  const std::vector<float> weight = uniform(kOutputs * kInputs, 1, 0.05f);
  std::vector<float> x = uniform(kRows * kInputs, 7, 1);
  for (int64_t i = 0; i < kRows; ++i) x[static_cast<size_t>(i * kInputs + 100)] = x[static_cast<size_t>(i * kInputs + 777)] = 40;
  std::vector<bnb::Half> half(x.size());
  bnb::convert(x, half);

  const bnb::QuantizedInt8 w = bnb::quantize(weight, bnb::OptionsInt8{.shape = {kOutputs, kInputs}});
  const double plain = relative_error(bnb::gemm(half, w), x, weight);
  const double mixed = relative_error(bnb::gemm(half, w, {.threshold = 6}), x, weight);
  std::printf("weight %lld x %lld: %zu bytes in fp16, %zu in int8\n", static_cast<long long>(kOutputs), static_cast<long long>(kInputs),
              weight.size() * 2, w.codes.size() + w.scale.size() * sizeof(float));
  std::printf("relative error of the product: %.4f; %.4f with columns of |x| >= 6 in 16 bits\n", plain, mixed);
  return mixed < plain / 2 ? 0 : 1;
}

}  // namespace

int main() {
  try {
    return run();
  } catch (const bnb::Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
