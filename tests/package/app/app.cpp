// What the C++ package gives to a project that has installed it: an own value, a product, an error that can be caught across the library.
#include <bnb/bnb.h>

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

int main() {
  const int64_t m = 3, n = 96, k = 256;
  std::vector<float> weight(n * k), x(m * k);
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = std::sin(static_cast<float>(i) * 0.37f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::cos(static_cast<float>(i) * 0.11f);

  const auto w = bnb::quantize(weight, bnb::Options4bit{.nested = true, .shape = {n, k}});
  const std::vector<float> decoded = bnb::dequantize(w), y = bnb::gemm(x, w);
  double worst = 0;
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t l = 0; l < k; ++l) sum += double{x[i * k + l]} * decoded[j * k + l];
      worst = std::max(worst, std::abs(sum - y[i * n + j]));
    }
  if (!(worst < 1e-3)) return std::printf("the product is %g off\n", worst), 1;

  std::vector<bnb::Item> items = bnb::state_items(w, "layer.weight.");
  const auto again = bnb::read_4bit(w.codes, std::vector<bnb::ConstItem>(items.begin(), items.end()));
  if (!(again == w)) return std::puts("the state did not come back"), 1;

  try {
    bnb::quantize(weight, bnb::Options4bit{.blocksize = 48});
  } catch (const bnb::Error& e) {
    std::printf("bnb %s on %s: %s\n", BNB_VERSION, std::string(bnb::active_isa()).c_str(), e.what());
    return e.code() == bnb::Errc::invalid_argument ? 0 : 1;
  }
  return std::puts("a wrong blocksize was taken"), 1;
}
