// quantize_blockwise and dequantize_blockwise with maps of every kind: the nearest code, bit by bit on every instruction set.
#include <algorithm>
#include <map>

#include "cases/cases.h"

namespace bnb::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Maps that users have, and maps that break clever encoders: crowded, equal, huge, infinite, one-sided values.
const std::map<std::string, std::vector<float>>& maps() {
  static const auto made = [] {
    std::map<std::string, std::vector<float>> m = {
        {"dynamic", create_dynamic_map()}, {"dynamic unsigned", create_dynamic_map(false)}, {"dynamic 3", create_dynamic_map(true, 3)},
        {"linear", create_linear_map()},   {"linear unsigned", create_linear_map(false)},   {"normal", create_normal_map()},
        {"fp8", create_fp8_map()},         {"4 bit", create_dynamic_map(true, 3, 4)}};
    auto& crowded = m["crowded"];
    for (int i = 0; i < 256; ++i)
      crowded.push_back(i < 250 ? 0.25f + static_cast<float>(i) * 0x1p-24f : 0.1f * static_cast<float>(i - 245));
    m["equal"].assign(256, 0.5f);
    auto& steps = m["equal pairs"];
    for (int i = 0; i < 256; ++i) steps.push_back(static_cast<float>(i / 2 - 64) / 64);
    auto& wide = m["wide"];
    for (int i = -128; i < 128; ++i) wide.push_back(i == 0 ? 0 : std::copysign(std::ldexp(1.0f, std::abs(i) - 127), static_cast<float>(i)));
    auto& infinite = m["infinite ends"];
    infinite = create_linear_map();
    infinite.front() = -kInf, infinite.back() = kInf;
    auto& random_map = m["random"] = normals(99, 256);
    std::ranges::sort(random_map);
    auto& subnormal = m["subnormal"];
    for (int i = 0; i < 256; ++i) subnormal.push_back(static_cast<float>(i - 128) * 0x1p-149f);
    return m;
  }();
  return made;
}

template <class T> class Blockwise : public ::testing::Test {
 public:
  static void check(const std::vector<T>& x, int64_t blocksize, size_t offset = 0) {
    for (const auto& [name, code] : maps()) check(name, code, x, blocksize, offset);
  }
  static void check(const std::string& name, const std::vector<float>& code, const std::vector<T>& x, int64_t blocksize, size_t offset) {
    SCOPED_TRACE(name + ", " + std::to_string(x.size()) + " elements in blocks of " + std::to_string(blocksize));
    const auto expected = reference::quantize_blockwise(reference::Nearest(code), to_floats(x), blocksize);
    for_each_isa([&] { EXPECT_QUANTIZED(run_quantize_blockwise<T>(code, x, blocksize, offset), expected); });
  }
  static void check_dequantize(const std::vector<float>& code, int64_t n, int64_t blocksize, size_t offset = 0) {
    const auto codes = random_bytes(1, n);
    const auto absmax = random_absmax(2, blocks_of(n, blocksize));
    const auto expected = reference::dequantize_blockwise<T>(code, codes, absmax, blocksize);
    for_each_isa([&] {
      EXPECT_TRUE(same(run_dequantize_blockwise<T>(code, codes, absmax, blocksize, offset), expected)) << n << " in " << blocksize;
    });
  }
};
TYPED_TEST_SUITE(Blockwise, AllTypes, TypeNames);

TYPED_TEST(Blockwise, QuantizesEverySize) {
  for (const int64_t n : kSizes)
    for (const int64_t blocksize : kBlocksizes)
      if (n < 100000 || blocksize == 256) this->check(waves<TypeParam>(static_cast<uint64_t>(n), n), blocksize);
}

TYPED_TEST(Blockwise, QuantizesEveryShortTail) {
  for (int64_t n = 1; n <= 70; ++n) this->check(waves<TypeParam>(3, n), 64);
}

TYPED_TEST(Blockwise, DequantizesEverySize) {
  auto unsorted = maps().at("random");
  std::ranges::reverse(unsorted);
  for (const int64_t n : kSizes)
    for (const int64_t blocksize : kBlocksizes) this->check_dequantize(unsorted, n, blocksize);
  for (int64_t n = 1; n <= 130; ++n) this->check_dequantize(unsorted, n, 64);
  this->check_dequantize(maps().at("dynamic"), (int64_t{5} << 20) + 33, 256);
}

TYPED_TEST(Blockwise, NoAlignmentIsDemanded) {
  for (const size_t offset : {1, 2, 3, 5, 31}) {
    this->check(waves<TypeParam>(8, 4097), 256, offset);
    this->check_dequantize(maps().at("dynamic"), 4097, 256, offset);
  }
}

