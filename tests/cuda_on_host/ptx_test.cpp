// The instructions of ptx.h against plain references.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "cases/cases.h"
#include "cuda/device/ptx.cuh"

namespace bnb::cuda {
namespace {

dev::Launch one_warp(uint32_t shared = 0) { return {.op = "ptx", .grid = {1}, .threads = 32, .shared = shared}; }

// ---- d = c + a b with a 16x16, b 16x8 from shared memory; a by load_matrices or by the layout that ptx.cuh gives

struct Tile {
  alignas(16) uint16_t a[16][16], b[16][8];
};
template <class T, bool by_matrix> BNB_KERNEL(32, 1) multiply(const Tile* tile, const float* c, float* d) {
  auto& s = dev::shared<Tile>();
  if (dev::thread() == 0) s = *tile;
  dev::barrier();
  const unsigned g = dev::lane() / 4, t = dev::lane() % 4 * 2, i = dev::lane();
  const auto pair = [](uint16_t low, uint16_t high) { return low | uint32_t{high} << 16; };
  uint32_t a[4], b[2];
  if constexpr (by_matrix) {
    dev::load_matrices(a, &s.a[i % 16][i / 16 * 8]);
  } else {
    for (unsigned r = 0; r < 4; ++r) a[r] = pair(s.a[g + r % 2 * 8][t + r / 2 * 8], s.a[g + r % 2 * 8][t + r / 2 * 8 + 1]);
  }
  for (unsigned r = 0; r < 2; ++r) b[r] = pair(s.b[t + r * 8][g], s.b[t + r * 8 + 1][g]);
  float sum[4];
  for (unsigned r = 0; r < 4; ++r) sum[r] = c[(g + r / 2 * 8) * 8 + t + r % 2];
  dev::mma<T>(sum, a, b);
  for (unsigned r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + t + r % 2] = sum[r];
}

template <class T> void check_multiply() {
  if constexpr (dev::kHasMma<T>) {
    Tile tile;
    std::vector<float> a, b, c(128), expected(128);
    for (int i = 0; i < 256; ++i) a.push_back(static_cast<float>(test::random(1, static_cast<uint64_t>(i)) % 17) - 8);
    for (int i = 0; i < 128; ++i) b.push_back(static_cast<float>(test::random(2, static_cast<uint64_t>(i)) % 15) - 7);
    for (int i = 0; i < 256; ++i) tile.a[i / 16][i % 16] = reference::rounded<T>(a[static_cast<size_t>(i)]).bits;
    for (int i = 0; i < 128; ++i) tile.b[i / 8][i % 8] = reference::rounded<T>(b[static_cast<size_t>(i)]).bits;
    for (size_t i = 0; i < 128; ++i) {
      c[i] = static_cast<float>(i);
      expected[i] = c[i];
      for (size_t k = 0; k < 16; ++k) expected[i] += a[i / 8 * 16 + k] * b[k * 8 + i % 8];
    }
    emulator::for_each_order([&](emulator::Order) {
      for (auto* kernel : {multiply<T, false>, multiply<T, true>}) {
        std::vector<float> d(128);
        dev::launch(one_warp(sizeof(Tile)), kernel, &tile, c.data(), d.data());
        EXPECT_EQ(d, expected);
      }
    });
  }
}
TEST(Ptx, Mma) {
  check_multiply<Half>();
  check_multiply<BFloat16>();
  static_assert(dev::kHasMma<Half> && dev::kHasMma<BFloat16> == (BNB_ARCH >= 80) && !dev::kHasMma<float>);
}

BNB_KERNEL(32, 1) multiply_s8(const int8_t* a, const int8_t* b, int32_t* d) {  // a 16x32 in rows, b 32x8 in columns
  const unsigned g = dev::lane() / 4, t = dev::lane() % 4 * 4;
  uint32_t fa[4], fb[2];
  for (unsigned r = 0; r < 4; ++r) std::memcpy(&fa[r], a + (g + r % 2 * 8) * 32 + t + r / 2 * 16, 4);
  for (unsigned r = 0; r < 2; ++r) std::memcpy(&fb[r], b + g * 32 + t + r * 16, 4);
  int32_t sum[4] = {1, 2, 3, 4};
  dev::mma_s8(sum, fa, fb);
  for (unsigned r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + dev::lane() % 4 * 2 + r % 2] = sum[r] - static_cast<int32_t>(r + 1);
}
TEST(Ptx, MmaOfBytes) {
  const auto bytes = test::random_bytes(5, 768);
  const auto* a = reinterpret_cast<const int8_t*>(bytes.data());
  const auto* b = a + 512;
  emulator::for_each_order([&](emulator::Order) {
    std::vector<int32_t> d(128);
    dev::launch(one_warp(), multiply_s8, a, b, d.data());
    for (int i = 0; i < 128; ++i)
      EXPECT_EQ(d[static_cast<size_t>(i)], std::inner_product(a + i / 8 * 32, a + i / 8 * 32 + 32, b + i % 8 * 32, 0));
  });
}

BNB_KERNEL(32, 1) matrices(uint32_t* out) {
  auto& s = dev::shared<uint16_t[32][8]>();
  for (int i = 0; i < 8; ++i) s[dev::thread()][i] = static_cast<uint16_t>(dev::thread() * 8 + i);
  dev::barrier();
  uint32_t r[4];
  dev::load_matrices(r, s[dev::thread()]);
  for (int i = 0; i < 4; ++i) out[i * 32 + dev::lane()] = r[i];
}
TEST(Ptx, LoadMatrices) {
  std::vector<uint32_t> out(128);
  dev::launch(one_warp(512), matrices, out.data());
  for (uint32_t i = 0; i < out.size(); ++i) {
    const uint32_t element = i / 32 * 64 + i % 32 / 4 * 8 + i % 4 * 2;
    EXPECT_EQ(out[i], element | (element + 1) << 16);
  }
}

// ---- pure functions

template <class T> void check_conversions() {
  for (const T x : test::patterns<T>(0)) EXPECT_EQ(dev::to_float(x), reference::to_float(x));
  EXPECT_EQ(dev::round_to<T>(NAN).bits, 0x7fff);
  for (uint64_t i = 0; i < 200000; ++i) {
    // every exponent, and mantissas at and next to ties
    const uint64_t r = test::random(9, i), fraction = i % 3 ? r & 0x7fffff : (r & 0x7ff000) + (r >> 30) % 3 - 1;
    const float x = dev::bits_float(static_cast<uint32_t>((r >> 40 & 0x1ff) << 23 | (fraction & 0x7fffff)));
    if (std::isnan(x)) continue;
    const auto expected = reference::rounded<T>(x).bits;
    ASSERT_EQ(dev::round_to<T>(x).bits, expected) << x;
    const uint32_t packed = dev::pack<T>(x, -x);
    ASSERT_EQ(packed, expected | uint32_t(expected ^ 0x8000) << 16);
    float low, high;
    dev::unpack<T>(packed, low, high);
    ASSERT_TRUE(low == reference::to_float(T{expected}) && high == -low) << x;
  }
}
TEST(Ptx, Conversions) {
  check_conversions<Half>();
  check_conversions<BFloat16>();
}

// fma_up is the least float that is not below a b + c, in a format that holds the sum exactly.
TEST(Ptx, FmaUp) {
  const auto below = [](float r, float a, float b, float c) { return static_cast<__float128>(r) < static_cast<__float128>(a) * b + c; };
  for (uint64_t i = 0; i < 100000; ++i) {
    const auto number = [&](uint64_t seed) {
      const uint64_t r = test::random(seed, i);
      return std::ldexp(static_cast<float>(r >> 40) - 0x1p23f, static_cast<int>(r % 40) - 40);
    };
    const float a = number(1), b = number(2), c = number(3), r = dev::fma_up(a, b, c);
    ASSERT_FALSE(below(r, a, b, c)) << a << " " << b << " " << c;
    ASSERT_TRUE(below(std::nextafter(r, -INFINITY), a, b, c)) << a << " " << b << " " << c;
  }
  EXPECT_EQ(dev::fma_up(-0x1p-149f, 15.5f, 1.0f), 1.0f);
  EXPECT_EQ(dev::fma_up(0x1p-149f, 15.5f, 1.0f), 1.0f + 0x1p-23f);
}

TEST(Ptx, NaNsHaveTheBitsOfTheDevice) {
  const float inf = INFINITY;
  for (const float x : {dev::mul(0, inf), dev::mul(-NAN, 1), dev::add(inf, -inf), dev::div(0, 0), dev::fma(0, inf, 1),
                        dev::fma_up(NAN, 1, 1), dev::reciprocal(NAN), dev::to_float(Half{0xfe01})})
    EXPECT_EQ(dev::float_bits(x), 0x7fffffffu);
  EXPECT_EQ(dev::reciprocal(inf), 0);
  EXPECT_EQ(dev::float_bits(dev::div(1, -inf)), 0x80000000u);
}

TEST(Ptx, Integers) {
  EXPECT_EQ(dev::permute(0x33221100, 0x77665544, 0x7410), 0x77441100u);
  EXPECT_EQ(dev::permute(0x000000f0, 0x00000070, 0x40c8), 0x70f000ffu) << "a selector with bit 3 repeats the sign";
  EXPECT_EQ(dev::popcount(0x8000000100000003), 4u);
  EXPECT_EQ(dev::count_above(7, 1, 1), 7u);
  EXPECT_EQ(dev::count_above(7, std::nextafter(1.0f, 2.0f), 1), 8u);
  EXPECT_EQ(dev::count_above(7, NAN, INFINITY), 8u);
  EXPECT_EQ(dev::max_halves<BFloat16>(0x00017fff, 0x7f800002), 0x7f807fffu);
}

}  // namespace
}  // namespace bnb::cuda
