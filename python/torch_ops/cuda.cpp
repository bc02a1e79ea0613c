// torch.ops.bitsandbytes on CUDA GPUs: on torch's current stream, with memory of torch's allocator, without waiting for the device.
//
// Links the CPU half of torch only, so that it builds with any torch. The two functions of its CUDA half are looked up in the library that
// made the tensors.
#include <bnb/cuda.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "int8.h"
#include "ops.h"
#include "optim.h"

namespace bnb::torch_ops {
namespace {

template <class F> F* torch_cuda_function(const char* name) {
  static void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? reinterpret_cast<F*>(dlsym(library, name)) : nullptr;
}

cuda::Stream current_stream(int32_t device) {
  static const auto get = torch_cuda_function<AOTITorchError(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
  cuda::Stream stream = nullptr;
  if (!get || get(device, &stream) != 0) throw Error(Errc::unsupported, "bitsandbytes: this torch does not tell its current CUDA stream");
  return stream;
}

// at::detail::empty_cuda(IntArrayRef, ScalarType, optional<Device>, optional<MemoryFormat>), which throws torch.OutOfMemoryError. The
// stable ABI only says that an allocation failed.
struct NewTensor {  // at::TensorBase
  void* impl = nullptr;
  NewTensor() = default;
  ~NewTensor() {}  // not trivial: returned through memory
};
struct TensorDevice {  // c10::Device
  int8_t type, index;
};
constexpr auto kEmptyCuda =
    "_ZN2at6detail10empty_cudaEN3c108ArrayRefIlEENS1_10ScalarTypeESt8optionalINS1_6DeviceEES5_INS1_12MemoryFormatEE";
using EmptyCuda = NewTensor(std::span<const int64_t>, ScalarType, std::optional<TensorDevice>, std::optional<int8_t>);

class Cuda {
 public:
  explicit Cuda(const Tensor& home) {
    if (!home.is_cuda()) return;  // another argument is: holds() will refuse this one
    index_ = home.get_device_index();
    guard_.emplace(index_);
    stream_ = current_stream(index_);
  }
  bool holds(const Tensor& t) const { return index_ >= 0 && t.is_cuda() && t.get_device_index() == index_; }
  std::string text() const { return index_ < 0 ? "cuda" : "cuda:" + std::to_string(index_); }

  AtenTensorHandle no_memory(std::span<const int64_t> shape, ScalarType dtype) const {
    static const auto empty_cuda = torch_cuda_function<EmptyCuda>(kEmptyCuda);
    if (!empty_cuda) return nullptr;
    constexpr auto kType = static_cast<int8_t>(torch::headeronly::DeviceType::CUDA);
    // A handle is a pointer to a tensor on the heap, which is one pointer to its implementation.
    return reinterpret_cast<AtenTensorHandle>(
        new NewTensor(empty_cuda(shape, dtype, TensorDevice{kType, static_cast<int8_t>(index_)}, std::nullopt)));
  }

  void quantize_4bit(const Quantize4bit& d) const { cuda::quantize_4bit(d, stream_); }
  void dequantize_4bit(const Dequantize4bit& d) const { cuda::dequantize_4bit(d, stream_); }
  void quantize_blockwise(const QuantizeBlockwise& d) const { cuda::quantize_blockwise(d, stream_); }
  void dequantize_blockwise(const DequantizeBlockwise& d) const { cuda::dequantize_blockwise(d, stream_); }
  void gemm_4bit(const Gemm4bit& d, auto&& allocate) const {
    // Given back to torch's allocator when the call returns: it hands memory out again in the order of the stream.
    std::optional<Tensor> workspace;
    if (const int64_t bytes = cuda::gemm_4bit_workspace(d)) workspace = allocate(bytes);
    cuda::gemm_4bit(d, workspace ? workspace->mutable_data_ptr() : nullptr, stream_);
  }
  void set_offset(Absmax& absmax, const Tensor& t) const { absmax.device_offset = read<float>(t).data(); }

  Tensor on_host(const Tensor& t) const {
    Tensor copy = host_tensor(t.numel(), aoti_torch_dtype_float32());
    torch::stable::copy_(copy, t);
    return copy;
  }

  // The list has as many columns as there are, so with a threshold the call waits for the stream. int8_linear does without.
  std::optional<Tensor> quantize_int8(QuantizeInt8 d, auto&& allocate) const {
    if (d.threshold == 0) {
      cuda::quantize_int8(d, stream_);
      return std::nullopt;
    }
    const int64_t words = outlier_words(d.columns);
    const Tensor bits = allocate(words);
    d.outliers = {words ? static_cast<uint64_t*>(bits.mutable_data_ptr()) : nullptr, static_cast<size_t>(words)};
    cuda::quantize_int8(d, stream_);
    Tensor found = host_tensor(words, aoti_torch_dtype_int64());
    torch::stable::copy_(found, bits);
    const std::span on_cpu(static_cast<const uint64_t*>(found.const_data_ptr()), static_cast<size_t>(words));
    const auto listed = outlier_columns(on_cpu);
    const Tensor list = host_tensor(std::ssize(listed), aoti_torch_dtype_int64());
    std::ranges::copy(listed, write<int64_t>(list).data());
    Tensor columns = allocate(std::ssize(listed));
    torch::stable::copy_(columns, list);
    return columns;
  }
  void quantize_columns_int8(const QuantizeColumnsInt8& d) const { cuda::quantize_columns_int8(d, stream_); }
  void dequantize_int8(const DequantizeInt8& d) const { cuda::dequantize_int8(d, stream_); }
  void dequantize_sums(const DequantizeSums& d) const { cuda::dequantize_sums(d, stream_); }
  void gemm_int8(const GemmInt8& d) const { cuda::gemm_int8(d, stream_); }
  void linear_int8(const LinearInt8& d, auto&& allocate) const {
    std::optional<Tensor> workspace;
    if (const int64_t bytes = cuda::linear_int8_workspace(d)) workspace = allocate(bytes);
    cuda::linear_int8(d, workspace ? workspace->mutable_data_ptr() : nullptr, stream_);
  }
  void gather_columns(const GemmInt8& d, void* to) const { cuda::gather_columns(d, to, stream_); }
  void optimizer_step(const OptimizerStep& s, int64_t* clock, auto&& allocate) const {
    std::optional<Tensor> workspace;
    if (const int64_t bytes = cuda::optimizer_workspace(s)) workspace = allocate(bytes);
    cuda::optimizer_step(s, workspace ? workspace->mutable_data_ptr() : nullptr, clock, stream_);
  }

 private:
  static Tensor host_tensor(int64_t size, int32_t dtype) {
    AtenTensorHandle made = nullptr;
    constexpr int64_t kStride = 1;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &size, &kStride, dtype, aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
  }

  int32_t index_ = -1;
  cuda::Stream stream_ = nullptr;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Memory of functional.get_paged: addresses, as no tensor of torch's own may be one.
int64_t managed_allocate(int64_t bytes, int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  return static_cast<int64_t>(reinterpret_cast<uintptr_t>(cuda::allocate_managed(bytes)));
}
void managed_free(int64_t address) { cuda::free_managed(reinterpret_cast<void*>(static_cast<uintptr_t>(address))); }
void managed_prefetch(const Tensor& t, bool to_cpu) {
  const torch::stable::accelerator::DeviceGuard guard(t.get_device_index());
  cuda::prefetch_managed(t.const_data_ptr(), t.numel() * item_size(type_of(t)), to_cpu, current_stream(t.get_device_index()));
}

STABLE_TORCH_LIBRARY_FRAGMENT(bitsandbytes, m) {
  m.def("managed_allocate(int bytes, int device) -> int");
  m.def("managed_free(int address) -> ()");
  m.def("managed_prefetch(Tensor t, bool to_cpu) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(bitsandbytes, CompositeExplicitAutograd, m) {
  m.impl("managed_allocate", Boxed<managed_allocate>::call);
  m.impl("managed_free", Boxed<managed_free>::call);
}

STABLE_TORCH_LIBRARY_IMPL(bitsandbytes, CUDA, m) {
  register_kernels<Cuda>(m);
  register_int8<Cuda>(m);
  register_optimizers<Cuda>(m);
  m.impl("managed_prefetch", Boxed<managed_prefetch>::call);
}

}  // namespace
}  // namespace bnb::torch_ops
