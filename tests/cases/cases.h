// The one generator of test cases: inputs, sizes, instruction sets. tests/golden/make_golden.py makes the same bits.
#pragma once

#include <bnb/bnb.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <bit>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "cases/reference.h"

// The same cases for another device: declares in bnb::test the operations and what stands for instruction sets there.
#if defined(BNB_TEST_DEVICE)
#include BNB_TEST_DEVICE
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define BNB_TEST_SANITIZED 1
#else
#define BNB_TEST_SANITIZED 0
#endif

namespace bnb {

inline void PrintTo(Half x, std::ostream* os) { *os << reference::to_float(x); }
inline void PrintTo(BFloat16 x, std::ostream* os) { *os << reference::to_float(x); }
inline void PrintTo(QuantType t, std::ostream* os) { *os << name(t); }
inline void PrintTo(DType t, std::ostream* os) { *os << name(t); }

namespace test {

using reference::Layout, reference::layout_of, reference::Quantized, reference::rounded, reference::to_double, reference::to_float;

// Fewer elements where the code runs 10 times slower: under a sanitizer, or on request.
inline bool quick() { return BNB_TEST_SANITIZED || std::getenv("BNB_TEST_QUICK"); }

inline constexpr int64_t kSizes[] = {0, 1, 2, 63, 64, 65, 96, 4097, 100003};
inline constexpr int64_t kBlocksizes[] = {32, 64, 128, 256, 512, 1024, 2048, 4096};
inline constexpr QuantType kFormats[] = {QuantType::nf4, QuantType::fp4};
using AllTypes = ::testing::Types<float, Half, BFloat16>;
struct TypeNames {
  template <class T> static std::string GetName(int) { return std::string(name(dtype_of<T>)); }
};

// ---- inputs from integers alone
inline constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

constexpr uint64_t mix(uint64_t z) {  // the output function of splitmix64
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}
constexpr uint64_t random(uint64_t seed, uint64_t i) { return mix(mix(seed) + i * kGolden); }

inline uint64_t digest(std::span<const std::byte> raw) {
  uint64_t sum = 0;
  for (size_t i = 0; i < raw.size(); ++i) sum += mix((i << 8 | std::to_integer<uint64_t>(raw[i])) + kGolden);
  return sum;
}
template <class T> uint64_t digest(const std::vector<T>& v) { return digest(std::as_bytes(std::span(v))); }

template <class T> T from_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<T>(static_cast<uint32_t>(bits));
  else
    return std::bit_cast<T>(static_cast<uint16_t>(bits));
}

// Both signs, 0, 1, 2, ... octaves (each half as often) below one that changes every 4096 elements.
template <class T> std::vector<T> waves(uint64_t seed, int64_t n) {
  constexpr Layout f = layout_of<T>;
  constexpr uint64_t low = f.full == 31 ? 1 : 24, count = f.full == 31 ? 30 : 200;
  std::vector<T> result(static_cast<size_t>(n));
  for (uint64_t i = 0; i < result.size(); ++i) {
    const uint64_t r = random(seed, i), top = low + random(seed + 1, i >> 12) % count;
    const auto drop = static_cast<uint64_t>(std::countr_zero((r >> 1 & 0x7FFF) | 0x8000));
    const uint64_t exponent = top > drop ? top - drop : 0, fraction = r >> 40 & ((1u << f.mantissa) - 1);
    result[i] = from_bits<T>((r & 1) << (8 * sizeof(T) - 1) | exponent << f.mantissa | fraction);
  }
  return result;
}

// Every finite 16-bit pattern once: ascending for seed 0, else in the order (i * 40503 + seed) mod 65536. In fp32: those of bf16.
template <class T> std::vector<T> patterns(uint64_t seed) {
  constexpr uint64_t shift = sizeof(T) == 4 ? 16 : 0, full = static_cast<uint64_t>(layout_of<T>.full);
  std::vector<T> result;
  for (uint64_t i = 0; i < 1 << 16; ++i) {
    const uint64_t bits = (seed == 0 ? i : (i * 40503 + seed) & 0xFFFF) << shift;
    if ((bits >> layout_of<T>.mantissa & full) != full) result.push_back(from_bits<T>(bits));
  }
  return result;
}

inline std::vector<uint8_t> random_bytes(uint64_t seed, int64_t n) {
  std::vector<uint8_t> result(static_cast<size_t>(n));
  for (size_t i = 0; i < result.size(); ++i) result[i] = static_cast<uint8_t>(random(seed, i));
  return result;
}

// Magnitudes of a wave; every 7th is 0.
inline std::vector<float> random_absmax(uint64_t seed, int64_t n) {
  auto result = waves<float>(seed, n);
  for (size_t i = 0; i < result.size(); ++i) result[i] = i % 7 == 6 ? 0 : std::fabs(result[i]);
  return result;
}

// Sums of uniform numbers: about normal, mean 0, variance 1.
inline std::vector<float> normals(uint64_t seed, int64_t n) {
  std::vector<float> result(static_cast<size_t>(n));
  for (size_t i = 0; i < result.size(); ++i) {
    const uint64_t r = random(seed, i);
    result[i] = static_cast<float>(static_cast<double>((r & 0xffff) + (r >> 16 & 0xffff) + (r >> 32 & 0xffff) + (r >> 48)) * 0x1p-16 - 2) *
                1.7320508f;
  }
  return result;
}
template <class T> std::vector<T> rounded_all(const std::vector<float>& x) {
  std::vector<T> result;
  for (const float v : x) result.push_back(rounded<T>(v));
  return result;
}
template <class T> std::vector<float> to_floats(const std::vector<T>& x) {
  std::vector<float> result;
  for (const T v : x) result.push_back(to_float(v));
  return result;
}
inline std::vector<float> to_floats(const std::vector<float>& x) { return x; }

// ---- memory: `offset` bytes off any alignment, ending where the allocation ends when read only, followed by guard bytes when written
template <class T> class Input {
 public:
  explicit Input(std::span<const T> values, size_t offset = 0)
      : size_(values.size()), memory_(new std::byte[offset + values.size_bytes()]), data_(memory_.get() + offset) {
    if (size_) std::memcpy(data_, values.data(), values.size_bytes());
  }
  ConstView view() const { return {data_, dtype_of<T>, static_cast<int64_t>(size_)}; }
  std::vector<T> copy() const {
    std::vector<T> values(size_);
    if (size_) std::memcpy(values.data(), data_, size_ * sizeof(T));
    return values;
  }

 private:
  size_t size_;
  std::unique_ptr<std::byte[]> memory_;
  std::byte* data_;
};

template <class T> class Output {
 public:
  explicit Output(int64_t n, size_t offset = 0)
      : size_(static_cast<size_t>(n)), offset_(offset), memory_(offset + n * sizeof(T) + kGuard, kFill) {}
  ~Output() { EXPECT_TRUE(intact()) << "bytes outside an output were written"; }
  View view() { return {memory_.data() + offset_, dtype_of<T>, static_cast<int64_t>(size_)}; }
  std::span<T> span() { return {reinterpret_cast<T*>(memory_.data() + offset_), size_}; }
  std::vector<T> values() const {
    std::vector<T> result(size_);
    if (size_) std::memcpy(result.data(), memory_.data() + offset_, size_ * sizeof(T));
    return result;
  }
  bool untouched() const {
    return std::all_of(memory_.begin(), memory_.end(), [](std::byte b) { return b == kFill; });
  }

 private:
  static constexpr size_t kGuard = 192;
  static constexpr std::byte kFill{0xA5};
  bool intact() const {
    const auto filled = [](std::byte b) { return b == kFill; };
    return std::all_of(memory_.begin(), memory_.begin() + static_cast<std::ptrdiff_t>(offset_), filled) &&
           std::all_of(memory_.end() - kGuard, memory_.end(), filled);
  }
  size_t size_, offset_;
  std::vector<std::byte> memory_;
};

// Equal to the bit; says where not.
template <class T>::testing::AssertionResult same(const std::vector<T>& actual, const std::vector<T>& expected) {
  if (actual.size() != expected.size()) return ::testing::AssertionFailure() << actual.size() << " elements, expected " << expected.size();
  if (actual.empty() || std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(T)) == 0) return ::testing::AssertionSuccess();
  size_t first = 0, count = 0;
  for (size_t i = actual.size(); i-- > 0;)
    if (std::memcmp(&actual[i], &expected[i], sizeof(T)) != 0) first = i, ++count;
  return ::testing::AssertionFailure() << count << " of " << actual.size() << " elements differ, first at " << first << ": "
                                       << ::testing::PrintToString(actual[first]) << ", expected "
                                       << ::testing::PrintToString(expected[first]);
}

