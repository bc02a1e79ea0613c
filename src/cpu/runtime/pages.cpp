#include "cpu/runtime/pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace bnb::cpu {

namespace {
constexpr int64_t kWorth = int64_t{4} << 20;  // bytes from which on it pays to ask for pages, and to go past the caches
}

#if defined(__linux__)
namespace {

constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older kernels refuse it and nothing is lost

uintptr_t page_size() {
  static const auto size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  return size;
}

bool is_mapped(const char* p) {
  unsigned char resident = 0;
  const uintptr_t page = reinterpret_cast<uintptr_t>(p) & -page_size();
  return mincore(reinterpret_cast<void*>(page), 1, &resident) == 0 && (resident & 1) != 0;
}

void advise(uintptr_t begin, uintptr_t end, int advice) {
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, advice);
}

}  // namespace

OutputPages::OutputPages(void* data, int64_t bytes) : data_(static_cast<char*>(data)), bytes_(0) {
  if (bytes < kWorth) return;
  streams_ = is_mapped(data_ + bytes / 2);
  if (streams_) return;
  bytes_ = bytes;
  const auto begin = reinterpret_cast<uintptr_t>(data), end = begin + static_cast<uintptr_t>(bytes);
  advise((begin + kHugePage - 1) & -kHugePage, end & -kHugePage, MADV_HUGEPAGE);
}

void OutputPages::map(int64_t begin, int64_t end) const {
  if (bytes_ == 0) return;
  const auto base = reinterpret_cast<uintptr_t>(data_);
  const uintptr_t last = base + static_cast<uintptr_t>(end < bytes_ ? end : bytes_);
  advise((base + static_cast<uintptr_t>(begin)) & -page_size(), (last + page_size() - 1) & -page_size(), kPopulateWrite);
}
#else
OutputPages::OutputPages(void* data, int64_t bytes) : data_(static_cast<char*>(data)), bytes_(0), streams_(bytes >= kWorth) {}
void OutputPages::map(int64_t, int64_t) const {}
#endif

}  // namespace bnb::cpu
