// The host's side of the device layer for the emulated device.
#include "../../src/cuda/device.cuh"

namespace bnb::cuda {

int device_count() { return 1; }

namespace dev {

// Few multiprocessors, so that loops over a grid run more than once.
Device emulated = {.index = 0,
                   .arch = BNB_ARCH,
                   .sms = 3,
                   .l2_bytes = 4 << 20,
                   .shared_bytes = (BNB_ARCH >= 90 ? 227 : 64) << 10,
                   .shared_per_sm = (BNB_ARCH >= 90 ? 228 : 64) << 10,
                   .threads_per_sm = 2048};

const Device& device() { return emulated; }

MemoryDuringCapture::MemoryDuringCapture() = default;
MemoryDuringCapture::~MemoryDuringCapture() = default;

void zero_async(const char*, void* to, int64_t bytes, Stream) { std::memset(to, 0, static_cast<size_t>(bytes)); }

}  // namespace dev
}  // namespace bnb::cuda