// For properties: RC_ASSERT says nothing about what differs.
inline void require(const ::testing::AssertionResult& result, std::string_view what) {
  if (!result) RC_FAIL(std::string(what) + ": " + result.message());
}

// ---- what runs
class ForcedIsa {
 public:
  explicit ForcedIsa(std::string_view isa) { force_isa(isa); }
  ~ForcedIsa() { force_isa(""); }
  ForcedIsa(const ForcedIsa&) = delete;
  ForcedIsa& operator=(const ForcedIsa&) = delete;
};

inline void for_each_isa(const std::function<void()>& body) {
  for (const auto isa : supported_isas()) {
    SCOPED_TRACE("isa " + std::string(isa));
    const ForcedIsa forced(isa);
    body();
    if (::testing::Test::HasFailure()) return;  // one report is enough
  }
}

// Hands out ranges of exactly the grain, last first: no host does it worse.
inline void reversed_parallel_for(int64_t count, int64_t grain, ParallelBody body, void* context) {
  for (int64_t i = (count - 1) / grain; i >= 0; --i) body(context, i * grain, std::min((i + 1) * grain, count));
}

// Threads or order must not show: calls body under several counts of threads and under an adverse order.
inline void for_each_schedule(const std::function<void(std::string_view)>& body) {
  for (const int threads : {1, 2, 3, 5}) {
    set_num_threads(threads);
    body(std::to_string(threads) + " threads");
  }
  set_num_threads(0);
  set_parallel_for(reversed_parallel_for);
  body("reversed ranges");
  set_parallel_for(nullptr);
}

