// Launch limits, checked before the driver sees the launch, so that the message can name the call.
#include <bnb/error.h>

#include "cuda/device/device.h"

namespace bnb::cuda::dev {

std::string describe(const Launch& l) {
  std::string shape = std::to_string(l.shape[0]);
  for (const int64_t size : {l.shape[1], l.shape[2]})
    if (size) shape += " x " + std::to_string(size);
  return std::string(l.op) + ": " + std::string(name(l.dtype)) + " " + shape;
}

void check_launch(const Launch& l, const Device& device) {
  const auto limit = [&](const char* what, uint64_t given, uint64_t least, uint64_t most) {
    if (given >= least && given <= most) [[likely]]
      return;
    throw Error(Errc::unsupported, describe(l) + ": launch with " + std::to_string(given) + " " + what + ", expected " +
                                       std::to_string(least) + " to " + std::to_string(most) + " on this device (sm_" +
                                       std::to_string(device.arch) + ")");
  };
  limit("blocks", l.grid.x, 1, 0x7fffffff);
  limit("rows of blocks", l.grid.y, 1, 65535);
  limit("layers of blocks", l.grid.z, 1, 65535);
  limit("threads per block", l.threads, 1, 1024);
  limit("bytes of shared memory", l.shared, 0, device.shared_bytes);
}

}  // namespace bnb::cuda::dev
