// Lets the tests of the CPU's kernels (tests/cpp) and those of tests/cuda_on_host run on a GPU: hides the operations of the CPU from
// namespace bnb::test. What they do for each instruction set they do here twice: the same call gives the same bytes.
#pragma once

#include <bnb/cuda.h>

#include <array>
#include <string_view>
#include <utility>
#include <vector>

namespace bnb::test {

// Memory of the device for one call: what a descriptor points to, at the same address modulo 256. Inputs end where their allocation ends,
// outputs have guard bytes on both sides.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  ~DeviceMemory();

  // Points every tensor of a descriptor to a copy on the device.
  template <class D> void bring_all(D& d) {
    if constexpr (requires { d.x; }) bring(d.x);
    if constexpr (requires { d.a; }) bring(d.a);
    if constexpr (requires { d.code; }) bring(d.code);
    if constexpr (requires { d.bias; }) bring(d.bias);
    if constexpr (requires { d.out; }) bring(d.out);
    bring(d.codes), bring(d.absmax);
  }
  void* workspace(int64_t bytes);  // of bytes 0xff, which is NaN
  void finish();                   // waits, fetches the outputs, looks at their guards

 private:
  struct Buffer {
    std::byte* memory;  // of the device
    size_t before, bytes, behind;
    void* host;  // where an output goes; null for inputs
  };

  void bring(ConstView& v) { v.data = copy(v.data, v.size * size_of(v.dtype), nullptr); }
  void bring(View& v) { v.data = copy(v.data, v.size * size_of(v.dtype), v.data); }
  template <class T> void bring(std::span<const T>& s) { s = {static_cast<const T*>(copy(s.data(), bytes_of(s), nullptr)), s.size()}; }
  template <class T> void bring(std::span<T>& s) { s = {static_cast<T*>(copy(s.data(), bytes_of(s), s.data())), s.size()}; }
  void bring(Absmax& a) {
    bring(a.values), bring(a.codes), bring(a.code), bring(a.nested);
    if (a.device_offset) a.device_offset = static_cast<const float*>(copy(a.device_offset, sizeof(float), nullptr));
  }
  template <class T> static int64_t bytes_of(std::span<T> s) { return static_cast<int64_t>(s.size_bytes()); }
  void* copy(const void* from, int64_t bytes, void* output);

  std::vector<Buffer> buffers_;
};

// Calls run(the descriptor for the device, `workspace` bytes there).
template <class D, class F> void on_device(D d, int64_t workspace, F&& run) {
  DeviceMemory memory;
  memory.bring_all(d);
  run(std::as_const(d), memory.workspace(workspace));
  memory.finish();
}

inline void quantize_4bit(const Quantize4bit& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::quantize_4bit(on, nullptr); });
}
inline void dequantize_4bit(const Dequantize4bit& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::dequantize_4bit(on, nullptr); });
}
inline void quantize_blockwise(const QuantizeBlockwise& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::quantize_blockwise(on, nullptr); });
}
inline void dequantize_blockwise(const DequantizeBlockwise& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::dequantize_blockwise(on, nullptr); });
}

inline std::vector<std::string_view> supported_isas() { return {"first", "again"}; }
inline void force_isa(std::string_view) {}

}  // namespace bnb::test
