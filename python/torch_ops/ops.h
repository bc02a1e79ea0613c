// The operators of torch.ops.bitsandbytes for any device: tensors are checked and made contiguous here, then the core runs on their memory.
// Schemas, shape functions and autograd live in Python (bitsandbytes/_ops.py).
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
#include "check.h"
#include "formats.h"

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

template <class Device> struct Args : Checker {
  Device device;

  // `home` is the tensor whose device all others must share: the argument A of every operator.
  Args(std::string_view op, const Tensor& home) : Checker(op), device(home) {}

  // The tensor as the core may read it: on the device, contiguous.
  Tensor input(std::string_view argument, const Tensor& t) const {
    on_device(argument, t);
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }
  void on_device(std::string_view argument, const Tensor& t) const {
    if (!device.holds(t)) [[unlikely]]
      fail(argument, "on " + device_of(t), device.text());
  }
  void type(std::string_view argument, const Tensor& t, ScalarType wanted) const {
    if (type_of(t) != wanted) [[unlikely]]
      fail(argument, std::string("of dtype ") + name_of(type_of(t)), name_of(wanted));
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
    return result(out, dtype);
  }
  // A tensor that new_empty made.
  View result(const Tensor& out, ScalarType dtype) const {
    const int64_t n = out.numel();
    return {n ? out.mutable_data_ptr() : nullptr, float_type("out", dtype), n};
  }
  // Packed codes may be stored under any of these; what counts is their bytes.
  void storage(std::string_view argument, ScalarType t) const {
    using enum ScalarType;
    for (ScalarType s : {Byte, Char, Short, Int, Long, Half, BFloat16, Float, Double})
      if (t == s) return;
    fail(argument, std::string("of dtype ") + name_of(t), "an integer or floating point dtype of at most 64 bits");
  }
  Tensor packed(std::string_view argument, const Tensor& t) const {
    storage(argument, type_of(t));
    return input(argument, t);
  }
  Tensor map(std::string_view argument, const Tensor& t) const {
    equal(argument, t.numel(), 256, "the values of all codes");
    return floats(argument, t);
  }
};

// A bias that lives as long as the call.
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

template <class T> std::span<const T> read(const Tensor& t) {
  const auto n = static_cast<size_t>(t.numel());
  return {n ? static_cast<const T*>(t.const_data_ptr()) : nullptr, n};
}
template <class T> std::span<T> write(const Tensor& t) {
  const auto n = static_cast<size_t>(t.numel());
  return {n ? static_cast<T*>(t.mutable_data_ptr()) : nullptr, n};
}

inline std::span<const int64_t> sizes(const Tensor& t) { return {t.sizes().data(), t.sizes().size()}; }

inline std::span<const uint8_t> bytes(const Tensor& t) {
  const int64_t n = t.numel() * item_size(type_of(t));
  return {n ? static_cast<const uint8_t*>(t.const_data_ptr()) : nullptr, static_cast<size_t>(n)};
}
inline std::span<uint8_t> mutable_bytes(const Tensor& t) {
  const int64_t n = t.numel() * item_size(type_of(t));
  return {n ? static_cast<uint8_t*>(t.mutable_data_ptr()) : nullptr, static_cast<size_t>(n)};
}

// A contiguous tensor on the device of `like`. Past the dispatcher, which looks "aten::new_empty" up by name: 1 us less.
template <class Device> Owned new_owned(const Args<Device>& args, const Tensor& like, std::span<const int64_t> shape, ScalarType dtype) {
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
    throw Error(Errc::out_of_memory, args.op() + ": not enough memory for a result of shape " + text(shape) + " in " + name_of(dtype));
  return Owned(made);
}
template <class Device> Tensor new_empty(const Args<Device>& args, const Tensor& like, std::span<const int64_t> shape, ScalarType dtype) {
  return Tensor(new_owned(args, like, shape, dtype).release());
}

