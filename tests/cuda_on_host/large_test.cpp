// Tensors of more than 2^32 elements and 2^33 bytes. Their memory is reserved, not committed: only the last blocks of each grid run, and
// their output must equal that of the same elements alone.
#include <sys/mman.h>

#include <algorithm>
#include <utility>

#include "cases/gemm_cases.h"
#include "cuda/device/device.cuh"
#include "cuda/gemm_4bit/gemm_4bit.h"

namespace bnb::test {
namespace {

// Zeros; a page is committed when it is written.
template <class T> class Reserved {
 public:
  explicit Reserved(int64_t n) : bytes_(static_cast<size_t>(n) * sizeof(T)) {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) throw std::runtime_error("no address space for " + std::to_string(bytes_) + " bytes");
    all_ = {static_cast<T*>(at), static_cast<size_t>(n)};
  }
  Reserved(int64_t n, const std::vector<T>& last) : Reserved(n) { std::ranges::copy(last, all_.end() - std::ssize(last)); }
  Reserved(const Reserved&) = delete;
  Reserved& operator=(const Reserved&) = delete;
  ~Reserved() { munmap(all_.data(), bytes_); }
  operator std::span<T>() const { return all_; }
  operator std::span<const T>() const { return all_; }
  std::span<T> all() const { return all_; }
  std::vector<T> last(int64_t n) const { return {all_.end() - n, all_.end()}; }

 private:
  size_t bytes_;
  std::span<T> all_;
};

// So many multiprocessors that each block has one tile; only the last few blocks run.
class HugeDevice {
 public:
  static cuda::dev::Device device() {
    auto device = cuda::dev::device();
    device.sms = 1 << 21;
    return device;
  }
  explicit HugeDevice(uint64_t blocks) : real_(std::exchange(cuda::dev::emulated, device())) { emulator::run_last_blocks(blocks); }
  ~HugeDevice() {
    cuda::dev::emulated = real_;
    emulator::run_last_blocks(UINT64_MAX);
  }
  HugeDevice(const HugeDevice&) = delete;
  HugeDevice& operator=(const HugeDevice&) = delete;

 private:
  cuda::dev::Device real_;
};

template <class T> class Large : public ::testing::Test {
 protected:
  static constexpr int64_t kTail = 10 * 4096 + 77, kSize = (int64_t{1} << 32) + kTail;
};
TYPED_TEST_SUITE(Large, AllTypes, TypeNames);

TYPED_TEST(Large, BlockQuantization) {
  const auto map = create_dynamic_map();
  const auto x = waves<TypeParam>(5, this->kTail);
  const Reserved<TypeParam> large(this->kSize, x);
  for (const int64_t blocksize : {64, 4096}) {
    SCOPED_TRACE("blocks of " + std::to_string(blocksize));
    const int64_t blocks = blocks_of(this->kTail, blocksize);
    const auto check = [&](auto quantize, auto dequantize, auto d, auto back, int64_t per_byte, const Quantized& expected) {
      const Reserved<uint8_t> codes((this->kSize + per_byte - 1) / per_byte);
      const Reserved<float> absmax(blocks_of(this->kSize, blocksize));
      const Reserved<TypeParam> out(this->kSize);
      d.blocksize = back.blocksize = blocksize;
      d.x = large.all();
      d.codes = codes;
      d.absmax = absmax;
      back.codes = codes;
      back.absmax = absmax;
      back.out = out.all();
      std::vector<TypeParam> small(x.size());
      auto small_back = back;
      small_back.codes = expected.codes;
      small_back.absmax = expected.absmax;
      small_back.out = std::span(small);
      dequantize(small_back);
      const HugeDevice huge(16);
      quantize(d), dequantize(back);
      EXPECT_TRUE(same(codes.last(std::ssize(expected.codes)), expected.codes));
      EXPECT_TRUE(same(absmax.last(blocks), expected.absmax));
      EXPECT_TRUE(same(out.last(this->kTail), small));
    };
    for (const auto type : kFormats)
      check(test::quantize_4bit, test::dequantize_4bit, Quantize4bit{.type = type}, Dequantize4bit{.type = type}, 2,
            run_quantize_4bit(type, x, blocksize));
    check(test::quantize_blockwise, test::dequantize_blockwise, QuantizeBlockwise{.code = map}, DequantizeBlockwise{.code = map}, 1,
          run_quantize_blockwise<TypeParam>(map, x, blocksize));
  }
}

// W of more than 2^32 weights, y of more than 2^31 elements: rows, and where 65535 tiles of columns are enough, tiles.
TYPED_TEST(Large, Gemm4bit) {
  constexpr int64_t k = 512, tail = 64, columns = 16;
  for (const auto& [m, n] : {std::pair<int64_t, int64_t>{128, (1 << 24) + 264}, {130, 65535 * 256 - 8}}) {
    const Weight w(QuantType::nf4, tail, k, 64, false, 11);
    const auto a = rounded_all<TypeParam>(normals(4, m * k)), bias = rounded_all<TypeParam>(normals(5, tail));
    std::vector<TypeParam> small(static_cast<size_t>(m * tail));
    const auto d = w.product(m, std::span(a), std::span(small), std::span(bias), false);

    const Reserved<uint8_t> codes(n * k / 2, w.codes);
    const Reserved<float> absmax(n * k / 64, w.absmax);
    const Reserved<TypeParam> all_bias(n, bias), y(m * n);
    auto large = d;
    large.n = n;
    large.codes = codes;
    large.absmax.values = absmax;
    large.bias = all_bias.all();
    large.out = y.all();

    std::vector<std::string> families;
    for (const auto& plan : cuda::gemm::plans(large, HugeDevice::device())) {
      const auto text = cuda::gemm::describe(plan, large);
      if (plan.panel || plan.splits > 1) continue;  // panels are calls of dequantize_4bit; splits need large k
      SCOPED_TRACE(text);
      families.push_back(text.substr(text.find(": ") + 2, 4));
      cuda::gemm::run(plan, d, nullptr, nullptr);
      const auto last = [&](std::span<TypeParam> all, int64_t row, int64_t width) {
        return all.subspan(static_cast<size_t>((row + 1) * width - columns), columns);
      };
      for (int64_t row = 0; row < m; ++row) std::ranges::fill(last(y, row, n), rounded<TypeParam>(NAN));
      const HugeDevice huge(families.back() == "fma," ? 80 : 8);  // its tiles are 4 rows by 16 columns
      cuda::gemm::run(plan, large, nullptr, nullptr);
      for (int64_t row = 0; row < m; ++row) {
        const auto actual = last(y, row, n), expected = last(small, row, tail);
        ASSERT_TRUE(same(std::vector(actual.begin(), actual.end()), std::vector(expected.begin(), expected.end()))) << "row " << row;
      }
    }
    const bool half = std::is_same_v<TypeParam, Half>, bfloat = std::is_same_v<TypeParam, BFloat16>, sm_80 = cuda::dev::device().arch >= 80;
    const auto offered = [&](const std::string& family) { return std::ranges::count(families, family) > 0; };
    EXPECT_TRUE(offered("fma,"));
    EXPECT_EQ(offered("rows"), (half || bfloat) && sm_80 && m == 128);
    EXPECT_EQ(offered("tile"), (half || (bfloat && sm_80)) && m == 130);
  }
}

}  // namespace
}  // namespace bnb::test
