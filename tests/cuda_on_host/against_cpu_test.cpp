// What the CPU's tests do not cover: the bytes of NaN and infinity, which must be those of the CPU, and large inputs.
#include <bnb/cuda.h>
#include <gtest/gtest.h>

#include <cmath>

#include "cases/cases.h"

namespace bnb::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T> class AgainstCpu : public ::testing::Test {};
TYPED_TEST_SUITE(AgainstCpu, AllTypes, TypeNames);

// Numbers of all kinds, with NaN and infinity in few of the blocks.
template <class T> std::vector<T> wild(uint64_t seed, int64_t n) {
  auto x = waves<T>(seed, n);
  for (size_t i = 0; i < x.size(); ++i) {
    const uint64_t r = random(seed + 7, i);
    if (r % 301 == 0) x[i] = from_bits<T>(r >> 20);
    if (r % 997 == 1) x[i] = rounded<T>(r >> 32 & 1 ? kInf : -kInf);
    if (r % 997 == 2) x[i] = rounded<T>(r >> 32 & 1 ? NAN : -NAN);
  }
  return x;
}

TYPED_TEST(AgainstCpu, QuantizesWildNumbers) {
  std::vector<float> random_map = normals(3, 256);
  std::ranges::sort(random_map);
  for (const int64_t n : {997, 40001, 100003})
    for (const int64_t blocksize : {32, 64, 256, 1024, 4096}) {
      const auto x = wild<TypeParam>(static_cast<uint64_t>(n), n);
      std::vector<uint8_t> codes(x.size());
      std::vector<float> absmax(x.size() / 32 + 1);
      const auto expect = [&](auto on_cpu, auto on_device, auto d, size_t bytes) {
        d.blocksize = blocksize;
        d.x = std::span(x);
        d.codes = codes;
        d.absmax = absmax;
        on_cpu(d);
        const std::vector<uint8_t> cpu_codes(codes.begin(), codes.begin() + static_cast<std::ptrdiff_t>(bytes));
        const std::vector<float> cpu_absmax(absmax.begin(), absmax.begin() + blocks_of(n, blocksize));
        for_each_isa([&] {
          Output<uint8_t> got_codes(static_cast<int64_t>(bytes));
          Output<float> got_absmax(blocks_of(n, blocksize));
          d.codes = got_codes.span();
          d.absmax = got_absmax.span();
          on_device(d);
          EXPECT_TRUE(same(got_codes.values(), cpu_codes));
          EXPECT_TRUE(same(got_absmax.values(), cpu_absmax));
        });
      };
      SCOPED_TRACE(std::to_string(n) + " in blocks of " + std::to_string(blocksize));
      for (const auto type : kFormats)
        expect(bnb::quantize_4bit, test::quantize_4bit, Quantize4bit{.type = type}, static_cast<size_t>(packed_size(n)));
      for (const auto& map : {create_dynamic_map(), create_dynamic_map(false), create_linear_map(), random_map})
        expect(bnb::quantize_blockwise, test::quantize_blockwise, QuantizeBlockwise{.code = map}, static_cast<size_t>(n));
    }
}

// Including the bytes of NaN: signs and payloads that the device's arithmetic drops.
TYPED_TEST(AgainstCpu, DequantizesWildAbsmax) {
  std::vector<float> absmax = {0, -0.0f, 1, kInf, -kInf, 0x1p-149f, 3.4e38f, 65520, NAN, -NAN, -1, 1e-40f};
  for (const uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7fc12345u, 0xff800001u, 0x7fffffffu, 0x7f801fffu})
    absmax.push_back(std::bit_cast<float>(nan));
  const int64_t n = static_cast<int64_t>(absmax.size()) * 64 - 5;
  const auto codes = random_bytes(12, n);
  std::vector<float> map = create_dynamic_map(), wild_map = map;
  wild_map[3] = kInf;
  wild_map[77] = -kInf;
  wild_map[200] = 3e38f;
  const auto expect = [&](auto on_cpu, auto on_device, auto d) {
    std::vector<TypeParam> cpu(static_cast<size_t>(n));
    d.blocksize = 64;
    d.codes = codes;
    d.absmax = absmax;
    d.out = std::span(cpu);
    on_cpu(d);
    for_each_isa([&] {
      Output<TypeParam> out(n);
      d.out = out.view();
      on_device(d);
      EXPECT_TRUE(same(out.values(), cpu));
    });
  };
  for (const auto type : kFormats) expect(bnb::dequantize_4bit, test::dequantize_4bit, Dequantize4bit{.type = type});
  for (const auto& m : {map, wild_map}) expect(bnb::dequantize_blockwise, test::dequantize_blockwise, DequantizeBlockwise{.code = m});
}

}  // namespace
}  // namespace bnb::test
