// quantize_4bit and dequantize_4bit: every instruction set against the plain rule, bit by bit.
#include "cases/cases.h"

namespace bnb::test {
namespace {

template <class T> class FourBit : public ::testing::Test {
 public:
  // Codes and absmax of every instruction set, under every format.
  static void check_quantize(const std::vector<T>& x, int64_t blocksize, size_t offset = 0) {
    const auto floats = to_floats(x);
    for (const auto type : kFormats) {
      SCOPED_TRACE(std::string(name(type)) + ", " + std::to_string(x.size()) + " elements in blocks of " + std::to_string(blocksize));
      const auto expected = reference::quantize_4bit(type, std::span<const float>(floats), blocksize);
      for_each_isa([&] { EXPECT_QUANTIZED(run_quantize_4bit(type, x, blocksize, offset), expected); });
    }
  }

  static void check_dequantize(const std::vector<uint8_t>& codes, const std::vector<float>& absmax, int64_t n, int64_t blocksize,
                               size_t offset = 0) {
    for (const auto type : kFormats) {
      SCOPED_TRACE(std::string(name(type)) + ", " + std::to_string(n) + " elements in blocks of " + std::to_string(blocksize));
      const auto expected = reference::dequantize_4bit<T>(type, codes, absmax, static_cast<size_t>(n), blocksize);
      for_each_isa([&] { EXPECT_TRUE(same(run_dequantize_4bit<T>(type, codes, absmax, n, blocksize, offset), expected)); });
    }
  }
};
TYPED_TEST_SUITE(FourBit, AllTypes, TypeNames);

TYPED_TEST(FourBit, QuantizesEverySize) {
  for (const int64_t n : kSizes)
    for (const int64_t blocksize : kBlocksizes) this->check_quantize(waves<TypeParam>(static_cast<uint64_t>(n), n), blocksize);
}

TYPED_TEST(FourBit, QuantizesEveryShortTail) {
  for (int64_t n = 1; n <= 130; ++n) this->check_quantize(waves<TypeParam>(7, n), 64);
}

TYPED_TEST(FourBit, DequantizesEverySize) {
  for (const int64_t n : kSizes)
    for (const int64_t blocksize : kBlocksizes)
      this->check_dequantize(random_bytes(1, packed_size(n)), random_absmax(2, blocks_of(n, blocksize)), n, blocksize);
}

TYPED_TEST(FourBit, DequantizesEveryShortTail) {
  for (int64_t n = 1; n <= 130; ++n) this->check_dequantize(random_bytes(3, packed_size(n)), random_absmax(4, blocks_of(n, 64)), n, 64);
}

// Outputs beyond the size from which kernels write past the caches, aligned as that needs it and not.
TYPED_TEST(FourBit, DequantizesLargeOutputs) {
  const int64_t n = (int64_t{5} << 20) + 33;
  const auto codes = random_bytes(5, packed_size(n));
  const auto absmax = random_absmax(6, blocks_of(n, 64));
  const auto expected = reference::dequantize_4bit<TypeParam>(QuantType::nf4, codes, absmax, static_cast<size_t>(n), 64);
  for_each_isa([&] {
    std::vector<TypeParam> out(static_cast<size_t>(n) + 64);
    for (const size_t shift : {size_t{0}, size_t{1}, size_t{31}}) {
      const size_t first = (64 - reinterpret_cast<uintptr_t>(out.data()) % 64) / sizeof(TypeParam) % 32 + shift;
      const std::span<TypeParam> part(out.data() + first, static_cast<size_t>(n));
      std::ranges::fill(part, TypeParam{});
      dequantize_4bit({.type = QuantType::nf4, .blocksize = 64, .codes = codes, .absmax = absmax, .out = part});
      EXPECT_TRUE(same(std::vector<TypeParam>(part.begin(), part.end()), expected)) << "shift " << shift;
    }
  });
}

TYPED_TEST(FourBit, NoAlignmentIsDemanded) {
  for (const size_t offset : {1, 2, 3, 5, 31}) {
    SCOPED_TRACE("offset " + std::to_string(offset));
    this->check_quantize(waves<TypeParam>(8, 4097), 64, offset);
    this->check_dequantize(random_bytes(9, 2049), random_absmax(10, 65), 4097, 64, offset);
  }
}

// t one float below, on and above every threshold: a block whose largest element is 1 leaves t = x.
TYPED_TEST(FourBit, DecidesAtThresholds) {
  std::vector<float> points = {0, -0.0f, 1, -1, 0x1p-149f, -0x1p-149f, 0x1p-126f, -0x1p-126f};
  for (const double threshold : reference::kNf4Thresholds) points.push_back(static_cast<float>(threshold));
  for (const auto& step : reference::kFp4Steps) points.insert(points.end(), {step.threshold, -step.threshold});
  for (const auto type : kFormats)
    for (int code = 0; code < 16; ++code) points.push_back(reference::value_of(type, code));
  for (size_t i = points.size(); i-- > 0;) points.insert(points.end(), {std::nextafter(points[i], 2.0f), std::nextafter(points[i], -2.0f)});
  std::erase_if(points, [](float v) { return std::fabs(v) > 1; });
  for (const float scale : {1.0f, -1.0f, 0x1p-100f, 0x1p100f}) {
    std::vector<TypeParam> x;
    for (const float v : points) {
      if (x.size() % 32 == 0) x.push_back(rounded<TypeParam>(scale));
      x.push_back(rounded<TypeParam>(v * scale));
    }
    this->check_quantize(x, 32);
  }
}

// One kind of block after another, between ordinary ones.
TYPED_TEST(FourBit, SpecialBlocks) {
  constexpr float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<std::vector<float>> kinds = {{0},
                                                 {-0.0f, 0},
                                                 {nan},
                                                 {-nan, 1, 0},
                                                 {1, 2, nan},
                                                 {inf},
                                                 {-inf, 1, -1, 0, -0.0f},
                                                 {inf, nan, -inf},
                                                 {1e-38f},
                                                 {-9.9e-39f, 5e-39f},
                                                 {0x1p-149f, 0},
                                                 {0x1p-149f, -0x1p-149f},
                                                 {0x1p-126f, 1e-39f},
                                                 {0x1p-24f, -0x1p-24f, 0x1p-23f},
                                                 {3.4e38f},
                                                 {-3.4e38f, 1e30f, -1e-30f, 1e-45f},
                                                 {65504, -65504, 1}};
  for (const int64_t blocksize : {int64_t{32}, int64_t{64}, int64_t{4096}}) {
    for (size_t place = 0; place < 32; place += 5) {
      std::vector<TypeParam> x;
      for (const auto& kind : kinds)
        for (const float fill : {0.0f, kind[0] == 0 ? 0.0f : 0.3f}) {
          std::vector<TypeParam> block(static_cast<size_t>(blocksize), rounded<TypeParam>(fill));
          for (size_t i = 0; i < kind.size(); ++i) block[(place + i * 2) % 32] = rounded<TypeParam>(kind[i]);
          x.insert(x.end(), block.begin(), block.end());
        }
      this->check_quantize(x, blocksize);
      x.resize(x.size() - 3);  // the end of the last block takes another path
      this->check_quantize(x, blocksize);
    }
  }
}

// Every NaN gives the same absmax, whatever its sign and payload.
TYPED_TEST(FourBit, EveryNaN) {
  constexpr Layout f = layout_of<TypeParam>;
  std::vector<TypeParam> x;
  for (const uint64_t payload : {1, 2, 1 << (f.mantissa - 1), (1 << f.mantissa) - 1})
    for (const uint64_t sign : {0, 1}) {
      x.resize(x.size() + 32, rounded<TypeParam>(0.5));
      x[x.size() - 9] = from_bits<TypeParam>(sign << (8 * sizeof(TypeParam) - 1) | static_cast<uint64_t>(f.full) << f.mantissa | payload);
    }
  this->check_quantize(x, 32);
}

TYPED_TEST(FourBit, DequantizesSpecialAbsmax) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> absmax = {0,     -0.0f,      1,     inf,   0x1p-149f, 0x1p-126f, 1e-39f, 3.4e38f,
                                     65504, 65519.996f, 65520, 1e-7f, 6e-8f,     2.98e-8f,  -1};
  this->check_dequantize(random_bytes(11, static_cast<int64_t>(absmax.size()) * 32), absmax, static_cast<int64_t>(absmax.size()) * 64, 64);
  for_each_isa([&] {  // the payload of a NaN is left to the machine
    for (const auto type : kFormats)
      for (const TypeParam y : run_dequantize_4bit<TypeParam>(type, random_bytes(12, 17), {std::nanf("")}, 33, 64))
        EXPECT_TRUE(std::isnan(to_double(y)));
  });
}

// Every product value * absmax that rounds to 16 bits at a tie or next to one.
TYPED_TEST(FourBit, DequantizeRoundsOnce) {
  std::vector<float> absmax;
  for (uint32_t i = 0; i < 4096; ++i) {
    const uint32_t exponent = 100 + i % 56;
    absmax.push_back(std::bit_cast<float>(exponent << 23 | (i * 0x1000 & 0x7ff000) | (i % 3 == 0 ? 0 : i % 3 == 1 ? 1 : 0xfff)));
  }
  std::vector<uint8_t> codes(absmax.size() * 16);
  for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>((i * 2 % 16) << 4 | ((i * 2 + 1) % 16));
  this->check_dequantize(codes, absmax, static_cast<int64_t>(codes.size()) * 2, 32);
}

TYPED_TEST(FourBit, DoesNotDependOnThreads) {
  const auto x = waves<TypeParam>(13, 300001);
  for_each_isa([&] {
    const auto expected = run_quantize_4bit(QuantType::nf4, x, 64);
    const auto back = run_dequantize_4bit<TypeParam>(QuantType::nf4, expected.codes, expected.absmax, 300001, 64);
    for_each_schedule([&](std::string_view schedule) {
      SCOPED_TRACE(schedule);
      EXPECT_QUANTIZED(run_quantize_4bit(QuantType::nf4, x, 64), expected);
      EXPECT_TRUE(same(run_dequantize_4bit<TypeParam>(QuantType::nf4, expected.codes, expected.absmax, 300001, 64), back));
    });
  });
}

// What was quantized and decoded quantizes to the same bytes again.
RC_GTEST_PROP(FourBitProperty, DecodedValuesKeepTheirCodes, ()) {
  const auto n = *rc::gen::inRange<int64_t>(0, 2000);
  const auto blocksize = *rc::gen::elementOf(std::vector<int64_t>(std::begin(kBlocksizes), std::end(kBlocksizes)));
  const auto x = normals(*rc::gen::arbitrary<uint64_t>(), n);
  const auto isa = *rc::gen::elementOf(supported_isas());
  const ForcedIsa forced(isa);
  const auto first = run_quantize_4bit(QuantType::nf4, x, blocksize);
  const auto decoded = run_dequantize_4bit<float>(QuantType::nf4, first.codes, first.absmax, n, blocksize);
  // The largest of a block is code 0 or 15 and decodes to itself, so absmax stays.
  const auto second = run_quantize_4bit(QuantType::nf4, decoded, blocksize);
  RC_ASSERT(second.codes == first.codes);
  RC_ASSERT(second.absmax == first.absmax);
}

// Any size, any cut, any offset, random bits (NaN and Inf among them) against the rule.
RC_GTEST_PROP(FourBitProperty, AnyBitsAnySize, ()) {
  const auto n = *rc::gen::inRange<int64_t>(0, 700);
  const auto blocksize = *rc::gen::elementOf(std::vector<int64_t>(std::begin(kBlocksizes), std::end(kBlocksizes)));
  const auto offset = *rc::gen::inRange<size_t>(0, 65);
  const auto seed = *rc::gen::arbitrary<uint64_t>();
  const auto type = *rc::gen::element(QuantType::nf4, QuantType::fp4);
  const auto check = [&]<class T>(T) {
    std::vector<T> x;
    for (int64_t i = 0; i < n; ++i) x.push_back(from_bits<T>(random(seed, static_cast<uint64_t>(i))));
    const auto expected = reference::quantize_4bit(type, std::span<const float>(to_floats(x)), blocksize);
    for (const auto isa : supported_isas()) {
      const ForcedIsa forced(isa);
      const auto actual = run_quantize_4bit(type, x, blocksize, offset);
      require(same(actual.codes, expected.codes), std::string(isa) + " codes of " + std::string(name(dtype_of<T>)));
      require(same(actual.absmax, expected.absmax), std::string(isa) + " absmax of " + std::string(name(dtype_of<T>)));
    }
  };
  check(float{}), check(Half{}), check(BFloat16{});
}

}  // namespace
}  // namespace bnb::test