// t one float below, on and above every boundary and every value of every map.
TYPED_TEST(Blockwise, DecidesAtBoundaries) {
  for (const auto& [name, code] : maps()) {
    const reference::Nearest nearest(code);
    std::vector<float> points(code.begin(), code.end());
    for (size_t i = 0; i < 255; ++i) points.push_back(nearest.middle(i));
    for (size_t i = points.size(); i-- > 0;)
      points.insert(points.end(), {std::nextafter(points[i], kInf), std::nextafter(points[i], -kInf)});
    for (const float scale : {1.0f, -1.0f, 0x1p-60f, 0x1p60f}) {
      std::vector<TypeParam> x;
      for (const float v : points) {
        if (!(std::fabs(v) <= 1)) continue;
        if (x.size() % 32 == 0) x.push_back(rounded<TypeParam>(scale));
        x.push_back(rounded<TypeParam>(v * scale));
      }
      this->check(name, code, x, 32, 0);
    }
  }
}

TYPED_TEST(Blockwise, SpecialBlocks) {
  const float nan = std::nanf("");
  const std::vector<std::vector<float>> kinds = {
      {0},      {-0.0f},           {nan}, {1, -nan}, {kInf}, {-kInf, 1}, {kInf, nan}, {0x1p-149f, -0x1p-149f}, {9e-39f, -5e-39f},
      {1e-38f}, {3.4e38f, -1e-45f}};
  std::vector<TypeParam> x;
  for (const auto& kind : kinds)
    for (const float fill : {0.0f, kind[0] == 0 ? 0.0f : 0.7f}) {
      x.resize(x.size() + 64, rounded<TypeParam>(fill));
      for (size_t i = 0; i < kind.size(); ++i) x[x.size() - 1 - i * 9] = rounded<TypeParam>(kind[i]);
    }
  this->check(x, 64);
  x.resize(x.size() - 5);
  this->check(x, 64);
}

TYPED_TEST(Blockwise, EveryPattern) {
  for (const uint64_t seed : {0, 12345}) this->check(patterns<TypeParam>(seed), 256);
}

TYPED_TEST(Blockwise, DoesNotDependOnThreads) {
  const auto x = waves<TypeParam>(13, 300001);
  const auto& code = maps().at("dynamic");
  for_each_isa([&] {
    const auto expected = run_quantize_blockwise<TypeParam>(code, x, 256);
    const auto back = run_dequantize_blockwise<TypeParam>(code, expected.codes, expected.absmax, 256);
    for_each_schedule([&](std::string_view schedule) {
      SCOPED_TRACE(schedule);
      EXPECT_QUANTIZED(run_quantize_blockwise<TypeParam>(code, x, 256), expected);
      EXPECT_TRUE(same(run_dequantize_blockwise<TypeParam>(code, expected.codes, expected.absmax, 256), back));
    });
  });
}

#if !defined(BNB_TEST_DEVICE)  // a GPU has a list of blocksizes, and NaN of its own
TYPED_TEST(Blockwise, AnyBlocksize) {
  for (const int64_t blocksize : {int64_t{1}, int64_t{2}, int64_t{7}, int64_t{31}, int64_t{33}, int64_t{96}, int64_t{100}, int64_t{8192},
                                  int64_t{16384}, int64_t{20001}, std::numeric_limits<int64_t>::max()})
    for (const int64_t n : {0, 1, 31, 65, 1000, 20000})
      for (const size_t offset : {0, 3}) {
        const auto x = waves<TypeParam>(static_cast<uint64_t>(n), n);
        for (const auto* name : {"dynamic", "dynamic unsigned", "random"}) this->check(name, maps().at(name), x, blocksize, offset);
        this->check_dequantize(maps().at("dynamic"), n, blocksize, offset);
      }
  for (const int64_t blocksize : {100, 96, 1000000, 7})  // an output that goes past the caches where blocks are whole lines
    this->check_dequantize(maps().at("random"), (int64_t{3} << 20) + 5, blocksize);
  const auto x = waves<TypeParam>(17, 30011);
  for (const int64_t blocksize : {1, 100, 16384}) {
    const auto expected = reference::quantize_blockwise(reference::Nearest(maps().at("dynamic")), to_floats(x), blocksize);
    for_each_schedule(
        [&](std::string_view) { EXPECT_QUANTIZED(run_quantize_blockwise<TypeParam>(maps().at("dynamic"), x, blocksize), expected); });
  }
}

template <class T> T quiet_nan(float x) {
  const auto b = std::bit_cast<uint32_t>(x) | 0x400000;
  if constexpr (std::is_same_v<T, float>) return std::bit_cast<float>(b);
  const uint32_t sign = b >> 16 & 0x8000;
  return from_bits<T>(std::is_same_v<T, Half> ? sign | 0x7e00 | (b >> 13 & 0x1ff) : b >> 16);
}

