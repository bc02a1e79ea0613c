// Fits a linear model by AdamW with 8-bit states: 2 bytes of state per parameter instead of 8.
//   optimizer_step_example [steps]
#include <bnb/bnb.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int64_t kRows = 64, kColumns = 4096;

float pseudo_random(uint64_t i) { return static_cast<float>(i * 0x9E3779B97F4A7C15 >> 40) * 0x1p-23f - 1; }

// Mean squared error of x * p against y, and its gradient.
double loss(const std::vector<float>& x, const std::vector<float>& y, const std::vector<float>& p, std::vector<float>& gradient) {
  gradient.assign(p.size(), 0);
  double sum = 0;
  for (size_t r = 0; r < y.size(); ++r) {
    double error = -double{y[r]};
    for (size_t c = 0; c < p.size(); ++c) error += double{x[r * p.size() + c]} * p[c];
    for (size_t c = 0; c < p.size(); ++c) gradient[c] += static_cast<float>(2 * error * x[r * p.size() + c] / kRows);
    sum += error * error;
  }
  return sum / kRows;
}

int run(int steps) {
  std::vector<float> x(kRows * kColumns), y(kRows), p(kColumns), gradient;
  for (size_t i = 0; i < x.size(); ++i) x[i] = pseudo_random(i);
  for (size_t r = 0; r < y.size(); ++r) y[r] = pseudo_random(r + 1000003);

  // The states begin at zero: the code of 0.0, and scales of 0.
  const std::vector<float> signed_map = bnb::create_dynamic_map(true), unsigned_map = bnb::create_dynamic_map(false);
  const auto zero = [](const std::vector<float>& map) {
    for (size_t i = 0;; ++i)
      if (map[i] == 0) return static_cast<uint8_t>(i);
  };
  std::vector<uint8_t> codes1(p.size(), zero(signed_map)), codes2(p.size(), zero(unsigned_map));
  const auto blocks = static_cast<size_t>(bnb::blocks_of(kColumns, bnb::kOptimizerBlock));
  std::vector<float> absmax1(blocks), absmax2(blocks);

  const double before = loss(x, y, p, gradient);
  for (int step = 1; step <= steps; ++step) {
    loss(x, y, p, gradient);
    bnb::OptimizerTensor tensor;
    tensor.p = p, tensor.g = gradient, tensor.step = step;
    tensor.codes1 = codes1, tensor.codes2 = codes2, tensor.absmax1 = absmax1, tensor.absmax2 = absmax2;
    bnb::optimizer_step({.config = {.rule = bnb::Optimizer::adam, .lr = 3e-4, .weight_decay = 0.01},
                         .tensors = {&tensor, 1},
                         .code1 = signed_map,
                         .code2 = unsigned_map});
  }
  const double after = loss(x, y, p, gradient);
  const size_t bytes = codes1.size() + codes2.size() + (absmax1.size() + absmax2.size()) * sizeof(float);
  std::printf("AdamW, %lld parameters, %zu bytes of state (%.2f per parameter; 8 in fp32)\n", static_cast<long long>(kColumns), bytes,
              static_cast<double>(bytes) / kColumns);
  std::printf("mean squared error %.4f, after %d steps %.6f\n", before, steps, after);
  return after < before / 100 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc > 1 ? std::atoi(argv[1]) : 200);
  } catch (const bnb::Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
