// Aligned scratch memory of one call. Freed memory of up to a few MB is kept by the thread for its next call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace bnb::cpu {

class Scratch {
 public:
  explicit Scratch(int64_t bytes);  // aligned to 64; throws ScratchError, which Checker::within_memory makes an Error of the operation
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
  int64_t bytes_;
};

}  // namespace bnb::cpu
