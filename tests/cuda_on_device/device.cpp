#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda_on_device/backend.h"

namespace bnb::test {
namespace {

constexpr size_t kAlign = 256, kGuard = 512;
constexpr std::byte kFill{0xA5};

void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

std::byte* allocate(size_t bytes) {
  void* memory = nullptr;
  check("cudaMalloc", cudaMalloc(&memory, bytes));
  return static_cast<std::byte*>(memory);
}

class NeedsDevice : public ::testing::Environment {
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "no CUDA device or no driver here: nothing was tested";
  }
};
const auto* const environment = ::testing::AddGlobalTestEnvironment(new NeedsDevice);

}  // namespace

DeviceMemory::~DeviceMemory() {
  for (const auto& b : buffers_) cudaFree(b.memory);
}

void* DeviceMemory::copy(const void* from, int64_t size, void* output) {
  if (size == 0) return const_cast<void*>(from);
  const auto bytes = static_cast<size_t>(size), at = reinterpret_cast<uintptr_t>(from) % kAlign;
  const size_t before = at + (output ? kGuard : 0), behind = output ? kGuard : 0;
  std::vector<std::byte> image(before + bytes + behind, kFill);
  std::memcpy(image.data() + before, from, bytes);
  auto* memory = allocate(image.size());
  buffers_.push_back({memory, before, bytes, behind, output});
  check("cudaMemcpy", cudaMemcpy(memory, image.data(), image.size(), cudaMemcpyHostToDevice));
  return memory + before;
}

void* DeviceMemory::workspace(int64_t bytes) {
  if (bytes == 0) return nullptr;
  auto* memory = allocate(static_cast<size_t>(bytes));
  buffers_.push_back({memory, 0, static_cast<size_t>(bytes), 0, nullptr});
  check("cudaMemset", cudaMemset(memory, 0xff, static_cast<size_t>(bytes)));
  return memory;
}

void DeviceMemory::finish() {
  check("the kernel", cudaDeviceSynchronize());
  for (const auto& b : buffers_) {
    if (!b.host) continue;
    std::vector<std::byte> image(b.before + b.bytes + b.behind);
    check("cudaMemcpy", cudaMemcpy(image.data(), b.memory, image.size(), cudaMemcpyDeviceToHost));
    const auto begin = image.begin() + static_cast<std::ptrdiff_t>(b.before), end = begin + static_cast<std::ptrdiff_t>(b.bytes);
    const auto filled = [](std::byte x) { return x == kFill; };
    EXPECT_TRUE(std::all_of(image.begin(), begin, filled)) << "bytes before an output were written";
    EXPECT_TRUE(std::all_of(end, image.end(), filled)) << "bytes behind an output were written";
    std::memcpy(b.host, &*begin, b.bytes);
  }
}

}  // namespace bnb::test
