// src/cuda/device/runtime.cpp over a mock of the CUDA runtime: what it asks the driver for, where host threads matter.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <bnb/error.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "cuda/device/device.h"

namespace {

constexpr int kMostShared = 227 << 10, kDefault = 48 << 10;
thread_local int current = 0;
thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
std::atomic<bool> captured = false;  // by some thread
std::mutex mutex;
std::map<std::pair<const void*, int>, int> allowed;  // bytes of shared memory
std::atomic<int> settings = 0;
constexpr size_t kMostMemory = 1 << 20;
std::map<void*, cudaStream_t> streams;  // of allocated memory

cudaError_t takes_memory() { return captured && mode != cudaStreamCaptureModeRelaxed ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }

}  // namespace

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "another"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kMostShared : 1, cudaSuccess;
}
cudaError_t cudaMallocManaged(void** memory, size_t bytes, unsigned) {
  const auto error = takes_memory();
  *memory = error == cudaSuccess ? std::malloc(bytes) : nullptr;
  return error;
}
cudaError_t cudaFree(void* memory) {
  const auto error = takes_memory();
  if (error == cudaSuccess) std::free(memory);
  return error;
}
#if CUDART_VERSION >= 13000
cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) { return cudaSuccess; }
#else
cudaError_t cudaMemPrefetchAsync(const void*, size_t, int, cudaStream_t) { return cudaSuccess; }
#endif
// Stream-ordered allocation is allowed during capture: it becomes a node of the graph.
cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t stream) {
  if (bytes > kMostMemory) return *memory = nullptr, cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  streams[*memory] = stream;
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  if (const auto found = streams.find(memory); found == streams.end() || found->second != stream) return cudaErrorInvalidValue;
  streams.erase(memory);
  std::free(memory);
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  return current = device, cudaSuccess;
}
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* other) { return std::swap(mode, *other), cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > kMostShared) return cudaErrorInvalidValue;
  {
    const std::lock_guard lock(mutex);
    allowed[{kernel, current}] = value;
    ++settings;
  }
  std::this_thread::yield();  // lets another thread launch here
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t shared, cudaStream_t) {
  const std::lock_guard lock(mutex);
  const auto found = allowed.find({kernel, current});
  return static_cast<int>(shared) > (found == allowed.end() ? kDefault : found->second) ? cudaErrorInvalidValue : cudaSuccess;
}
}

namespace bnb::cuda {
namespace {

const int kernels[3] = {};

void launch(const void* kernel, uint32_t shared) { dev::launch_kernel(kernel, {.op = "test", .shape = {1}, .shared = shared}, nullptr); }

TEST(CudaRuntime, SharedMemoryOfAKernelBelongsToNoLaunch) {
  launch(&kernels[0], 10 << 10);
  EXPECT_EQ(settings, 0) << "what every kernel may have needs no call";
  launch(&kernels[0], 200 << 10);
  launch(&kernels[0], 60 << 10);
  EXPECT_EQ((allowed[{&kernels[0], 0}]), kMostShared);
  EXPECT_EQ(settings, 1);
  launch(&kernels[1], 60 << 10);
  current = 1;
  launch(&kernels[0], 60 << 10);
  current = 0;
  EXPECT_EQ(settings, 3) << "once a kernel and device";
  EXPECT_THROW(launch(&kernels[1], kMostShared + 1), Error);
}

TEST(CudaRuntime, ThreadsLaunchAKernelWithMoreAndLess) {
  std::vector<std::thread> threads;
  std::atomic<int> failed = 0;
  for (const uint32_t shared : {uint32_t{200} << 10, uint32_t{60} << 10, uint32_t{100} << 10, uint32_t{50} << 10})
    threads.emplace_back([&failed, shared] {
      for (int i = 0; i < 2000; ++i) try {
          launch(&kernels[2], shared);
        } catch (const Error&) { ++failed; }
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(failed, 0);
}

TEST(CudaRuntime, MemoryIsTakenAndFreedWhileAThreadCaptures) {
  captured = true;
  void* memory = allocate_managed(64);
  EXPECT_EQ(mode, cudaStreamCaptureModeGlobal);
  EXPECT_NO_THROW(free_managed(memory));
  EXPECT_EQ(mode, cudaStreamCaptureModeGlobal);
  captured = false;
  EXPECT_THROW(allocate_managed(0), Error);
}

TEST(CudaRuntime, MemoryOfACallGoesBackToItsStream) {
  captured = true;
  int stream = 0;
  {
    const dev::StreamMemory some("test", 64, &stream), none("test", 0, &stream);
    EXPECT_EQ(streams.at(some.data()), reinterpret_cast<cudaStream_t>(&stream));
    EXPECT_EQ(none.data(), nullptr);
  }
  EXPECT_TRUE(streams.empty());
  captured = false;
  try {
    const dev::StreamMemory much("an operation", int64_t{1} << 40, nullptr);
    FAIL() << "there is no such memory";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), Errc::out_of_memory);
    EXPECT_TRUE(std::string(e.what()).starts_with("an operation: ")) << e.what();
  }
}

TEST(CudaRuntime, TheCurrentDeviceIsAsBefore) {
  {
    const dev::DeviceScope other(1);
    EXPECT_EQ(current, 1);
    EXPECT_THROW(dev::DeviceScope(7), Error);
    EXPECT_EQ(current, 1);
  }
  EXPECT_EQ(current, 0);
}

}  // namespace
}  // namespace bnb::cuda
