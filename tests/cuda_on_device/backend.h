// Lets the tests of the CPU's kernels (tests/cpu) and those of tests/cuda_on_host run on a GPU: hides the operations of the CPU from
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
    if constexpr (requires { d.codes; }) bring(d.codes);
    if constexpr (requires { d.absmax; }) bring(d.absmax);
    if constexpr (requires { d.scale; }) bring(d.scale);
    if constexpr (requires { d.outliers; }) bring(d.outliers);
    if constexpr (requires { d.b; }) bring(d.b);
    if constexpr (requires { d.sums; }) bring(d.sums);
    if constexpr (requires { d.weight; }) bring(d.weight), bring(d.weight_scale);
    if constexpr (requires { d.to; }) bring(d.to.row_scale), bring(d.to.column_scale), bring(d.to.bias), bring(d.to.out);
  }
  void bring_all(OptimizerTensor& t) {
    bring(t.p), bring(t.g), bring(t.state1), bring(t.state2), bring(t.codes1), bring(t.codes2), bring(t.absmax1), bring(t.absmax2);
    bring(t.u_norm);
  }
  void bring_all(OptimizerStep& s) { bring(s.code1), bring(s.code2); }
  template <class T> void bring(T*& one) {
    if (one) one = static_cast<T*>(copy(one, sizeof(T), one));
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

inline void quantize_int8(const QuantizeInt8& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::quantize_int8(on, nullptr); });
}
inline void quantize_columns_int8(const QuantizeColumnsInt8& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::quantize_columns_int8(on, nullptr); });
}
inline void dequantize_int8(const DequantizeInt8& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::dequantize_int8(on, nullptr); });
}
inline void dequantize_sums(const DequantizeSums& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::dequantize_sums(on, nullptr); });
}
inline void gemm_int8(const GemmInt8& d) {
  on_device(d, 0, [](const auto& on, void*) { cuda::gemm_int8(on, nullptr); });
}
inline void linear_int8(const LinearInt8& d) {
  on_device(d, cuda::linear_int8_workspace(d), [](const auto& on, void* workspace) { cuda::linear_int8(on, workspace, nullptr); });
}

inline void optimizer_step(OptimizerStep s, int64_t* clock = nullptr) {
  DeviceMemory memory;
  std::vector<OptimizerTensor> tensors(s.tensors.begin(), s.tensors.end());
  for (auto& t : tensors) memory.bring_all(t);
  memory.bring_all(s);
  memory.bring(clock);
  s.tensors = tensors;
  cuda::optimizer_step(s, memory.workspace(cuda::optimizer_workspace(s)), clock, nullptr);
  memory.finish();
}

inline std::vector<std::string_view> supported_isas() { return {"first", "again"}; }
inline void force_isa(std::string_view) {}

}  // namespace bnb::test
