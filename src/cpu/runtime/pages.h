// The pages of large outputs. Fresh memory is mapped page by page as it is first written, which costs several times what the kernels here
// take; so it is asked for in huge pages where they fit, and mapped by one call for each part before that is written.
#pragma once

#include <cstdint>

namespace bnb::cpu {

class OutputPages {
 public:
  OutputPages(void* data, int64_t bytes);
  // Call before writing bytes [begin, end), from any thread. Does nothing where the memory is small or mapped already.
  void map(int64_t begin, int64_t end) const;
  // Large and mapped already: what is written would be evicted before anyone reads it.
  bool streams() const { return streams_; }

 private:
  char* data_;
  int64_t bytes_;  // 0: nothing to do
  bool streams_ = false;
};

}  // namespace bnb::cpu
