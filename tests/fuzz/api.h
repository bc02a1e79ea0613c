// Calls of the C++ API made from bytes: right ones, and ones with short, null or overlapping buffers, wrong sizes and wrong numbers. A call
// returns or throws bnb::Error that names it; it touches no memory but its buffers, and when refused writes nothing. On every instruction
// set it does the same.
#pragma once

#include <bnb/bnb.h>

#include <string_view>

#include "fuzz/memory.h"

namespace bnb::fuzz {

struct Target {
  std::string_view name;
  void (*run)(Memory&, Bytes&);
};
std::span<const Target> targets();

// Throws Fault.
void run(const Target& target, std::span<const uint8_t> bytes);

}  // namespace bnb::fuzz