template <class Device>
std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& a, int64_t blocksize, const Str& quant_type, ScalarType storage) {
  const Args<Device> args("quantize_4bit", a);
  const Tensor x = args.input("A", a);
  Quantize4bit d{args.quant_type(quant_type), blocksize, args.values("A", x), {}, {}};
  args.blocksize(blocksize);
  args.storage("quant_storage", storage);
  const int64_t packed = packed_size(d.x.size);
  const Tensor absmax = new_empty(args, x, std::array{blocks_of(d.x.size, blocksize)}, ScalarType::Float);
  const Tensor out = new_empty(args, x, std::array{blocks_of(packed, item_size(storage)), int64_t{1}}, storage);
  d.codes = mutable_bytes(out);
  if (std::ssize(d.codes) != packed) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(out.get()));  // for the bytes behind the last code
  d.absmax = write<float>(absmax);
  args.device.quantize_4bit(d);
  return {out, absmax};
}

template <class Device>
void dequantize_4bit_into(const Args<Device>& args, const Tensor& a, const Tensor& absmax, int64_t blocksize, const Str& quant_type,
                          const Sizes& shape, ScalarType dtype, const Tensor& out) {
  const Tensor codes = args.packed("A", a), scales = args.floats("absmax", absmax);
  args.elements("shape", shape);
  const View y = args.output(out, dtype, shape);
  args.device.dequantize_4bit({args.quant_type(quant_type), blocksize, bytes(codes), read<float>(scales), y});
}

template <class Device>
Tensor dequantize_4bit(const Tensor& a, const Tensor& absmax, int64_t blocksize, const Str& quant_type, const Sizes& shape,
                       ScalarType dtype) {
  const Args<Device> args("dequantize_4bit", a);
  args.float_type("dtype", dtype);
  const int64_t n = args.elements("shape", shape);
  args.size("A", bytes(args.packed("A", a)), packed_size(n));  // before memory of that size is asked for
  const Tensor out = new_empty(args, a, shape, dtype);
  dequantize_4bit_into(args, a, absmax, blocksize, quant_type, shape, dtype, out);
  return out;
}

template <class Device>
void dequantize_4bit_out(const Tensor& a, const Tensor& absmax, int64_t blocksize, const Str& quant_type, const Sizes& shape,
                         ScalarType dtype, const Tensor& out) {
  dequantize_4bit_into(Args<Device>("dequantize_4bit", a), a, absmax, blocksize, quant_type, shape, dtype, out);
}

template <class Device> std::tuple<Tensor, Tensor> quantize_blockwise(const Tensor& a, const Tensor& code, int64_t blocksize) {
  const Args<Device> args("quantize_blockwise", a);
  const Tensor x = args.input("A", a), map = args.map("code", code);
  args.blocksize(blocksize);
  const ConstView values = args.values("A", x);
  const Tensor out = new_empty(args, x, sizes(x), ScalarType::Byte);
  const Tensor absmax = new_empty(args, x, std::array{blocks_of(values.size, blocksize)}, ScalarType::Float);
  args.device.quantize_blockwise({blocksize, read<float>(map), values, write<uint8_t>(out), write<float>(absmax)});
  return {out, absmax};
}

template <class Device>
void dequantize_blockwise_into(const Args<Device>& args, const Tensor& a, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                               ScalarType dtype, const Tensor& out) {
  args.type("A", a, ScalarType::Byte);
  const Tensor codes = args.input("A", a), scales = args.floats("absmax", absmax), map = args.map("code", code);
  const View y = args.output(out, dtype, codes.sizes());
  args.device.dequantize_blockwise({blocksize, read<float>(map), read<uint8_t>(codes), read<float>(scales), y});
}

template <class Device>
Tensor dequantize_blockwise(const Tensor& a, const Tensor& absmax, const Tensor& code, int64_t blocksize, ScalarType dtype) {
  const Args<Device> args("dequantize_blockwise", a);
  args.float_type("dtype", dtype);
  args.type("A", a, ScalarType::Byte);
  args.on_device("A", a);
  const Tensor out = new_empty(args, a, sizes(a), dtype);
  dequantize_blockwise_into(args, a, absmax, code, blocksize, dtype, out);
  return out;
}

template <class Device>
void dequantize_blockwise_out(const Tensor& a, const Tensor& absmax, const Tensor& code, int64_t blocksize, ScalarType dtype,
                              const Tensor& out) {
  dequantize_blockwise_into(Args<Device>("dequantize_blockwise", a), a, absmax, code, blocksize, dtype, out);
}

