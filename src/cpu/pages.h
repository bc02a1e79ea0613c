// Page size of large outputs. Fresh memory is mapped page by page as it is first written, which costs more than most kernels here.
#pragma once

#include <cstdint>

namespace bnb::cpu {

// Asks for huge pages inside [p, p + bytes) where that is large, before it is written. A hint: no effect on memory that is already mapped.
void prefer_huge_pages(void* p, int64_t bytes);

}  // namespace bnb::cpu
