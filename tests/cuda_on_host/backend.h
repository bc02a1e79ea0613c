// Lets the tests of the CPU's kernels (tests/cpp) run the CUDA kernels on the host: hides the operations of the CPU from namespace
// bnb::test. What they do for each instruction set they do here for each order of threads.
#pragma once

#include <bnb/cuda.h>

#include <array>
#include <string_view>
#include <vector>

#include "emulator.h"

namespace bnb::test {

inline void quantize_4bit(const Quantize4bit& d) { cuda::quantize_4bit(d, nullptr); }
inline void dequantize_4bit(const Dequantize4bit& d) { cuda::dequantize_4bit(d, nullptr); }
inline void quantize_blockwise(const QuantizeBlockwise& d) { cuda::quantize_blockwise(d, nullptr); }
inline void dequantize_blockwise(const DequantizeBlockwise& d) { cuda::dequantize_blockwise(d, nullptr); }

inline std::vector<std::string_view> supported_isas() { return {"forward", "reversed", "random"}; }
inline void force_isa(std::string_view order) {
  for (const auto o : emulator::kOrders)
    if (order.empty() || order == emulator::name(o)) return emulator::set_order(o);
}

}  // namespace bnb::test