// y = a @ W^T: the parts that gemm_4bit, linear_4bit and gemv_4bit share. `d` holds the weight; shapes are [..., k] x [n, k] -> [..., n].
template <class Device> struct Product {
  const Args<Device>& args;
  Gemm4bit d;
  Tensor a;

  Product(const Args<Device>& args, const Tensor& activations, const Sizes& shape_b) : args(args), a(args.input("A", activations)) {
    if (shape_b.size() != 2 || shape_b[0] < 0 || shape_b[1] < 0)
      args.fail("shapeB", std::to_string(shape_b.size()) + " sizes", "the two sizes [n, k] of the weight");
    set_sizes(shape_b[0], shape_b[1]);
  }
  Product(const Args<Device>& args, const Tensor& activations, int64_t n, int64_t k) : args(args), a(args.input("A", activations)) {
    set_sizes(n, k);
  }
  // absmax: of the blocks, or, if there is absmax_8bit, of its blocks.
  Owned multiply(const Tensor& b, const Tensor& absmax, const std::optional<Tensor>& bias, const Tensor* absmax_8bit = nullptr,
                 const Tensor* absmax_code = nullptr, const Tensor* absmax_offset = nullptr) {
    const Tensor codes = args.packed("B", b), scales = args.floats("absmax", absmax);
    d.codes = bytes(codes);
    const Bias<Device> kept_bias(args, bias, d.n);
    d.bias = kept_bias.view;
    std::optional<Tensor> kept_8bit, kept_code, kept_offset;  // contiguous copies live as long as the call
    if (absmax_8bit) {
      if (!absmax_code || !absmax_offset) args.fail("absmax_8bit", "given alone", "absmax_code and absmax_offset beside it");
      args.type("absmax_8bit", *absmax_8bit, ScalarType::Byte);
      kept_8bit = args.input("absmax_8bit", *absmax_8bit);
      kept_code = args.map("absmax_code", *absmax_code);
      kept_offset = args.floats("absmax_offset", *absmax_offset);
      args.equal("absmax_offset", kept_offset->numel(), 1, "one value");
      d.absmax.codes = read<uint8_t>(*kept_8bit);
      d.absmax.code = read<float>(*kept_code);
      d.absmax.nested = read<float>(scales);
      args.device.set_offset(d.absmax, *kept_offset);
    } else {
      if (absmax_code || absmax_offset) args.fail(absmax_code ? "absmax_code" : "absmax_offset", "given alone", "absmax_8bit beside it");
      d.absmax.values = read<float>(scales);
    }
    return run();
  }
  Sizes shape() const {
    Sizes s(a.sizes().begin(), a.sizes().end());
    s.back() = d.n;
    return s;
  }
  Owned run() {
    args.product("shapeB", d.n, d.k);
    const int64_t size = args.product("out", d.m, d.n);
    args.size("B", d.codes, packed_size(d.n * d.k));
    Owned out = new_owned(args, a, shape(), type_of(a));
    View y{nullptr, d.a.dtype, size};
    if (size != 0) TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(out.get(), &y.data));
    run_into(y);
    return out;
  }
  void run_into(const Tensor& out) {
    args.product("out", d.m, d.n);
    run_into(args.output(out, type_of(a), shape()));
  }

 private:
  void run_into(const View& out) {
    d.out = out;
    d.batch_invariant = deterministic_algorithms();
    args.device.gemm_4bit(d, [&](int64_t size) { return new_empty(args, a, std::array{size}, ScalarType::Byte); });
  }
  void set_sizes(int64_t n, int64_t k) {
    d.a = args.values("A", a);
    d.n = n;
    d.k = k;
    const auto shape = a.sizes();
    if (shape.size() == 0 || shape[shape.size() - 1] != k)
      args.fail("A", shape.size() ? "of last size " + std::to_string(shape[shape.size() - 1]) : "a scalar",
                "a last size of " + std::to_string(k) + ", as shapeB says");
    d.m = args.elements("A", {shape.data(), shape.size() - 1});
  }
};