// A NaN in absmax is the result; else one in the map, made quiet. Signs and leading payloads stay.
TYPED_TEST(Blockwise, NansKeepSignAndPayload) {
  const std::vector<uint32_t> nans = {0x7fc00000, 0xffc00000, 0x7f800001, 0xff800001, 0x7fd23456, 0xffa5a5a5, 0x7fffffff, 0xffffffff};
  std::vector<float> code = normals(5, 256), absmax = {1.0f, 0.0f, -0.0f, 3.0f, kInf, 1e-40f};
  for (size_t i = 0; i < nans.size(); ++i) {
    code[i * 31] = std::bit_cast<float>(nans[i]);
    absmax.insert(absmax.begin() + static_cast<int64_t>(i) / 2 + 1, std::bit_cast<float>(nans[nans.size() - 1 - i]));
  }
  for (const int64_t blocksize : {32, 256, 5}) {
    const auto n = std::ssize(absmax) * blocksize - 2;
    auto codes = random_bytes(9, n);
    for (size_t i = 0; i < codes.size(); ++i)
      if (i % 3 == 0) codes[i] = static_cast<uint8_t>(i / 3 % nans.size() * 31);
    std::vector<TypeParam> expected;
    const auto of = [&](float value, float scale) {
      if (std::isnan(scale)) return quiet_nan<TypeParam>(scale);
      const float product = value * scale;
      if (std::isnan(value)) return quiet_nan<TypeParam>(value);
      return std::isnan(product) ? quiet_nan<TypeParam>(product) : rounded<TypeParam>(product);
    };
    for (size_t i = 0; i < codes.size(); ++i) expected.push_back(of(code[codes[i]], absmax[i / static_cast<size_t>(blocksize)]));
    for_each_isa([&] { EXPECT_TRUE(same(run_dequantize_blockwise<TypeParam>(code, codes, absmax, blocksize), expected)) << blocksize; });
    if (blocksize < 32) continue;
    for (const auto type : kFormats) {
      for (size_t i = 0; i < expected.size(); ++i)
        expected[i] = of(reference::value_of(type, reference::nibble(codes, i)), absmax[i / static_cast<size_t>(blocksize)]);
      for_each_isa([&] { EXPECT_TRUE(same(run_dequantize_4bit<TypeParam>(type, codes, absmax, n, blocksize), expected)) << name(type); });
    }
  }
}
#endif

// Independent of the midpoints: no other code is nearer than the chosen one, by more than the rounding of a midpoint; 0.0 stays 0.0.
TEST(BlockwiseMeaning, TheCodeIsTheNearest) {
  auto x = normals(21, 20000);
  for (size_t i = 0; i < x.size(); i += 3) x[i] *= std::ldexp(1.0f, -static_cast<int>(i % 40));
  for (size_t i = 0; i < x.size(); i += 101) x[i] = 0;
  for (const auto* name : {"dynamic", "dynamic unsigned", "linear", "normal", "fp8", "random"}) {
    const auto& code = maps().at(name);
    const bool has_zero = std::ranges::count(code, 0.0f) > 0;
    for_each_isa([&] {
      const auto q = run_quantize_blockwise<float>(code, x, 256);
      for (size_t i = 0; i < x.size(); ++i) {
        const double t = double{x[i]} / double{q.absmax[i / 256]}, chosen = std::fabs(code[q.codes[i]] - t);
        double least = 2;
        for (const float v : code) least = std::min(least, std::fabs(v - t));
        ASSERT_LE(chosen, least + 0x1p-22 * std::fabs(t)) << name << " element " << i;
        ASSERT_TRUE(!has_zero || x[i] != 0 || code[q.codes[i]] == 0) << name << " element " << i;
      }
    });
  }
}

// The same call with many maps in turn, from several threads at once under the pool: encoders are kept between calls.
TEST(BlockwiseMeaning, MapsDoNotMix) {
  const auto x = waves<float>(4, 5000);
  for (int round = 0; round < 3; ++round)
    for (uint64_t seed = 0; seed < 12; ++seed) {
      auto code = normals(seed, 256);
      std::ranges::sort(code);
      EXPECT_QUANTIZED(run_quantize_blockwise<float>(code, x, 256), reference::quantize_blockwise(reference::Nearest(code), x, 256));
    }
}

RC_GTEST_PROP(BlockwiseProperty, AnyBitsAnyMap, ()) {
  const auto n = *rc::gen::inRange<int64_t>(0, 700);
  const auto seed = *rc::gen::arbitrary<uint64_t>();
  const auto blocksize = *rc::gen::elementOf(std::vector<int64_t>(std::begin(kBlocksizes), std::end(kBlocksizes)));
  std::vector<float> code, x;
  for (uint64_t i = 0; code.size() < 256; ++i)
    if (const auto v = from_bits<float>(random(seed, i)); !std::isnan(v)) code.push_back(v);
  std::ranges::sort(code);
  for (int64_t i = 0; i < n; ++i) x.push_back(from_bits<float>(random(seed + 1, static_cast<uint64_t>(i))));
  const auto expected = reference::quantize_blockwise(reference::Nearest(code), x, blocksize);
  for (const auto isa : supported_isas()) {
    const ForcedIsa forced(isa);
    const auto actual = run_quantize_blockwise<float>(code, x, blocksize);
    require(same(actual.codes, expected.codes), std::string(isa) + " codes");
    require(same(actual.absmax, expected.absmax), std::string(isa) + " absmax");
  }
}

}  // namespace
}  // namespace bnb::test
