// Every 16-bit pattern, and a hundred million random fp32 values once per instruction set.
#include "cases/cases.h"

namespace bnb::test {
namespace {

template <class T> class EveryPattern : public ::testing::Test {};
using NarrowTypes = ::testing::Types<Half, BFloat16>;
TYPED_TEST_SUITE(EveryPattern, NarrowTypes, TypeNames);

// Every finite pattern: in order (neighbours share a block), shuffled (any two may), and against each largest magnitude of a few.
TYPED_TEST(EveryPattern, Quantizes4bit) {
  std::vector<std::vector<TypeParam>> inputs = {patterns<TypeParam>(0), patterns<TypeParam>(12345), patterns<TypeParam>(777)};
  for (const float scale : {0.6f, 1.0f, 1.7f, 300.0f, 0.003f}) {
    auto& x = inputs.emplace_back();
    for (const TypeParam v : patterns<TypeParam>(0)) {
      if (!(std::fabs(to_double(v)) <= scale)) continue;
      if (x.size() % 64 == 0) x.push_back(rounded<TypeParam>(scale));
      x.push_back(v);
    }
  }
  for (const auto& x : inputs) {
    const auto floats = to_floats(x);
    for (const auto type : kFormats)
      for (const int64_t blocksize : kBlocksizes) {
        const auto expected = reference::quantize_4bit(type, floats, blocksize);
        SCOPED_TRACE(std::string(name(type)) + " " + std::to_string(blocksize));
        for_each_isa([&] { EXPECT_QUANTIZED(run_quantize_4bit(type, x, blocksize), expected); });
      }
  }
}

// The helpers of the tests themselves: there and back is the identity, and the neighbours of a tie round to even.
TYPED_TEST(EveryPattern, ConvertsThereAndBack) {
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) {
    const auto x = from_bits<TypeParam>(bits);
    const double v = to_double(x);
    if (std::isnan(v)) continue;
    ASSERT_EQ(rounded<TypeParam>(v).bits, bits);
    const double next = to_double(from_bits<TypeParam>(bits + 1));
    if (!std::isfinite(next) || std::signbit(next) != std::signbit(v)) continue;
    const double middle = (v + next) / 2;
    ASSERT_EQ(rounded<TypeParam>(middle).bits, bits + (bits & 1));
    ASSERT_EQ(rounded<TypeParam>(middle * (1 + 1e-12)).bits, bits + 1);
    ASSERT_EQ(rounded<TypeParam>(middle * (1 - 1e-12)).bits, bits);
  }
}

// Round r: even rounds uniform within [-s, s], which fills the upper codes; odd rounds octave by octave, which fills the lower ones.
std::vector<float> random_floats(uint64_t round, int64_t n) {
  if (round % 2) return waves<float>(round, n);
  std::vector<float> x(static_cast<size_t>(n));
  const float scale = std::ldexp(1.0f, static_cast<int>(round % 120) - 90);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(static_cast<int32_t>(random(round, i))) * scale;
  return x;
}

void for_each_round(const std::function<void(const std::vector<float>&)>& body) {
  const int64_t total = quick() ? 2'000'000 : 100'000'000, step = 1 << 20;
  for (int64_t done = 0, round = 0; done < total; done += step, ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    body(random_floats(static_cast<uint64_t>(round), step));
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(HundredMillionFloats, Quantize4bit) {
  for_each_round([](const std::vector<float>& x) {
    for (const auto type : kFormats) {
      const auto expected = reference::quantize_4bit(type, x, 64);
      for_each_isa([&] { EXPECT_QUANTIZED(run_quantize_4bit(type, x, 64), expected); });
    }
  });
}

TEST(HundredMillionFloats, QuantizeBlockwise) {
  const std::vector<float> codes[] = {create_dynamic_map(), create_dynamic_map(false)};
  const reference::Nearest nearest[] = {reference::Nearest(codes[0]), reference::Nearest(codes[1])};
  size_t which = 0;
  for_each_round([&](const std::vector<float>& x) {
    which = (which + 1) % 4;  // rounds 0 and 1 with one map, 2 and 3 with the other
    const auto expected = reference::quantize_blockwise(nearest[which / 2], x, 256);
    for_each_isa([&] { EXPECT_QUANTIZED(run_quantize_blockwise<float>(codes[which / 2], x, 256), expected); });
  });
}

}  // namespace
}  // namespace bnb::test
