// The host's side of the device layer: device properties, launches, memory. Plain C++; names no CUDA.
#pragma once

#include <bnb/cuda.h>

#include <cstdint>
#include <string>

namespace bnb::cuda::dev {

inline constexpr unsigned kWarp = 32;
inline constexpr uint32_t kDefaultShared = 48 << 10;  // a kernel must opt in to more

struct Dim {
  uint32_t x = 1, y = 1, z = 1;
};

// The current device; queried once per device. Throws Error{unsupported} if there is none.
struct Device {
  int index = 0;
  int arch = 0;                // 10 * major + minor
  int sms = 0;                 // multiprocessors
  int64_t l2_bytes = 0;        // second-level cache
  uint32_t shared_bytes = 0;   // limit per block
  uint32_t shared_per_sm = 0;  // limit per multiprocessor
};
const Device& device();

// One launch, and what an error message says about it.
struct Launch {
  const char* op = "";       // the public operation
  DType dtype = DType::f32;  // of its input or output
  int64_t shape[3] = {};     // its sizes; messages omit zeros after the first
  Dim grid = {};             // blocks
  uint32_t threads = 1;      // per block
  uint32_t shared = 0;       // bytes of dynamic shared memory
  Stream stream = nullptr;
};

std::string describe(const Launch&);  // "quantize_4bit: bf16 4096"
// Throws Error with that description and the limit that the launch exceeds.
void check_launch(const Launch&, const Device&);

// Launches a CUDA kernel; device.cuh's launch() is the typed form.
void launch_kernel(const void* kernel, const Launch&, void** arguments);

// While one lives, this thread may allocate and free memory even though a stream is being captured, by this or another thread. CUDA would
// otherwise refuse and invalidate the capture.
class MemoryDuringCapture {
 public:
  MemoryDuringCapture();
  ~MemoryDuringCapture();
  MemoryDuringCapture(const MemoryDuringCapture&) = delete;
  MemoryDuringCapture& operator=(const MemoryDuringCapture&) = delete;

 private:
  int before_ = 0;
};

// Sets memory to zero, in stream order. `what`: the operation, for messages.
void zero_async(const char* what, void* to, int64_t bytes, Stream stream);

// Device memory of one call, allocated and freed in stream order, so that nothing waits. Null for 0 bytes.
class StreamMemory {
 public:
  StreamMemory(const char* what, int64_t bytes, Stream stream);
  ~StreamMemory();
  StreamMemory(const StreamMemory&) = delete;
  StreamMemory& operator=(const StreamMemory&) = delete;
  template <class T> T* as() const { return static_cast<T*>(data_); }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;  // aligned to 256
  Stream stream_;
};

// Makes a device current for this thread while it lives.
class DeviceScope {
 public:
  explicit DeviceScope(int index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0; }

}  // namespace bnb::cuda::dev

namespace bnb::cuda {
constexpr int64_t ceil_div(int64_t n, int64_t by) { return n / by + (n % by != 0); }
}  // namespace bnb::cuda
