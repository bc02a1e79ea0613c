// The host's side of the device layer, for the emulated device.
#include "cuda/device/device.cuh"

#include <bnb/error.h>

#include <new>

namespace bnb::cuda {

int device_count() { return 1; }

// Host memory, which needs no migration.
void* allocate_managed(int64_t bytes) {
  if (bytes <= 0) throw Error(Errc::invalid_argument, "allocate_managed: bytes is " + std::to_string(bytes) + ", expected more than 0");
  return operator new(static_cast<size_t>(bytes));
}
void free_managed(void* memory) { operator delete(memory); }
void prefetch_managed(const void*, int64_t, bool, Stream) {}

namespace dev {

// Few multiprocessors, so that loops over a grid run more than once.
Device emulated = {.index = 0,
                   .arch = BNB_ARCH,
                   .sms = 3,
                   .l2_bytes = 4 << 20,
                   .shared_bytes = (BNB_ARCH >= 90 ? 227 : 64) << 10,
                   .shared_per_sm = (BNB_ARCH >= 90 ? 228 : 64) << 10};

const Device& device() { return emulated; }

MemoryDuringCapture::MemoryDuringCapture() = default;
MemoryDuringCapture::~MemoryDuringCapture() = default;

void zero_async(const char*, void* to, int64_t bytes, Stream) { std::memset(to, 0, static_cast<size_t>(bytes)); }

constexpr std::align_val_t kAlign{256};
StreamMemory::StreamMemory(const char*, int64_t bytes, Stream stream) : stream_(stream) {
  if (bytes <= 0) return;
  data_ = operator new(static_cast<size_t>(bytes), kAlign);
  std::memset(data_, 0xff, static_cast<size_t>(bytes));  // NaN
}
StreamMemory::~StreamMemory() { operator delete(data_, kAlign); }

DeviceScope::DeviceScope(int index) {
  if (index != emulated.index) throw Error(Errc::unsupported, "current device: " + std::to_string(index) + ", expected 0");
}
DeviceScope::~DeviceScope() = default;

}  // namespace dev
}  // namespace bnb::cuda
