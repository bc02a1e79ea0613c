#include "scratch.h"

#include <bnb/error.h>

#include <algorithm>
#include <cstdlib>
#include <new>
#include <string>
#include <utility>

namespace bnb::cpu {
namespace {

constexpr int64_t kKept = int64_t{4} << 20;  // bytes a thread keeps at most

// Two slots, as a call uses at most two pieces at once: packed activations and a decoded panel.
struct Cache {
  struct Slot {
    void* data = nullptr;
    int64_t bytes = 0;
  } slots[2];
  ~Cache() {
    for (auto& s : slots) std::free(s.data);
  }
};
thread_local Cache t_cache;

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr), bytes_((std::max<int64_t>(bytes, 1) + 63) / 64 * 64) {
  for (auto& slot : t_cache.slots)
    if (slot.bytes >= bytes_) {
      data_ = std::exchange(slot.data, nullptr);
      bytes_ = std::exchange(slot.bytes, 0);
      return;
    }
  data_ = std::aligned_alloc(64, static_cast<size_t>(bytes_));
  if (!data_) throw Error(Errc::out_of_memory, "scratch memory: " + std::to_string(bytes_) + " bytes could not be allocated");
}

Scratch::~Scratch() {
  auto& smaller = t_cache.slots[t_cache.slots[0].bytes <= t_cache.slots[1].bytes ? 0 : 1];
  if (bytes_ <= kKept && smaller.bytes < bytes_) {
    std::swap(smaller.data, data_);
    smaller.bytes = bytes_;
  }
  std::free(data_);
}

}  // namespace bnb::cpu
