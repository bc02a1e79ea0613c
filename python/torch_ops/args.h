// The arguments and results of the operators of torch.ops.bitsandbytes for any device: tensors are checked and made contiguous here, then
// the core runs on their memory.
//
// A Device is one call's view of where it runs. It supplies
//   explicit Device(const Tensor& home)             makes the device of `home` the current one for as long as it lives
//   bool holds(const Tensor&), std::string text()   whether a tensor is on that device, and its name
//   AtenTensorHandle no_memory(shape, dtype)        what to do when torch could not allocate: throw, or null for the common message
//   quantize_4bit(d) ...                            the operations of the core
//   gemm_4bit(d, allocate)                          likewise; allocate(bytes) gives it a tensor to work in
//   set_offset(absmax, t)                           the offset of nested absmax, which is the one element of t
//   Tensor on_host(t)                               t, or a copy that the CPU can read
#pragma once

#include <bnb/bnb.h>

#include <algorithm>
#include <array>

#include "box.h"
#include "common/check.h"
#include "common/formats.h"

namespace bnb::torch_ops {

using Sizes = std::vector<int64_t>;

// at::globalContext().deterministicAlgorithms(): the stable ABI has no query for it. Weak, so that a torch without these two symbols loads
// all the same, and then always gets the invariant path.
extern "C" {
[[gnu::weak]] void* torch_global_context() __asm__("_ZN2at13globalContextEv");
[[gnu::weak]] bool torch_deterministic_algorithms(const void* context) __asm__("_ZNK2at7Context23deterministicAlgorithmsEv");
}
inline bool deterministic_algorithms() {
  return !torch_global_context || !torch_deterministic_algorithms || torch_deterministic_algorithms(torch_global_context());
}

// The dtypes that operators know: torch's number for each, which a call of the stable ABI gives, its name in Python and its bytes.
struct TypeInfo {
  ScalarType type;
  const char* name;
  int64_t size;
  int32_t number;
};
inline std::span<const TypeInfo> known_types() {
  using enum ScalarType;
  static const auto known = [] {
    std::array types{TypeInfo{BFloat16, "bfloat16", 2, 0}, TypeInfo{Half, "float16", 2, 0}, TypeInfo{Float, "float32", 4, 0},
                     TypeInfo{Byte, "uint8", 1, 0},        TypeInfo{Char, "int8", 1, 0},    TypeInfo{Short, "int16", 2, 0},
                     TypeInfo{Int, "int32", 4, 0},         TypeInfo{Long, "int64", 8, 0},   TypeInfo{Double, "float64", 8, 0},
                     TypeInfo{Bool, "bool", 1, 0}};
    for (auto& t : types) t.number = torch::stable::detail::to<int32_t>(torch::stable::detail::from(t.type));
    return types;
  }();
  return known;
}
inline const TypeInfo* known(ScalarType t) {
  const auto found = std::ranges::find(known_types(), t, &TypeInfo::type);
  return found != known_types().end() ? &*found : nullptr;
}
// As Tensor::scalar_type(), which compares the number with that of one dtype after the other, each a call into torch.
inline ScalarType type_of(const Tensor& t) {
  int32_t number = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  const auto found = std::ranges::find(known_types(), number, &TypeInfo::number);
  return found != known_types().end() ? found->type : t.scalar_type();
}
inline int32_t number_of(ScalarType t) {
  const auto* type = known(t);
  return type ? type->number : torch::stable::detail::to<int32_t>(torch::stable::detail::from(t));
}
inline int64_t item_size(ScalarType t) {
  const auto* type = known(t);
  return type ? type->size : static_cast<int64_t>(aoti_torch_dtype_element_size(number_of(t)));
}
inline const char* name_of(ScalarType t) {
  const auto* type = known(t);
  return type ? type->name : torch::headeronly::toString(t);
}

// As Python writes it: cuda:0.
inline std::string device_of(const Tensor& t) {
  using enum torch::headeronly::DeviceType;
  constexpr std::pair<torch::headeronly::DeviceType, const char*> kNames[] = {
      {CPU, "cpu"}, {CUDA, "cuda"}, {XPU, "xpu"}, {HPU, "hpu"}, {MPS, "mps"}, {Meta, "meta"}, {PrivateUse1, "privateuseone"}};
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  const auto known = std::ranges::find(kNames, type, [](const auto& entry) { return static_cast<int32_t>(entry.first); });
  const int32_t index = t.get_device_index();
  std::string name = known != std::end(kNames) ? known->second : "device type " + std::to_string(type);
  if (index >= 0) name.append(":").append(std::to_string(index));
  return name;
}

inline std::string text(std::span<const int64_t> shape) {
  std::string s;
  for (int64_t size : shape) s.append(s.empty() ? "[" : ", ").append(std::to_string(size));
  return s.empty() ? "[]" : s + "]";
}

inline std::span<const int64_t> sizes(const Tensor& t) { return {t.sizes().data(), t.sizes().size()}; }

template <class Device> struct Args : Checker {
  Device device;

  // `home` is the tensor whose device all others must share: the argument A of every operator.
  Args(std::string_view op, const Tensor& home) : Checker(op), device(home) {}

  // The tensor as the core may read it: on the device, contiguous.
  Tensor input(std::string_view argument, const Tensor& t) const {
    on_device(argument, t);
    return t.is_contiguous() ? t : contiguous_copy(argument, t);
  }
  // None reaches a kernel as an undefined tensor.
  void present(std::string_view argument, const Tensor& t) const {
    if (!t.defined()) [[unlikely]]
      fail(argument, "None", "a Tensor");
  }
  void on_device(std::string_view argument, const Tensor& t) const {
    present(argument, t);
    if (!device.holds(t)) [[unlikely]]
      fail(argument, "on " + device_of(t), device.text());
  }
  void type(std::string_view argument, const Tensor& t, ScalarType wanted) const {
    present(argument, t);
    if (type_of(t) != wanted) [[unlikely]]
      fail(argument, std::string("of dtype ") + name_of(type_of(t)), name_of(wanted));
  }
  void count(std::string_view argument, const Tensor& t, int64_t expected, std::string_view meaning) const {
    if (t.numel() == expected) [[likely]]
      return;
    present(argument, t);
    equal(argument, t.numel(), expected, meaning);
  }
  DType float_type(std::string_view argument, ScalarType t) const {
    switch (t) {
      case ScalarType::Float: return DType::f32;
      case ScalarType::Half: return DType::f16;
      case ScalarType::BFloat16: return DType::bf16;
      default: fail(argument, std::string("of dtype ") + name_of(t), "float32, float16 or bfloat16");
    }
  }
  QuantType quant_type(std::string_view text) const {
    for (QuantType t : {QuantType::nf4, QuantType::fp4})
      if (name(t) == text) return t;
    fail("quant_type", std::string("\"").append(text) += '"', "\"nf4\" or \"fp4\"");
  }

  Tensor floats(std::string_view argument, const Tensor& t) const {
    type(argument, t, ScalarType::Float);
    return input(argument, t);
  }
  ConstView values(std::string_view argument, const Tensor& contiguous) const {
    const int64_t n = contiguous.numel();
    return {n ? contiguous.const_data_ptr() : nullptr, float_type(argument, type_of(contiguous)), n};
  }
  View mutable_values(std::string_view argument, const Tensor& contiguous) const {
    const int64_t n = contiguous.numel();
    return {n ? contiguous.mutable_data_ptr() : nullptr, float_type(argument, type_of(contiguous)), n};
  }
  int64_t elements(std::string_view argument, std::span<const int64_t> shape) const {
    int64_t n = 1;
    for (int64_t s : shape) n = product(argument, n, s);
    return n;
  }
  // An `out` tensor: contiguous, of the given type and shape.
  void check_output(const Tensor& out, ScalarType dtype, std::span<const int64_t> shape) const {
    on_device("out", out);
    type("out", out, dtype);
    if (!std::ranges::equal(out.sizes(), shape)) [[unlikely]]
      fail("out", "of shape " + text(out.sizes()), text(shape));
    if (!out.is_contiguous()) fail("out", "not contiguous", "a contiguous tensor");
  }
  View output(const Tensor& out, ScalarType dtype, std::span<const int64_t> shape) const {
    check_output(out, dtype, shape);
    return mutable_values("out", out);
  }
  // Packed codes may be stored under any of these; what counts is their bytes.
  void storage(std::string_view argument, ScalarType t) const {
    using enum ScalarType;
    for (ScalarType s : {Byte, Char, Short, Int, Long, Half, BFloat16, Float, Double})
      if (t == s) return;
    fail(argument, std::string("of dtype ") + name_of(t), "an integer or floating point dtype of at most 64 bits");
  }
  // Exactly the items that hold the codes of n elements: a longer tensor belongs to another weight, or was cast.
  Tensor packed(std::string_view argument, const Tensor& t, int64_t n) const {
    present(argument, t);
    const ScalarType type = type_of(t);
    storage(argument, type);
    const int64_t item = item_size(type), given = t.numel() * item, expected = blocks_of(packed_size(n), item) * item;
    if (given != expected) [[unlikely]]
      fail(argument, std::to_string(given) + " bytes", std::to_string(expected) + " for " + std::to_string(n) + " elements");
    return input(argument, t);
  }
  // Scales, one per block.
  Tensor absmax(std::string_view argument, const Tensor& t, int64_t n, int64_t blocksize, ScalarType wanted = ScalarType::Float) const {
    type(argument, t, wanted);
    equal(argument, t.numel(), blocks_of(n, blocksize), "one for each block");
    return input(argument, t);
  }
  Tensor map(std::string_view argument, const Tensor& t) const {
    count(argument, t, 256, "the values of all codes");
    return floats(argument, t);
  }

 private:
  Tensor contiguous_copy(std::string_view argument, const Tensor& t) const {
    Tensor copy(new_owned(*this, t, sizes(t), type_of(t), std::string("a contiguous copy of ").append(argument)).release());
    torch::stable::copy_(copy, t);
    return copy;
  }
};

// A bias, kept alive as long as the call.
template <class Device> struct Bias {
  std::optional<Tensor> kept;
  ConstView view = {};
  Bias(const Args<Device>& args, const std::optional<Tensor>& bias, int64_t n) {
    if (!bias) return;
    kept = args.input("bias", *bias);
    view = args.values("bias", *kept);
    args.equal("bias", view.size, n, "n elements");
  }
};

// The elements of a contiguous tensor; `n` if the caller has counted them already.
template <class T> std::span<const T> read(const Tensor& t, int64_t n) {
  return {n ? static_cast<const T*>(t.const_data_ptr()) : nullptr, static_cast<size_t>(n)};
}
template <class T> std::span<const T> read(const Tensor& t) { return read<T>(t, t.numel()); }
template <class T> std::span<T> write(const Tensor& t) {
  const auto n = static_cast<size_t>(t.numel());
  return {n ? static_cast<T*>(t.mutable_data_ptr()) : nullptr, n};
}

inline std::span<uint8_t> mutable_bytes(const Tensor& t) {
  const int64_t n = t.numel() * item_size(type_of(t));
  return {n ? static_cast<uint8_t*>(t.mutable_data_ptr()) : nullptr, static_cast<size_t>(n)};
}

// A contiguous tensor on the device of `like`; messages say it is for `purpose`. Bypasses the dispatcher, which would look up
// "aten::new_empty" by name: 1 us less.
template <class Device>
Owned new_owned(const Args<Device>& args, const Tensor& like, std::span<const int64_t> shape, ScalarType dtype,
                std::string_view purpose = "a result") {
  int64_t few[8];
  Sizes many(shape.size() > std::size(few) ? shape.size() : 0);
  int64_t* const strides = many.empty() ? few : many.data();
  for (int64_t i = std::ssize(shape) - 1, stride = 1; i >= 0; stride *= std::max<int64_t>(1, shape[static_cast<size_t>(i--)]))
    strides[i] = stride;
  int32_t device = 0, index = 0;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  if (aoti_torch_empty_strided(std::ssize(shape), shape.data(), strides, number_of(dtype), device, index, &made) != 0)
    made = args.device.no_memory(shape, dtype);
  if (!made)
    throw Error(Errc::out_of_memory,
                args.op().append(": not enough memory for ").append(purpose) + " of shape " + text(shape) + " in " + name_of(dtype));
  return Owned(made);
}
template <class Device> Tensor new_empty(const Args<Device>& args, const Tensor& like, std::span<const int64_t> shape, ScalarType dtype) {
  return Tensor(new_owned(args, like, shape, dtype).release());
}

}  // namespace bnb::torch_ops