inline const Tensor* pointer(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

template <class Device>
Owned gemm_4bit(const Tensor& a, const Tensor& b, const Sizes& shape_b, const Tensor& absmax, int64_t blocksize, const Str& quant_type,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& absmax_8bit, const std::optional<Tensor>& absmax_code,
                const std::optional<Tensor>& absmax_offset) {
  const Args<Device> args("gemm_4bit", a);
  Product<Device> product(args, a, shape_b);
  product.d.type = args.quant_type(quant_type);
  product.d.blocksize = blocksize;
  return product.multiply(b, absmax, bias, pointer(absmax_8bit), pointer(absmax_code), pointer(absmax_offset));
}

// gemm_4bit with one number for the sizes and the format, n << 33 | k << 4 | fp4 << 3 | log2(blocksize / 32): each number that is passed
// takes a quarter of a microsecond, a list and a string more.
template <class Device, class... Nested>
Owned linear_4bit(const Tensor& a, const Tensor& b, const Tensor& absmax, int64_t layout, const std::optional<Tensor>& bias,
                  const Nested&... nested) {
  const Args<Device> args("linear_4bit", a);
  args.that(layout >= 0, "layout", layout, "0 or more");
  Product<Device> product(args, a, layout >> 33, layout >> 4 & 0x1fffffff);
  product.d.type = layout & 8 ? QuantType::fp4 : QuantType::nf4;
  product.d.blocksize = int64_t{32} << (layout & 7);
  return product.multiply(b, absmax, bias, &nested...);
}

// gemv_4bit names the format by its code values, so they must be read: on a GPU the call then waits for the stream, and cannot be captured
// into a graph. gemm_4bit takes a name instead.
template <class Device> QuantType type_of_code(const Args<Device>& args, const Tensor& code) {
  args.equal("code", code.numel(), 16, "the values of all codes");
  const Tensor map = args.device.on_host(args.floats("code", code));
  const auto given = read<float>(map);
  for (QuantType t : {QuantType::nf4, QuantType::fp4})
    if (std::ranges::equal(given, values_of(t))) return t;
  args.fail("code", "16 other values", "those of nf4 or fp4");
}

// run(product) with the weight of gemv_4bit.
template <class Device>
auto gemv_4bit_with(const Tensor& a, const Tensor& b, const Sizes& shape_b, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                    auto&& run) {
  const Args<Device> args("gemv_4bit", a);
  Product<Device> product(args, a, shape_b);
  const Tensor codes = args.packed("B", b), scales = args.floats("absmax", absmax);
  product.d.type = type_of_code(args, code);
  product.d.blocksize = blocksize;
  product.d.codes = bytes(codes);
  product.d.absmax.values = read<float>(scales);
  return run(product);
}

template <class Device>
Owned gemv_4bit(const Tensor& a, const Tensor& b, const Sizes& shape_b, const Tensor& absmax, const Tensor& code, int64_t blocksize) {
  return gemv_4bit_with<Device>(a, b, shape_b, absmax, code, blocksize, [](auto& product) { return product.run(); });
}

template <class Device>
void gemv_4bit_out(const Tensor& a, const Tensor& b, const Sizes& shape_b, const Tensor& absmax, const Tensor& code, int64_t blocksize,
                   const Tensor& out) {
  gemv_4bit_with<Device>(a, b, shape_b, absmax, code, blocksize, [&](auto& product) { product.run_into(out); });
}

template <class Device> void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("quantize_4bit", Boxed<quantize_4bit<Device>>::call);
  m.impl("dequantize_4bit", Boxed<dequantize_4bit<Device>>::call);
  m.impl("dequantize_4bit.out", Boxed<dequantize_4bit_out<Device>>::call);
  m.impl("quantize_blockwise", Boxed<quantize_blockwise<Device>>::call);
  m.impl("dequantize_blockwise", Boxed<dequantize_blockwise<Device>>::call);
  m.impl("dequantize_blockwise.out", Boxed<dequantize_blockwise_out<Device>>::call);
  m.impl("gemv_4bit", Boxed<gemv_4bit<Device>>::call);
  m.impl("gemv_4bit.out", Boxed<gemv_4bit_out<Device>>::call);
  m.impl("gemm_4bit", Boxed<gemm_4bit<Device>>::call);
  m.impl("linear_4bit", Boxed<linear_4bit<Device>>::call);
  m.impl("linear_4bit.nested", Boxed<linear_4bit<Device, Tensor, Tensor, Tensor>>::call);
}

}  // namespace bnb::torch_ops
