// The emulator must catch faults: kernels with one planted fault each, and the same kernels without it.
#include "cuda_on_host/emulator.h"

#include <bnb/error.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

#include "cuda/device/ptx.cuh"

namespace bnb::cuda {
namespace {

using dev::Bits;
using emulator::Fault, emulator::Order;

enum Plant { kNone, kPlanted };
using Results = std::vector<std::vector<float>>;

std::vector<float> ramp(size_t n) {
  std::vector<float> x(n);
  std::iota(x.begin(), x.end(), 1.0f);
  return x;
}

// What `kernel`, whose last argument is its output of n floats, writes in each order.
template <class... P, class... A> Results in_all_orders(size_t n, const dev::Launch& l, void (*kernel)(P...), const A&... arguments) {
  Results results;
  emulator::for_each_order([&](Order) {
    std::vector<float> out(n, -1.0f);
    dev::launch(l, kernel, arguments..., out.data());
    results.push_back(out);
  });
  return results;
}
bool same_bytes(const Results& results) {
  for (const auto& r : results)
    if (std::memcmp(r.data(), results[0].data(), r.size() * sizeof(float)) != 0) return false;
  return true;
}

// The launch must end with a fault that names kernel, block, thread and each of `parts`, in every order; and the next launch must work.
template <class... P, class... A>
void expect_fault(std::initializer_list<const char*> parts, const dev::Launch& l, void (*kernel)(P...), const A&... arguments) {
  emulator::for_each_order([&](Order order) {
    std::string text;
    try {
      dev::launch(l, kernel, arguments...);
    } catch (const Fault& fault) { text = fault.what(); }
    for (const char* part : parts)
      EXPECT_NE(text.find(part), std::string::npos) << emulator::name(order) << ": no '" << part << "' in '" << text << "'";
    EXPECT_NE(text.find("kernel planted, block ("), std::string::npos) << text;
    EXPECT_NE(text.find("thread "), std::string::npos) << text;
  });
}

dev::Launch planted(uint32_t threads, uint32_t shared = 0, uint32_t blocks = 2) {
  return {.op = "planted", .grid = {blocks}, .threads = threads, .shared = shared};
}

// ---- missing barriers: out[block] = sum of 128 values, in 4 warps that meet in shared memory

template <Plant plant> BNB_KERNEL(128, 1) sum(const float* x, float* out) {
  auto& s = dev::shared<float[4]>();
  float v = x[dev::block().x * 128 + dev::thread()];
  for (unsigned k = 16; k; k /= 2) v += dev::shuffle_xor(v, k);
  if (dev::lane() == 0) s[dev::warp()] = v;
  if constexpr (plant == kNone) dev::barrier();
  if (dev::thread() == 0) out[dev::block().x] = s[0] + s[1] + s[2] + s[3];
}

TEST(CudaOnHost, AMissingBarrierShows) {
  const auto x = ramp(128 * 5);
  const auto good = in_all_orders(5, planted(128, 16, 5), sum<kNone>, x.data());
  EXPECT_TRUE(same_bytes(good));
  for (size_t b = 0; b < 5; ++b) EXPECT_EQ(good[0][b], std::accumulate(x.begin() + b * 128, x.begin() + (b + 1) * 128, 0.0f));
  EXPECT_FALSE(same_bytes(in_all_orders(5, planted(128, 16, 5), sum<kPlanted>, x.data())));
}

// A buffer is filled again while slow threads may still read it.
template <Plant plant> BNB_KERNEL(64, 1) rotate(float* out) {
  auto& s = dev::shared<float[64]>();
  float v = static_cast<float>(dev::thread());
  for (int round = 0; round < 3; ++round) {
    s[dev::thread()] = v;
    dev::barrier();
    v = s[(dev::thread() + 1) % 64];
    if constexpr (plant == kNone) dev::barrier();
  }
  out[dev::thread()] = v;
}

TEST(CudaOnHost, AMissingBarrierAfterAReadShows) {
  EXPECT_TRUE(same_bytes(in_all_orders(64, planted(64, 256, 1), rotate<kNone>)));
  EXPECT_FALSE(same_bytes(in_all_orders(64, planted(64, 256, 1), rotate<kPlanted>)));
}

// One buffer where two are needed: what a warp reads after the barrier is overwritten by a warp that is a round of shuffles ahead. Warps
// that advance together do not show it.
template <Plant plant> BNB_KERNEL(128, 1) exchange(float* out) {
  auto& s = dev::shared<float[2][4]>();
  float v = static_cast<float>(dev::thread());
  for (int round = 0; round < 4; ++round) {
    for (unsigned k = 16; k; k /= 2) v += dev::shuffle_xor(v, k);
    float (&buffer)[4] = s[plant == kNone ? round % 2 : 0];
    if (dev::lane() == 0) buffer[dev::warp()] = v;
    dev::barrier();
    v = buffer[(dev::warp() + 1) % 4] + static_cast<float>(dev::lane());
  }
  out[dev::thread()] = v;
}

TEST(CudaOnHost, AWarpThatRunsAheadShows) {
  const auto good = in_all_orders(128, planted(128, 32, 1), exchange<kNone>),
             bad = in_all_orders(128, planted(128, 32, 1), exchange<kPlanted>);
  EXPECT_TRUE(same_bytes(good));
  EXPECT_EQ(bad[2], good[2]) << "the random order";
  EXPECT_NE(bad[0], good[0]) << "in order";
  EXPECT_NE(bad[1], good[1]) << "reversed";
}

// Blocks are independent: dependence on their order shows.
BNB_KERNEL(32, 1) tickets(float* out) {
  if (dev::thread() == 0) out[dev::block().x + 1] = dev::atomic_add(out, 1.0f);
}
TEST(CudaOnHost, TheOrderOfBlocksShows) { EXPECT_FALSE(same_bytes(in_all_orders(6, planted(32, 0, 5), tickets))); }

// ---- divergence

enum Kind { kHalfLeaves, kTwoPlaces, kLanesMissing, kTwoCollectives, kShortWarp };
template <Kind kind> BNB_KERNEL(64, 1) diverge(float* out) {
  const unsigned i = dev::thread();
  if constexpr (kind == kHalfLeaves) {
    if (i >= 32) return;
    dev::barrier();
  }
  if constexpr (kind == kTwoPlaces) {
    if (i < 32)
      dev::barrier();
    else
      dev::barrier();
  }
  if constexpr (kind == kLanesMissing)
    if (i % 2) out[i] = dev::shuffle_xor(1.0f, 2);
  if constexpr (kind == kTwoCollectives) out[i] = dev::lane() < 16 ? dev::shuffle(1.0f, 0) : static_cast<float>(dev::ballot(true));
  if constexpr (kind == kShortWarp) {
    float d[4] = {};
    dev::mma<Half>(d, {}, {});
    out[i] = d[0];
  }
}

TEST(CudaOnHost, DivergenceIsReported) {
  std::vector<float> out(64);
  expect_fault({"divergent", "thread 32..63 has ended", "thread 0..31 waits at barrier emulator_test.cpp:"}, planted(64),
               diverge<kHalfLeaves>, out.data());
  expect_fault({"divergent", "at barrier emulator_test.cpp:", "others wait at barrier emulator_test.cpp:"}, planted(64),
               diverge<kTwoPlaces>, out.data());
  expect_fault({"divergent", "has ended", "waits at shuffle_xor"}, planted(64), diverge<kLanesMissing>, out.data());
  expect_fault({"divergent", "shuffle", "ballot"}, planted(64), diverge<kTwoCollectives>, out.data());
  expect_fault({"mma", "a warp of 16 lanes"}, planted(16), diverge<kShortWarp>, out.data());
}

// ---- memory

enum Access { kLoad, kStore, kCopyFrom, kCopyTo, kMatrixRow, kPastEnd, kBefore, kCopyPastEnd, kMatrixPastEnd, kTooMuch };
template <Access access> BNB_KERNEL(32, 1) touch(const std::byte* x, std::byte* y) {
  auto& s = dev::shared<std::byte[512]>();
  uint32_t r[4];
  const bool me = dev::thread() == 7;
  const std::byte* row = s + dev::thread() * 16;
  if constexpr (access == kLoad) dev::store(y, dev::load_once<Bits<16>>(x + (me ? 8 : 0)));
  if constexpr (access == kStore) dev::store_once(y + (me ? 4 : 0), Bits<8>{});
  if constexpr (access == kCopyFrom) dev::copy_async<16>(s, x + (me ? 4 : 0));
  if constexpr (access == kCopyTo) dev::copy_async<4>(s + (me ? 2 : 0), x);
  if constexpr (access == kMatrixRow) dev::load_matrices(r, me ? row + 8 : row);
  if constexpr (access == kPastEnd) dev::store_shared(me ? s + 512 : s, Bits<16>{});
  if constexpr (access == kBefore) dev::store(y, dev::load_shared<Bits<4>>(me ? s - 4 : s));
  if constexpr (access == kCopyPastEnd) dev::copy_async<16>(s + (me ? 512 : 0), x);
  if constexpr (access == kMatrixPastEnd) dev::load_matrices(r, me ? s + 512 : row);
  if constexpr (access == kTooMuch)
    if (me) y[0] = dev::shared<std::byte[513]>()[0];
}

TEST(CudaOnHost, WrongAccessesAreReported) {
  alignas(16) std::byte from[64] = {}, to[64] = {};
  const std::byte* x = from;
  std::byte* y = to;
  const auto launch = planted(32, 512);
  expect_fault({"thread 7:", "misaligned load of 16 bytes", "emulator_test.cpp:"}, launch, touch<kLoad>, x, y);
  expect_fault({"thread 7:", "misaligned store of 8 bytes"}, launch, touch<kStore>, x, y);
  expect_fault({"thread 7:", "misaligned asynchronous copy of 16 bytes"}, launch, touch<kCopyFrom>, x, y);
  expect_fault({"thread 7:", "misaligned asynchronous copy of 4 bytes"}, launch, touch<kCopyTo>, x, y);
  expect_fault({"thread 7:", "misaligned row of a matrix"}, launch, touch<kMatrixRow>, x, y);
  expect_fault({"thread 7:", "store outside shared memory: 16 bytes at 512 of 512"}, launch, touch<kPastEnd>, x, y);
  expect_fault({"thread 7:", "load outside shared memory: 4 bytes at -4 of 512"}, launch, touch<kBefore>, x, y);
  expect_fault({"thread 7:", "asynchronous copy outside shared memory"}, launch, touch<kCopyPastEnd>, x, y);
  expect_fault({"thread 7:", "row of a matrix outside shared memory"}, launch, touch<kMatrixPastEnd>, x, y);
  expect_fault({"thread 7:", "asks for 513 bytes of shared memory, launched with 512"}, launch, touch<kTooMuch>, x, y);
}

BNB_KERNEL(32, 1) overrun(int at) {
  float* s = dev::shared<float[32]>();
  s[at + static_cast<int>(dev::thread())] = 1;
}
TEST(CudaOnHost, AnOverrunOfAnArrayIsReported) {
  dev::launch(planted(32, 128), overrun, 0);
#if defined(__SANITIZE_ADDRESS__)
  EXPECT_DEATH(dev::launch(planted(32, 128), overrun, 1), "use-after-poison");
  EXPECT_DEATH(dev::launch(planted(32, 128), overrun, -1), "use-after-poison");
#else
  const auto text = [](int at) -> std::string {
    try {
      dev::launch(planted(32, 128), overrun, at);
    } catch (const Fault& fault) { return fault.what(); }
    return "";
  };
  EXPECT_EQ(text(1), "kernel planted, block (0, 0, 0): wrote outside its 128 bytes of shared memory, at byte 128");
  EXPECT_EQ(text(-1), "kernel planted, block (0, 0, 0): wrote outside its 128 bytes of shared memory, at byte -4");
#endif
}

template <Plant plant> BNB_KERNEL(32, 1) read_shared(float* out) {
  auto& s = dev::shared<float[32]>();
  if (plant == kNone || dev::thread() != 5) s[dev::thread()] = 1;
  dev::barrier();
  out[dev::thread()] = s[dev::thread() ^ 1];
}
TEST(CudaOnHost, SharedMemoryStartsAsNaN) {
  const auto good = in_all_orders(32, planted(32, 128), read_shared<kNone>),
             bad = in_all_orders(32, planted(32, 128), read_shared<kPlanted>);
  for (const auto& out : good) EXPECT_EQ(out, std::vector<float>(32, 1.0f));
  for (const auto& out : bad) EXPECT_TRUE(std::isnan(out[4]));
}

// ---- asynchronous copies

enum Wait { kWaits, kTooFewGroups, kNoWait, kNoBarrier };
// Two stages in a ring of two, 8 rounds: out = sums of what came in.
template <Wait wait> BNB_KERNEL(32, 1) ring(const float* x, float* out) {
  auto& s = dev::shared<float[2][32]>();
  const unsigned i = dev::thread();
  const auto fetch = [&](int round) {
    if (round < 8) dev::copy_async<4>(&s[round % 2][i], x + round * 32 + i);
    dev::copy_commit();
  };
  float v = 0;
  fetch(0);
  for (int round = 0; round < 8; ++round) {
    fetch(round + 1);
    if constexpr (wait == kTooFewGroups) dev::copy_wait<2>();
    if constexpr (wait == kWaits || wait == kNoBarrier) dev::copy_wait<1>();
    dev::barrier();
    v += s[round % 2][(i + 1) % 32];
    if constexpr (wait != kNoBarrier) dev::barrier();  // before it is filled again
  }
  out[i] = v;
}

TEST(CudaOnHost, CopiesLandWhenWaitedFor) {
  const auto x = ramp(256);
  const auto run = [&](auto kernel) { return in_all_orders(32, planted(32, 256, 1), kernel, x.data()); };
  const auto good = run(ring<kWaits>);
  EXPECT_TRUE(same_bytes(good));
  for (unsigned i = 0; i < 32; ++i) EXPECT_EQ(good[0][i], 8 * static_cast<float>((i + 1) % 32 + 1) + 32 * 28);
  if constexpr (!dev::kHasCopyAsync) GTEST_SKIP() << "copies are plain loads and stores on this architecture";
  EXPECT_FALSE(same_bytes(run(ring<kTooFewGroups>)));
  EXPECT_FALSE(same_bytes(run(ring<kNoWait>)));
  EXPECT_FALSE(same_bytes(run(ring<kNoBarrier>)));
}

BNB_KERNEL(32, 1) copy_part(const uint8_t* x, uint8_t* out) {
  auto& s = dev::shared<uint8_t[32][16]>();
  dev::copy_async<16>(s[dev::thread()], x, dev::thread() % 17);
  dev::copy_commit();
  dev::copy_wait<0>();
  for (int i = 0; i < 16; ++i) out[dev::thread() * 16 + i] = s[dev::thread()][i];
}
TEST(CudaOnHost, CopiesFillUpWithZeros) {
  alignas(16) uint8_t x[16], out[512];
  std::iota(x, x + 16, uint8_t{1});
  emulator::for_each_order([&](Order) {
    dev::launch(planted(32, 512, 1), copy_part, +x, +out);
    for (int t = 0; t < 32; ++t)
      for (int i = 0; i < 16; ++i) EXPECT_EQ(out[t * 16 + i], i < t % 17 ? i + 1 : 0);
  });
}

// ---- collectives

BNB_KERNEL(64, 1) collectives(float* out) {
  const unsigned i = dev::thread(), lane = dev::lane();
  bool good = dev::ballot(lane % 3 == 0) == 0x49249249 && dev::any(lane == 31) && !dev::any(false);
  good &= dev::shuffle(i, 35) == i / 32 * 32 + 3 && dev::shuffle_xor(uint64_t{i} << 33, 5) == uint64_t{i ^ 5} << 33;
  good &= dev::barrier_or(i == 63) && !dev::barrier_or(false) && dev::barrier_or(i == 0);
  dev::barrier();
  good &= !dev::barrier_or(false);
  dev::warp_barrier();
  out[i] = good;
}
TEST(CudaOnHost, CollectivesGiveWhatTheManualSays) {
  for (const auto& out : in_all_orders(64, planted(64, 0, 1), collectives)) EXPECT_EQ(out, std::vector<float>(64, 1.0f));
}

BNB_KERNEL(64, 1) reduce(int* out) {
  dev::atomic_max(out, static_cast<int>(dev::thread() * 7 % 64));
  dev::atomic_or(out + 1, 1 << dev::thread() % 16);
  dev::atomic_add(out + 2, 1);
}
TEST(CudaOnHost, Atomics) {
  emulator::for_each_order([](Order) {
    int out[3] = {};
    dev::launch(planted(64), reduce, static_cast<int*>(out));
    EXPECT_EQ(out[0], 63);
    EXPECT_EQ(out[1], 0xffff);
    EXPECT_EQ(out[2], 128);
  });
}

// ---- launches

BNB_KERNEL(32, 1) raise(int) {
  dev::barrier();
  if (dev::thread() == 3) throw std::runtime_error("thrown by thread 3");
  dev::barrier();
}
TEST(CudaOnHost, ExceptionsComeOut) {
  EXPECT_THROW(dev::launch(planted(32), raise, 1), std::runtime_error);
  const auto x = ramp(128);
  EXPECT_TRUE(same_bytes(in_all_orders(1, planted(128, 16, 1), sum<kNone>, x.data())));
}

TEST(CudaOnHost, IllegalLaunchesAreNamed) {
  const auto text = [](dev::Launch l) -> std::string {
    l.op = "gemm_4bit";
    l.dtype = DType::bf16;
    l.shape[0] = 3;
    l.shape[1] = 4096;
    l.shape[2] = 64;
    try {
      dev::launch(l, raise, 1);
    } catch (const Error& error) { return error.what(); }
    return "";
  };
  const std::string device = " on this device (sm_" + std::to_string(dev::device().arch) + ")",
                    start = "gemm_4bit: bf16 3 x 4096 x 64: launch with ";
  EXPECT_EQ(text({.grid = {1}, .threads = 1025}), start + "1025 threads per block, expected 1 to 1024" + device);
  EXPECT_EQ(text({.grid = {0}, .threads = 32}), start + "0 blocks, expected 1 to 2147483647" + device);
  EXPECT_EQ(text({.grid = {1, 65536}, .threads = 32}), start + "65536 rows of blocks, expected 1 to 65535" + device);
  EXPECT_EQ(text({.grid = {1, 1, 65536}, .threads = 32}), start + "65536 layers of blocks, expected 1 to 65535" + device);
  EXPECT_EQ(text({.grid = {1}, .threads = 32, .shared = 1 << 20}),
            start + "1048576 bytes of shared memory, expected 0 to " + std::to_string(dev::device().shared_bytes) + device);
}

}  // namespace
}  // namespace bnb::cuda
