// Makes the tests of the CPU's kernels (tests/cpu) run the CUDA kernels on the host: hides the CPU's operations from namespace bnb::test.
// What they repeat per instruction set is repeated here per order of threads.
#pragma once

#include <bnb/cuda.h>

#include <array>
#include <cstring>
#include <string_view>
#include <vector>

#include "cuda_on_host/emulator.h"

namespace bnb::test {

// Calls run(the descriptor for the device, `workspace` bytes there of 0xff, which is NaN).
template <class D, class F> void on_device(const D& d, int64_t workspace, F&& run) {
  constexpr size_t kAlign = 256, kLibrary = size_t{32} << 20;  // cuBLASLt's part is not filled, to save time
  const auto bytes = static_cast<size_t>(workspace);
  std::vector<std::byte> memory(bytes ? bytes + kAlign : 0);
  std::byte* at = nullptr;
  if (bytes) {
    at = memory.data() + (kAlign - reinterpret_cast<uintptr_t>(memory.data()) % kAlign);
    const size_t first = bytes > kLibrary ? kLibrary : 0;
    std::memset(at + first, 0xff, bytes - first);
  }
  run(d, static_cast<void*>(at));
}

inline void quantize_4bit(const Quantize4bit& d) { cuda::quantize_4bit(d, nullptr); }
inline void dequantize_4bit(const Dequantize4bit& d) { cuda::dequantize_4bit(d, nullptr); }
inline void quantize_blockwise(const QuantizeBlockwise& d) { cuda::quantize_blockwise(d, nullptr); }
inline void dequantize_blockwise(const DequantizeBlockwise& d) { cuda::dequantize_blockwise(d, nullptr); }

inline void quantize_int8(const QuantizeInt8& d) { cuda::quantize_int8(d, nullptr); }
inline void quantize_columns_int8(const QuantizeColumnsInt8& d) { cuda::quantize_columns_int8(d, nullptr); }
inline void dequantize_int8(const DequantizeInt8& d) { cuda::dequantize_int8(d, nullptr); }
inline void dequantize_sums(const DequantizeSums& d) { cuda::dequantize_sums(d, nullptr); }
inline void gemm_int8(const GemmInt8& d) { cuda::gemm_int8(d, nullptr); }
inline void linear_int8(const LinearInt8& d) {
  on_device(d, cuda::linear_int8_workspace(d), [](const LinearInt8& on, void* workspace) { cuda::linear_int8(on, workspace, nullptr); });
}

inline void optimizer_step(const OptimizerStep& s, int64_t* clock = nullptr) {
  on_device(s, cuda::optimizer_workspace(s),
            [&](const OptimizerStep& on, void* workspace) { cuda::optimizer_step(on, workspace, clock, nullptr); });
}

inline std::vector<std::string_view> supported_isas() { return {"forward", "reversed", "random"}; }
inline void force_isa(std::string_view order) {
  for (const auto o : emulator::kOrders)
    if (order.empty() || order == emulator::name(o)) return emulator::set_order(o);
}

}  // namespace bnb::test
