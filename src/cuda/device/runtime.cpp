// The host's side of the device layer on CUDA. With device.cuh and ptx.cuh the only place that names CUDA.
#include <cuda_runtime_api.h>

#include <bnb/error.h>

#include <array>
#include <mutex>
#include <set>
#include <string>
#include <utility>

#include "cuda/device/device.h"

namespace bnb::cuda {
namespace {

[[noreturn]] void fail(const std::string& what, cudaError_t error) {
  cudaGetLastError();  // clears it: the next call of anybody else must not see it
  throw Error(error == cudaErrorMemoryAllocation ? Errc::out_of_memory : Errc::unsupported,
              what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) [[unlikely]]
    fail(what, error);
}

}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

void* allocate_managed(int64_t bytes) {
  if (bytes <= 0) throw Error(Errc::invalid_argument, "allocate_managed: bytes is " + std::to_string(bytes) + ", expected more than 0");
  void* memory = nullptr;
  const dev::MemoryDuringCapture allowed;
  check("allocate_managed", cudaMallocManaged(&memory, static_cast<size_t>(bytes)));
  return memory;
}

void free_managed(void* memory) {
  const dev::MemoryDuringCapture allowed;  // may be called by a finalizer while another thread captures
  check("free_managed", cudaFree(memory));
}

void prefetch_managed(const void* from, int64_t bytes, bool to_host, Stream stream) {
  int possible = 0, index = dev::device().index;
  check("prefetch_managed", cudaDeviceGetAttribute(&possible, cudaDevAttrConcurrentManagedAccess, index));
  if (!possible || bytes <= 0) return;
  const auto size = static_cast<size_t>(bytes);
  const auto on = static_cast<cudaStream_t>(stream);
#if CUDART_VERSION >= 13000
  const cudaMemLocation to = {to_host ? cudaMemLocationTypeHost : cudaMemLocationTypeDevice, to_host ? 0 : index};
  check("prefetch_managed", cudaMemPrefetchAsync(from, size, to, 0, on));
#else
  check("prefetch_managed", cudaMemPrefetchAsync(from, size, to_host ? cudaCpuDeviceId : index, on));
#endif
}

namespace dev {

const Device& device() {
  constexpr int kMax = 64;
  static std::array<Device, kMax> known;
  static std::array<std::once_flag, kMax> asked;
  int index = 0;
  check("current device", cudaGetDevice(&index));
  if (index >= kMax)
    throw Error(Errc::unsupported, "current device: " + std::to_string(index) + ", expected one below " + std::to_string(kMax));
  std::call_once(asked[index], [&] {
    const auto get = [&](cudaDeviceAttr attribute) {
      int value = 0;
      check("properties of the device", cudaDeviceGetAttribute(&value, attribute, index));
      return value;
    };
    known[index] = {.index = index,
                    .arch = 10 * get(cudaDevAttrComputeCapabilityMajor) + get(cudaDevAttrComputeCapabilityMinor),
                    .sms = get(cudaDevAttrMultiProcessorCount),
                    .l2_bytes = get(cudaDevAttrL2CacheSize),
                    .shared_bytes = static_cast<uint32_t>(get(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
                    .shared_per_sm = static_cast<uint32_t>(get(cudaDevAttrMaxSharedMemoryPerMultiprocessor))};
  });
  return known[index];
}

MemoryDuringCapture::MemoryDuringCapture() {
  auto mode = cudaStreamCaptureModeRelaxed;
  check("stream capture mode", cudaThreadExchangeStreamCaptureMode(&mode));
  before_ = mode;
}

MemoryDuringCapture::~MemoryDuringCapture() {
  auto mode = static_cast<cudaStreamCaptureMode>(before_);
  cudaThreadExchangeStreamCaptureMode(&mode);
}

namespace {

// Raises a kernel's limit of dynamic shared memory to the device's, once per kernel and device. Set to what one launch needs, another
// thread's smaller launch could lower it again in between.
cudaError_t allow_all_shared(const void* kernel, const Device& d) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  const std::lock_guard lock(mutex);
  if (allowed.contains({kernel, d.index})) return cudaSuccess;
  const auto error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(d.shared_bytes));
  if (error == cudaSuccess) allowed.insert({kernel, d.index});
  return error;
}

}  // namespace

void launch_kernel(const void* kernel, const Launch& l, void** arguments) {
  const Device& on = device();
  check_launch(l, on);
  cudaError_t error = l.shared > kDefaultShared ? allow_all_shared(kernel, on) : cudaSuccess;
  if (error == cudaSuccess)
    error = cudaLaunchKernel(kernel, dim3(l.grid.x, l.grid.y, l.grid.z), dim3(l.threads), arguments, l.shared,
                             static_cast<cudaStream_t>(l.stream));
  if (error != cudaSuccess) [[unlikely]]
    fail(describe(l), error);
}

void zero_async(const char* what, void* to, int64_t bytes, Stream stream) {
  check(what, cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}

StreamMemory::StreamMemory(const char* what, int64_t bytes, Stream stream) : stream_(stream) {
  if (bytes > 0) check(what, cudaMallocAsync(&data_, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)));
}
StreamMemory::~StreamMemory() {
  if (data_ && cudaFreeAsync(data_, static_cast<cudaStream_t>(stream_)) != cudaSuccess) cudaGetLastError();
}

DeviceScope::DeviceScope(int index) {
  check("current device", cudaGetDevice(&before_));
  if (index != before_) check("current device", cudaSetDevice(index));
}
DeviceScope::~DeviceScope() {
  if (cudaSetDevice(before_) != cudaSuccess) cudaGetLastError();
}

}  // namespace dev
}  // namespace bnb::cuda
