// More elements than 31 bits count. Runs with BNB_SLOW_TESTS=1: about 7 GB of memory.
#include <sys/mman.h>

#include "cases/cases.h"

namespace bnb::test {
namespace {

constexpr int64_t kCount = (int64_t{1} << 31) + 64;
constexpr int64_t kPeriod = int64_t{1} << 20;  // elements after which inputs repeat; whole blocks

class Slow : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::getenv("BNB_SLOW_TESTS")) GTEST_SKIP() << "set BNB_SLOW_TESTS=1";
  }
};

// Pages that are there only once they are written.
template <class T> class Large {
 public:
  explicit Large(int64_t n) : size_(static_cast<size_t>(n)) {
    void* p = mmap(nullptr, size_ * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(p);
  }
  ~Large() { munmap(data_, size_ * sizeof(T)); }
  Large(const Large&) = delete;
  Large& operator=(const Large&) = delete;
  std::span<T> span() const { return {data_, size_}; }

 private:
  size_t size_;
  T* data_;
};

template <class T> void repeat(std::span<T> to, const std::vector<T>& period) {
  for (size_t i = 0; i < to.size(); i += period.size())
    std::memcpy(&to[i], period.data(), std::min(period.size(), to.size() - i) * sizeof(T));
}
template <class T>::testing::AssertionResult repeats(std::span<const T> actual, const std::vector<T>& period) {
  for (size_t i = 0; i < actual.size(); i += period.size())
    if (std::memcmp(&actual[i], period.data(), std::min(period.size(), actual.size() - i) * sizeof(T)) != 0)
      return ::testing::AssertionFailure() << "period from element " << i;
  return ::testing::AssertionSuccess();
}

TEST_F(Slow, FourBitThereAndBack) {
  const auto x = rounded_all<BFloat16>(normals(1, kPeriod));
  const auto expected = reference::quantize_4bit(QuantType::nf4, to_floats(x), 64);
  const auto decoded = reference::dequantize_4bit<BFloat16>(QuantType::nf4, expected.codes, expected.absmax, kPeriod, 64);
  const Large<BFloat16> values(kCount);
  const Large<uint8_t> codes(packed_size(kCount));
  const Large<float> absmax(blocks_of(kCount, 64));
  repeat(values.span(), x);
  quantize_4bit({.type = QuantType::nf4, .blocksize = 64, .x = values.span(), .codes = codes.span(), .absmax = absmax.span()});
  EXPECT_TRUE(repeats<uint8_t>(codes.span(), expected.codes));
  EXPECT_TRUE(repeats<float>(absmax.span(), expected.absmax));
  std::ranges::fill(values.span(), BFloat16{});
  dequantize_4bit({.type = QuantType::nf4, .blocksize = 64, .codes = codes.span(), .absmax = absmax.span(), .out = values.span()});
  EXPECT_TRUE(repeats<BFloat16>(values.span(), decoded));
}

TEST_F(Slow, BlockwiseThereAndBack) {
  const auto map = create_dynamic_map();
  const auto x = rounded_all<BFloat16>(normals(2, kPeriod));
  const auto expected = reference::quantize_blockwise(reference::Nearest(map), to_floats(x), 64);
  const auto decoded = reference::dequantize_blockwise<BFloat16>(map, expected.codes, expected.absmax, 64);
  const Large<BFloat16> values(kCount);
  const Large<uint8_t> codes(kCount);
  const Large<float> absmax(blocks_of(kCount, 64));
  repeat(values.span(), x);
  quantize_blockwise({.blocksize = 64, .code = map, .x = values.span(), .codes = codes.span(), .absmax = absmax.span()});
  EXPECT_TRUE(repeats<uint8_t>(codes.span(), expected.codes));
  EXPECT_TRUE(repeats<float>(absmax.span(), expected.absmax));
  std::ranges::fill(values.span(), BFloat16{});
  dequantize_blockwise({.blocksize = 64, .code = map, .codes = codes.span(), .absmax = absmax.span(), .out = values.span()});
  EXPECT_TRUE(repeats<BFloat16>(values.span(), decoded));
}

// A weight of more than 2^31 elements whose rows repeat: so must the columns of y.
TEST_F(Slow, Gemm) {
  constexpr int64_t k = 1024, n = kPeriod * 2 + 1, period = 1024;
  const auto codes_period = random_bytes(3, period * k / 2);
  const Large<uint8_t> codes(n * k / 2);
  const Large<float> absmax(n * k / 64);
  repeat(codes.span(), codes_period);
  std::ranges::fill(absmax.span(), 0.5f);
  for (const int64_t m : {1, 5}) {
    const auto a = rounded_all<BFloat16>(normals(5, m * k));
    const Large<BFloat16> out(m * n);
    const auto multiply = [&](int64_t columns, std::span<BFloat16> y) {
      gemm_4bit({.type = QuantType::nf4,
                 .blocksize = 64,
                 .m = m,
                 .n = columns,
                 .k = k,
                 .a = std::span(a),
                 .codes = codes.span(),
                 .absmax = {.values = absmax.span(), .codes = {}, .code = {}, .nested = {}},
                 .bias = {},
                 .out = y});
    };
    std::vector<BFloat16> expected(static_cast<size_t>(m * period));
    multiply(period, expected);
    multiply(n, out.span());
    for (int64_t i = 0; i < m; ++i)
      EXPECT_TRUE(repeats<BFloat16>(out.span().subspan(static_cast<size_t>(i * n), static_cast<size_t>(n)),
                                    {expected.begin() + i * period, expected.begin() + (i + 1) * period}));
  }
}

}  // namespace
}  // namespace bnb::test
