// The library's product (src/cuda/cublaslt.h) for the emulated device, so that what surrounds it is tested.
#include "../../src/cuda/cublaslt.h"

#include <vector>

#include "../../src/cpu/convert.h"
#include "../../src/formats.h"

namespace bnb::cuda::library {

bool available(int) { return true; }

void multiply(const Product& p, int, Stream) {
  visit(p.type, [&]<class T>(T) {
    const auto* a = static_cast<const T*>(p.a);
    const auto* w = static_cast<const T*>(p.w);
    const auto floats = [](const T* from, int64_t n) {
      std::vector<float> x(static_cast<size_t>(n));
      for (size_t i = 0; i < x.size(); ++i) x[i] = to_float(from[i]);
      return x;
    };
    for (int64_t j = 0; j < p.n; ++j) {
      const auto column = floats(w + j * p.k, p.k);
      for (int64_t i = 0; i < p.m; ++i) {
        const auto row = floats(a + i * p.k, p.k);
        float sums[8] = {};
        for (int64_t l = 0; l < p.k; ++l) sums[l % 8] += row[static_cast<size_t>(l)] * column[static_cast<size_t>(l)];
        float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[j]);
        static_cast<T*>(p.y)[i * p.pitch + j] = rounded<T>(sum);
      }
    }
  });
}

}  // namespace bnb::cuda::library
