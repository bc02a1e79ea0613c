// The C functions of the CPU (table.h).
#include <bnb/cpu.h>
#include <bnb/gemm.h>

#include <vector>

#include "common/check.h"
#include "common/convert.h"
#include "cpu/runtime/features.h"
#include "cpu/runtime/parallel.h"
#include "table.h"

namespace bnb::c_symbols {
namespace {

template <class T> void quantize(const float* code, const void* a, float* absmax, uint8_t* out, int64_t blocksize, int64_t n) {
  quantize_blockwise({blocksize, places(code, 256), read<T>(a, n), places(out, n), places(absmax, blocks(n, blocksize))});
}

template <class T> void dequantize(const float* code, const uint8_t* a, const float* absmax, void* out, int64_t blocksize, int64_t n) {
  dequantize_blockwise({blocksize, places(code, 256), places(a, n), places(absmax, blocks(n, blocksize)), write<T>(out, n)});
}

// m rows of n elements, which lie as one flat row.
template <class T, QuantType type>
void dequantize_4bit(const uint8_t* a, const float* absmax, void* out, int64_t blocksize, int64_t m, int64_t n) {
  const int64_t size = Checker("dequantize_4bit").product("m * n", m, n);
  bnb::dequantize_4bit({type, blocksize, places(a, packed(size)), places(absmax, blocks(size, blocksize)), write<T>(out, size)});
}

// out [m, n] = x [m, k] times a weight in the layout of the released package for CPUs: rows in groups of 32, byte (k / 2, row, k % 2) of a
// group holds the code of row `row` in its low and of row `row` + 16 in its high nibble; absmax is bf16, [k / blocksize, n].
template <QuantType type>
void gemv_4bit(int64_t m, int64_t n, int64_t k, const BFloat16* x, const uint8_t* w, const BFloat16* absmax, BFloat16* out,
               int64_t blocksize, int64_t x_stride, int64_t out_stride) {
  constexpr int64_t kRows = 32, kHalf = kRows / 2;
  const Checker check("gemv_4bit_inference_cpu");
  const int64_t weights = check.product("N * K", n, k), size_x = check.product("M * K", m, k), size = check.product("M * N", m, n);
  check.blocksize(blocksize);
  check.that(n % kRows == 0, "N", n, "a multiple of 32");
  check.that(k % blocksize == 0, "K", k, "a multiple of the blocksize");
  check.that(x_stride >= k, "x_stride", x_stride, "K or more");
  check.that(out_stride >= n, "out_stride", out_stride, "N or more");
  if (size == 0) return;
  check.that(w != nullptr && (k == 0 || (x && absmax)) && out != nullptr, "x, w, absmax or out", "null", "a pointer to its elements");

  std::vector<uint8_t> codes(static_cast<size_t>(packed_size(weights)));
  for (int64_t row = 0; row < n; ++row) {
    const uint8_t* group = w + row / kRows * kRows * (k / 2) + row % kHalf * 2;
    const int shift = row % kRows < kHalf ? 0 : 4;
    uint8_t* to = codes.data() + row * (k / 2);
    for (int64_t i = 0; i < k / 2; ++i, group += kRows)
      to[i] = static_cast<uint8_t>((group[0] >> shift & 15) << 4 | (group[1] >> shift & 15));
  }
  const int64_t blocks = k / blocksize;
  std::vector<float> scales(static_cast<size_t>(n * blocks));
  for (int64_t row = 0; row < n; ++row)
    for (int64_t b = 0; b < blocks; ++b) scales[static_cast<size_t>(row * blocks + b)] = to_float(absmax[b * n + row]);

  const bool together = x_stride == k && out_stride == n;
  for (int64_t row = 0; row < m; row += together ? m : 1) {
    const int64_t rows = together ? m : 1;
    bnb::gemm_4bit({.type = type,
                    .blocksize = blocksize,
                    .m = rows,
                    .n = n,
                    .k = k,
                    .a = read<BFloat16>(x + row * x_stride, together ? size_x : k),
                    .codes = codes,
                    .absmax = {.values = scales},
                    .out = write<BFloat16>(out + row * out_stride, rows * n)});
  }
}

#if !defined(__x86_64__)
bool none() { return false; }
#endif

}  // namespace
}  // namespace bnb::c_symbols

using namespace bnb;
using namespace bnb::c_symbols;

#define QUANTIZE(name, T)                                                                                         \
  BNB_SYMBOL(name, (const float* code, const void* a, float* absmax, uint8_t* out, int64_t blocksize, int64_t n), \
             c_symbols::quantize<T>(code, a, absmax, out, blocksize, n))
#define DEQUANTIZE(name, T)                                                                                             \
  BNB_SYMBOL(name, (const float* code, const uint8_t* a, const float* absmax, void* out, int64_t blocksize, int64_t n), \
             c_symbols::dequantize<T>(code, a, absmax, out, blocksize, n))
#define DEQUANTIZE_4BIT(name, T, type)                                                                          \
  BNB_SYMBOL(name, (const uint8_t* a, const float* absmax, void* out, int64_t blocksize, int64_t m, int64_t n), \
             c_symbols::dequantize_4bit<T, QuantType::type>(a, absmax, out, blocksize, m, n))
#define GEMV_4BIT(name, type)                                                                                              \
  BNB_SYMBOL(name,                                                                                                         \
             (int64_t m, int64_t n, int64_t k, const BFloat16* x, const uint8_t* w, const BFloat16* absmax, BFloat16* out, \
              int64_t blocksize, int64_t x_stride, int64_t out_stride),                                                    \
             c_symbols::gemv_4bit<QuantType::type>(m, n, k, x, w, absmax, out, blocksize, x_stride, out_stride))
#if defined(__x86_64__)
#define HAS(name, what) BNB_SYMBOL(name, (), cpu::what())
#else
#define HAS(name, what) BNB_SYMBOL(name, (), none())
#endif

BNB_CPU_SYMBOLS(BNB_DEFINE)
BNB_EXPORT_TABLE(BNB_CPU_SYMBOLS)

// Beside those of the released package, for diagnostics: the names of instruction sets, as bnb/cpu.h has them. Null after an error.
namespace {
struct IsaNames {
  std::string text;
  IsaNames() {
    for (const auto name : supported_isas()) text.append(text.empty() ? "" : " ").append(name);
  }
};
}  // namespace
extern "C" BNB_EXPORT const char* bnb_active_isa() {
  return guarded([] { return active_isa().data(); });
}
extern "C" BNB_EXPORT const char* bnb_supported_isas() {
  return guarded([] { return process_wide<IsaNames>().text.c_str(); });
}
