#include "cpu/runtime/scratch.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "common/check.h"

namespace bnb::cpu {
namespace {

constexpr int64_t kKept = int64_t{4} << 20;  // bytes a thread keeps at most

// As many as a call uses at once: packed activations, a decoded panel, weights of outlier columns.
struct Cache {
  struct Slot {
    void* data = nullptr;
    int64_t bytes = 0;
  } slots[4];
  ~Cache() {
    for (auto& s : slots) std::free(s.data);
  }
};
thread_local Cache t_cache;

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr), bytes_((std::max<int64_t>(bytes, 1) + 63) / 64 * 64) {
  Cache::Slot* best = nullptr;
  for (auto& slot : t_cache.slots)
    if (slot.bytes >= bytes_ && (!best || slot.bytes < best->bytes)) best = &slot;
  if (best) {
    data_ = std::exchange(best->data, nullptr);
    bytes_ = std::exchange(best->bytes, 0);
    return;
  }
  data_ = std::aligned_alloc(64, static_cast<size_t>(bytes_));
  if (!data_) throw ScratchError(bytes_);
}

Scratch::~Scratch() {
  auto& smallest = *std::ranges::min_element(t_cache.slots, {}, &Cache::Slot::bytes);
  if (bytes_ <= kKept && smallest.bytes < bytes_) {
    std::swap(smallest.data, data_);
    smallest.bytes = bytes_;
  }
  std::free(data_);
}

}  // namespace bnb::cpu
