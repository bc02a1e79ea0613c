// The operators of block-wise quantization and of the 4-bit product for any device (args.h). Schemas, shape functions and autograd live in
// Python (bitsandbytes/_ops_fourbit.py).
#pragma once

#include "args.h"

namespace bnb::torch_ops {

template <class Device>
std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& a, int64_t blocksize, const Str& quant_type, ScalarType storage) {
  const Args<Device> args("quantize_4bit", a);
  const Tensor x = args.input("A", a);
  Quantize4bit d{.type = args.quant_type(quant_type), .blocksize = blocksize, .x = args.values("A", x)};
  args.blocksize(blocksize);
  args.storage("quant_storage", storage);
  const int64_t packed = packed_size(d.x.size);
  const Tensor absmax = new_empty(args, x, std::array{blocks_of(d.x.size, blocksize)}, ScalarType::Float);
  const Tensor out = new_empty(args, x, std::array{blocks_of(packed, item_size(storage)), int64_t{1}}, storage);
  d.codes = mutable_bytes(out);
  if (std::ssize(d.codes) != packed) TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(out.get()));  // for the bytes past the last code
  d.absmax = write<float>(absmax);
  args.device.quantize_4bit(d);
  return {out, absmax};
}

template <class Device>
void dequantize_4bit_into(const Args<Device>& args, const Tensor& a, const Tensor& absmax, int64_t blocksize, const Str& quant_type,
                          const Sizes& shape, ScalarType dtype, const Tensor& out) {
  const int64_t n = args.elements("shape", shape);
  args.blocksize(blocksize);
  const Tensor codes = args.packed("A", a, n), scales = args.absmax("absmax", absmax, n, blocksize);
  const View y = args.output(out, dtype, shape);
  args.device.dequantize_4bit(
      {args.quant_type(quant_type), blocksize, read<uint8_t>(codes, packed_size(n)), read<float>(scales, blocks_of(n, blocksize)), y});
}

template <class Device>
Tensor dequantize_4bit(const Tensor& a, const Tensor& absmax, int64_t blocksize, const Str& quant_type, const Sizes& shape,
                       ScalarType dtype) {
  const Args<Device> args("dequantize_4bit", a);
  args.float_type("dtype", dtype);
  const int64_t n = args.elements("shape", shape);
  args.packed("A", a, n);  // before memory of that size is asked for
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
  args.any_blocksize(blocksize);
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
  args.any_blocksize(blocksize);
  const Tensor codes = args.input("A", a), scales = args.absmax("absmax", absmax, a.numel(), blocksize), map = args.map("code", code);
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
    args.blocksize(d.blocksize);
    const int64_t weights = args.product("shapeB", d.n, d.k), blocks = blocks_of(weights, d.blocksize);
    const Tensor codes = args.packed("B", b, weights);
    const Tensor scales = absmax_8bit ? args.absmax("absmax", absmax, blocks, d.absmax.nested_blocksize)
                                      : args.absmax("absmax", absmax, weights, d.blocksize);
    d.codes = read<uint8_t>(codes, packed_size(weights));
    const Bias<Device> kept_bias(args, bias, d.n);
    d.bias = kept_bias.view;
    std::optional<Tensor> kept_8bit, kept_code, kept_offset;  // contiguous copies live as long as the call
    if (absmax_8bit) {
      if (!absmax_code || !absmax_offset) args.fail("absmax_8bit", "given alone", "absmax_code and absmax_offset beside it");
      kept_8bit = args.absmax("absmax_8bit", *absmax_8bit, weights, d.blocksize, ScalarType::Byte);
      kept_code = args.map("absmax_code", *absmax_code);
      kept_offset = args.floats("absmax_offset", *absmax_offset);
      args.count("absmax_offset", *kept_offset, 1, "one value");
      d.absmax.codes = read<uint8_t>(*kept_8bit, blocks);
      d.absmax.code = read<float>(*kept_code, 256);
      d.absmax.nested = read<float>(scales, blocks_of(blocks, d.absmax.nested_blocksize));
      args.device.set_offset(d.absmax, *kept_offset);
    } else {
      if (absmax_code || absmax_offset) args.fail(absmax_code ? "absmax_code" : "absmax_offset", "given alone", "absmax_8bit beside it");
      d.absmax.values = read<float>(scales, blocks);
    }
    return run();
  }
  Sizes shape() const {
    Sizes s(a.sizes().begin(), a.sizes().end());
    s.back() = d.n;
    return s;
  }
  Owned run() {
    const int64_t size = args.product("out", d.m, d.n);
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

// gemm_4bit with one number for the sizes and the format, n << 33 | k << 4 | fp4 << 3 | log2(blocksize / 32): each number passed
// costs about 0.25 us to unbox, a list or a string more.
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
  args.count("code", code, 16, "the values of all codes");
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
  args.blocksize(blocksize);
  const int64_t weights = args.product("shapeB", product.d.n, product.d.k);
  const Tensor codes = args.packed("B", b, weights), scales = args.absmax("absmax", absmax, weights, blocksize);
  product.d.type = type_of_code(args, code);
  product.d.blocksize = blocksize;
  product.d.codes = read<uint8_t>(codes, packed_size(weights));
  product.d.absmax.values = read<float>(scales, blocks_of(weights, blocksize));
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
  m.impl("linear_4bit.forward", Boxed<linear_4bit<Device>>::call);
  m.impl("linear_4bit.nested_forward", Boxed<linear_4bit<Device, Tensor, Tensor, Tensor>>::call);
}

}  // namespace bnb::torch_ops
