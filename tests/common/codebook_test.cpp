// The makers of code maps: what must hold for any arguments. Their values are checked in golden_test.cpp.
#include <algorithm>

#include "cases/cases.h"

namespace bnb::test {
namespace {

void expect_map(const std::vector<float>& map, bool is_signed) {
  ASSERT_EQ(map.size(), 256u);
  EXPECT_TRUE(std::ranges::is_sorted(map));
  EXPECT_NE(std::ranges::find(map, 0.0f), map.end());
  EXPECT_EQ(map.back(), 1.0f);
  EXPECT_GE(map.front(), is_signed ? -1.0f : 0.0f);
  for (const float v : map) EXPECT_TRUE(std::isfinite(v));
}

void expect_linear(const std::vector<float>& map, bool is_signed, bool has_zero) {
  ASSERT_EQ(map.size(), 256u);
  EXPECT_TRUE(std::ranges::is_sorted(map));
  EXPECT_EQ(std::ranges::find(map, 0.0f) != map.end(), has_zero);
  EXPECT_EQ(map.front(), is_signed ? -1.0f : 0.0f);
  EXPECT_EQ(map.back(), 1.0f);
}

TEST(Codebook, ValuesOfFormats) {
  for (const auto type : kFormats)
    for (int code = 0; code < 16; ++code) {
      const float value = values_of(type)[static_cast<size_t>(code)], expected = reference::value_of(type, code);
      EXPECT_EQ(std::bit_cast<uint32_t>(value), std::bit_cast<uint32_t>(expected)) << name(type) << " " << code;
    }
}

TEST(Codebook, DynamicMaps) {
  for (int bits = 2; bits <= 8; ++bits)
    for (int exponent = 1; exponent <= 8; ++exponent) {
      SCOPED_TRACE(std::to_string(exponent) + " of " + std::to_string(bits));
      expect_map(create_dynamic_map(true, exponent, bits), true);
    }
  for (int bits = 2; bits <= 8; ++bits) expect_map(create_dynamic_map(false, bits - 1, bits), false);
}

// arXiv 2110.02861: means of adjacent points of linspace(0.1, 1, .) times powers of ten.
TEST(Codebook, DynamicMapByItsDefinition) {
  for (const bool is_signed : {true, false}) {
    std::vector<double> expected = {0, 1};
    for (int i = 0; i < 7; ++i) {
      const int count = 1 << (i + !is_signed);
      for (int j = 0; j < count; ++j) {
        const double low = 0.1 + 0.9 * j / count, high = 0.1 + 0.9 * (j + 1) / count, value = (low + high) / 2 * std::pow(10, i - 6);
        expected.push_back(value);
        if (is_signed) expected.push_back(-value);
      }
    }
    std::ranges::sort(expected);
    const auto map = create_dynamic_map(is_signed);
    ASSERT_EQ(map.size(), expected.size());
    for (size_t i = 0; i < map.size(); ++i) EXPECT_NEAR(map[i], expected[i], 2e-7 * std::fabs(expected[i])) << i;
  }
}

TEST(Codebook, OtherMaps) {
  for (const bool add_zero : {true, false}) {  // with fewer bits the zeros go to the middle, wherever that is, as in the released package
    expect_linear(create_linear_map(true, 8, add_zero), true, add_zero);
    expect_linear(create_linear_map(false, 8, add_zero), false, true);
  }
  for (const double offset : {0.9, 0.9677083, 0.99})
    for (const bool extra : {true, false}) expect_map(create_normal_map(offset, extra), true);
  for (int exponent = 1; exponent <= 6; ++exponent) {
    SCOPED_TRACE("fp8, " + std::to_string(exponent) + " bits of exponent");
    expect_map(create_fp8_map(true, exponent, 7 - exponent), true);
    expect_map(create_fp8_map(false, exponent, 8 - exponent), false);
  }
}

// The least splits of bits: one exponent or none, all bits a linear fraction.
TEST(Codebook, SmallestSplits) {
  for (const auto& map : {create_dynamic_map(true, 1, 1), create_dynamic_map(true, 0, 1), create_dynamic_map(false, 0, 1)}) {
    EXPECT_EQ(std::ranges::count(map, 0.0f), 255);
    EXPECT_EQ(map.back(), 1.0f);
  }
  const auto map = create_fp8_map(false, 0, 8, 8);
  for (int i = 0; i < 256; ++i) EXPECT_NEAR(map[static_cast<size_t>(i)], i / 255.0, 1e-7) << i;
}

TEST(Codebook, FourBitMapsByName) {
  for (const auto* map : {"nf4", "fp4", "int4", "af4"}) {
    const auto values = create_4bit_map(map);
    ASSERT_EQ(values.size(), 16u);
    EXPECT_EQ(std::fabs(*std::ranges::max_element(values, {}, [](float v) { return std::fabs(v); })), 1.0f);
  }
  try {
    create_4bit_map("nf5");
    FAIL() << "nf5 was accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Errc::invalid_argument);
    for (const auto* word : {"nf5", "nf4", "fp4", "int4", "af4"})
      EXPECT_NE(std::string(e.what()).find(word), std::string::npos) << e.what();
  }
}

TEST(Codebook, ImpossibleArguments) {
  EXPECT_THROW(create_dynamic_map(true, 7, 9), Error);
  EXPECT_THROW(create_dynamic_map(true, 7, 0), Error);
  EXPECT_THROW(create_dynamic_map(true, -1, 8), Error);
  EXPECT_THROW(create_linear_map(true, 9), Error);
  EXPECT_THROW(create_linear_map(true, 0), Error);
  EXPECT_THROW(create_normal_map(1.5), Error);
  EXPECT_THROW(create_normal_map(std::nan("")), Error);
  EXPECT_THROW(create_fp8_map(true, 5, 5, 8), Error);
  EXPECT_THROW(create_fp8_map(true, -1, 8, 8), Error);
  EXPECT_THROW(create_fp8_map(true, 5, 2, 9), Error);
  EXPECT_THROW(create_fp8_map(false, 7, -6, 1), Error);  // more bits of exponent than there are
}

}  // namespace
}  // namespace bnb::test
