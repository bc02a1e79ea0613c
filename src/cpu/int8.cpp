// The public operations of LLM.int8() (bnb/int8.h).
#include <bnb/int8.h>

#include "common/arguments.h"
#include "cpu/gemm/driver.h"
#include "cpu/runtime/pages.h"

namespace bnb {
namespace {

// Both outputs except the codes of outlier columns. With a threshold `outliers` holds the columns of this call alone.
void quantize_rows(const QuantizeInt8& d) {
  const auto& kernels = cpu::active();
  const int64_t words = d.threshold > 0 ? outlier_words(d.columns) : 0;
  std::fill_n(d.outliers.begin(), words, 0);
  const cpu::OutputPages pages(d.codes.data(), d.rows * d.columns);
  parallel_for(d.rows, grain_of(kGrainElements, d.columns), [&](int64_t begin, int64_t end) {
    pages.map(begin * d.columns, end * d.columns);
    const cpu::Scratch scratch(words * 8);
    auto* own = static_cast<uint64_t*>(scratch.data());
    std::fill_n(own, words, 0);
    kernels.quantize_int8(d, own, {begin, end});
    for (int64_t w = 0; w < words; ++w)
      if (own[w] != 0) __atomic_fetch_or(&d.outliers[static_cast<size_t>(w)], own[w], __ATOMIC_RELAXED);
  });
}

void clear_columns(const QuantizeInt8& d, std::span<const int64_t> columns) {
  if (columns.empty()) return;
  parallel_for(d.rows, grain_of(kGrainElements, std::ssize(columns)), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (const int64_t c : columns) d.codes[static_cast<size_t>(r * d.columns + c)] = 0;
  });
}

void quantize_and_multiply(const LinearInt8& d) {
  const int64_t words = d.threshold > 0 ? outlier_words(d.k) : 0;
  const cpu::Scratch scratch(words * 8 + d.m * 4 + d.m * d.k);
  auto* outliers = static_cast<uint64_t*>(scratch.data());
  auto* scale = reinterpret_cast<float*>(outliers + words);
  auto* codes = reinterpret_cast<int8_t*>(scale + d.m);
  const auto size = static_cast<size_t>(d.m * d.k), m = static_cast<size_t>(d.m);
  const QuantizeInt8 quantize{d.m, d.k, d.x, d.threshold, {codes, size}, {scale, m}, {outliers, static_cast<size_t>(words)}};
  quantize_rows(quantize);
  const auto columns = outlier_columns(quantize.outliers);
  clear_columns(quantize, columns);
  multiply(cpu::active().gemm_int8, {.m = d.m,
                                     .n = d.n,
                                     .k = d.k,
                                     .a = {codes, size},
                                     .b = d.weight,
                                     .to = {{scale, m}, d.weight_scale, d.bias, d.out},
                                     .x = d.x,
                                     .outliers = columns});
}

}  // namespace

void quantize_int8(const QuantizeInt8& d) {
  check_arguments(d).within_memory([&] {
    quantize_rows(d);
    if (d.threshold > 0) clear_columns(d, outlier_columns(d.outliers.first(static_cast<size_t>(outlier_words(d.columns)))));
  });
}

void quantize_columns_int8(const QuantizeColumnsInt8& d) {
  constexpr int64_t step = cpu::kInt8Columns;
  check_arguments(d).within_memory([&] {
    parallel_for((d.columns + step - 1) / step, grain_of(kGrainElements, d.rows * step), [&](int64_t begin, int64_t end) {
      cpu::active().quantize_columns_int8(d, {begin * step, std::min(end * step, d.columns)});
    });
  });
}

void dequantize_int8(const DequantizeInt8& d) {
  check_arguments(d).within_memory([&] {
    parallel_for(d.rows, grain_of(kGrainElements, d.columns),
                 [&](int64_t begin, int64_t end) { cpu::active().dequantize_int8(d, {begin, end}); });
  });
}

void dequantize_sums(const DequantizeSums& d) {
  check_arguments(d).within_memory([&] {
    parallel_for(d.m, grain_of(kGrainElements, d.n), [&](int64_t begin, int64_t end) { cpu::active().dequantize_sums(d, {begin, end}); });
  });
}

void gemm_int8(const GemmInt8& d) {
  check_arguments(d).within_memory([&] { multiply(cpu::active().gemm_int8, d); });
}

void linear_int8(const LinearInt8& d) {
  const Checker check = check_arguments(d);
  if (d.m == 0 || d.n == 0) return;
  check.within_memory([&] { quantize_and_multiply(d); });
}

}  // namespace bnb