// ---- the operations on vectors
template <class T> Quantized run_quantize_4bit(QuantType type, const std::vector<T>& x, int64_t blocksize, size_t offset = 0) {
  const Input<T> input(x, offset);
  const auto n = static_cast<int64_t>(x.size());
  Output<uint8_t> codes(packed_size(n), offset);
  Output<float> absmax(blocks_of(n, blocksize));
  quantize_4bit({.type = type, .blocksize = blocksize, .x = input.view(), .codes = codes.span(), .absmax = absmax.span()});
  return {codes.values(), absmax.values()};
}

template <class T>
std::vector<T> run_dequantize_4bit(QuantType type, const std::vector<uint8_t>& codes, const std::vector<float>& absmax, int64_t n,
                                   int64_t blocksize, size_t offset = 0) {
  Output<T> out(n, offset);
  dequantize_4bit({.type = type, .blocksize = blocksize, .codes = codes, .absmax = absmax, .out = out.view()});
  return out.values();
}

template <class T>
Quantized run_quantize_blockwise(std::span<const float> code, const std::vector<T>& x, int64_t blocksize, size_t offset = 0) {
  const Input<T> input(x, offset);
  Output<uint8_t> codes(static_cast<int64_t>(x.size()), offset);
  Output<float> absmax(blocks_of(static_cast<int64_t>(x.size()), blocksize));
  quantize_blockwise({.blocksize = blocksize, .code = code, .x = input.view(), .codes = codes.span(), .absmax = absmax.span()});
  return {codes.values(), absmax.values()};
}

template <class T>
std::vector<T> run_dequantize_blockwise(std::span<const float> code, const std::vector<uint8_t>& codes, const std::vector<float>& absmax,
                                        int64_t blocksize, size_t offset = 0) {
  Output<T> out(static_cast<int64_t>(codes.size()), offset);
  dequantize_blockwise({.blocksize = blocksize, .code = code, .codes = codes, .absmax = absmax, .out = out.view()});
  return out.values();
}

struct Int8Rows {
  std::vector<int8_t> codes;
  std::vector<float> scale;
  std::vector<int64_t> outliers;  // columns
};

template <class T> Int8Rows run_quantize_int8(const std::vector<T>& x, int64_t rows, int64_t columns, float threshold, size_t offset = 0) {
  const Input<T> input(x, offset);
  Output<int8_t> codes(rows * columns, offset);
  Output<float> scale(rows);
  Output<uint64_t> outliers(outlier_words(columns));
  quantize_int8({rows, columns, input.view(), threshold, codes.span(), scale.span(), outliers.span()});
  Int8Rows r{codes.values(), scale.values(), {}};
  if (threshold > 0)
    for (int64_t j = 0; j < columns; ++j)
      if (outliers.values()[static_cast<size_t>(j / 64)] >> j % 64 & 1) r.outliers.push_back(j);
  EXPECT_TRUE(same(input.copy(), x)) << "the input was written";
  return r;
}

#define EXPECT_QUANTIZED(actual, expected)                                     \
  do {                                                                         \
    const auto& actual_value = (actual);                                       \
    const auto& expected_value = (expected);                                   \
    EXPECT_TRUE(same(actual_value.codes, expected_value.codes)) << "codes";    \
    EXPECT_TRUE(same(actual_value.absmax, expected_value.absmax)) << "absmax"; \
  } while (false)

}  // namespace test
}  // namespace bnb
