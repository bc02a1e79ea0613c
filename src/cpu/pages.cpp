#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bnb::cpu {

void prefer_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  constexpr int64_t kWorth = int64_t{4} << 20;  // the call itself takes some microseconds
  if (bytes < kWorth) return;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const uintptr_t begin = (address + kHugePage - 1) & -kHugePage, end = (address + static_cast<uintptr_t>(bytes)) & -kHugePage;
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace bnb::cpu
