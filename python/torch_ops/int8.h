// The operators of LLM.int8() for any device (args.h): names and schemas of the released package, and int8_linear, a whole forward in one
// call. A Device supplies for them
//   quantize_int8(d, allocate)        gives the outlier columns in a tensor of allocate(count) int64, if there is a threshold
//   linear_int8(d, allocate)          allocate(bytes) gives it a tensor to work in
//   gather_columns(d, to)             to[i][c] = x[i][outliers[c]]
//   quantize_columns_int8(d), dequantize_int8(d), dequantize_sums(d), gemm_int8(d)
#pragma once

#include <limits>

#include "args.h"

namespace bnb::torch_ops {

// [..., columns] as rows of a matrix.
struct Matrix {
  int64_t rows = 0, columns = 0;
  template <class Device> Matrix(const Args<Device>& args, std::string_view argument, const Tensor& t) {
    args.present(argument, t);
    const auto shape = t.sizes();
    if (shape.size() == 0) args.fail(argument, "a scalar", "at least one dimension");
    columns = shape[shape.size() - 1];
    rows = args.elements(argument, {shape.data(), shape.size() - 1});
  }
};

inline Sizes with_last(const Tensor& t, int64_t last) {
  Sizes s(t.sizes().begin(), t.sizes().end());
  s.back() = last;
  return s;
}

template <class Device> struct Int8Args : Args<Device> {
  using Args<Device>::Args;

  Tensor codes(std::string_view argument, const Tensor& t) const {
    this->type(argument, t, ScalarType::Char);
    return this->input(argument, t);
  }
  Tensor scales(std::string_view argument, const Tensor& t, int64_t rows) const {
    this->count(argument, t, rows, "one for each row");
    return this->floats(argument, t);
  }
  // Above 0 it stays above 0 in fp32.
  float threshold(double given) const {
    this->that(given >= 0, "threshold", given, "a number of 0 or more");
    const auto rounded = static_cast<float>(given);
    return given > 0 && rounded == 0 ? std::numeric_limits<float>::denorm_min() : rounded;
  }
  Tensor weight(std::string_view argument, const Tensor& t, int64_t columns) const {
    this->present(argument, t);
    if (t.dim() != 2 || t.size(1) != columns) [[unlikely]]
      this->fail(argument, "of shape " + text(sizes(t)), "[N, " + std::to_string(columns) + "], as A says");
    return codes(argument, t);
  }
};

template <class Device> struct QuantizedRows {
  Tensor codes, scale;
  std::optional<Tensor> outliers;  // their columns, if there is a threshold
};

template <class Device>
QuantizedRows<Device> quantize_rows(const Int8Args<Device>& args, const Tensor& a, const Tensor& x, const Matrix& shape, double threshold) {
  QuantizedRows<Device> r;
  r.codes = new_empty(args, x, sizes(a), ScalarType::Char);
  r.scale = new_empty(args, x, std::array{shape.rows}, ScalarType::Float);
  const QuantizeInt8 d{.rows = shape.rows,
                       .columns = shape.columns,
                       .x = args.values("A", x),
                       .threshold = args.threshold(threshold),
                       .codes = write<int8_t>(r.codes),
                       .scale = write<float>(r.scale)};
  r.outliers = args.device.quantize_int8(d, [&](int64_t count) { return new_empty(args, x, std::array{count}, ScalarType::Long); });
  return r;
}

template <class Device> std::tuple<Tensor, Tensor, std::optional<Tensor>> int8_vectorwise_quant(const Tensor& a, double threshold) {
  const Int8Args<Device> args("int8_vectorwise_quant", a);
  const Matrix shape(args, "A", a);
  auto r = quantize_rows(args, a, args.input("A", a), shape, threshold);
  return {std::move(r.codes), std::move(r.scale), std::move(r.outliers)};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>> int8_double_quant(const Tensor& a, double threshold) {
  const Int8Args<Device> args("int8_double_quant", a);
  const Matrix shape(args, "A", a);
  const Tensor x = args.input("A", a);
  auto r = quantize_rows(args, a, x, shape, threshold);
  const Tensor codes = new_empty(args, x, sizes(a), ScalarType::Char);
  const Tensor scale = new_empty(args, x, std::array{shape.columns}, ScalarType::Float);
  args.device.quantize_columns_int8({.rows = shape.rows,
                                     .columns = shape.columns,
                                     .x = args.values("A", x),
                                     .threshold = args.threshold(threshold),
                                     .codes = write<int8_t>(codes),
                                     .scale = write<float>(scale)});
  return {std::move(r.codes), codes, std::move(r.scale), scale, std::move(r.outliers)};
}

template <class Device> Tensor int8_vectorwise_dequant(const Tensor& a, const Tensor& stats) {
  const Int8Args<Device> args("int8_vectorwise_dequant", a);
  const Matrix shape(args, "A", a);
  const Tensor codes = args.codes("A", a), scale = args.scales("stats", stats, shape.rows);
  const Tensor out = new_empty(args, a, sizes(a), ScalarType::Float);
  args.device.dequantize_int8({shape.rows, shape.columns, read<int8_t>(codes), read<float>(scale), args.mutable_values("out", out)});
  return out;
}

// A [..., K] times the transpose of B [N, K].
template <class Device> struct Int8Product {
  const Int8Args<Device>& args;
  Tensor a, b;
  GemmInt8 d;
  Int8Product(const Int8Args<Device>& args, std::string_view a_name, const Tensor& a_given, std::string_view b_name, const Tensor& b_given)
      : args(args), a(args.codes(a_name, a_given)) {
    const Matrix shape(args, a_name, a);
    b = args.weight(b_name, b_given, shape.columns);
    d.m = shape.rows, d.k = shape.columns, d.n = b.size(0);
    d.a = read<int8_t>(a), d.b = read<int8_t>(b);
  }
  void sums_into(const Tensor& out) {
    d.sums = write<int32_t>(out);
    args.device.gemm_int8(d);
  }
};

template <class Device> Tensor int8_linear_matmul(const Tensor& a, const Tensor& b) {
  const Int8Args<Device> args("int8_linear_matmul", a);
  Int8Product<Device> product(args, "A", a, "B", b);
  const Tensor out = new_empty(args, a, with_last(a, product.d.n), ScalarType::Int);
  product.sums_into(out);
  return out;
}

template <class Device> void int8_linear_matmul_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  const Int8Args<Device> args("int8_linear_matmul", a);
  Int8Product<Device> product(args, "A", a, "B", b);
  args.check_output(out, ScalarType::Int, with_last(a, product.d.n));
  product.sums_into(out);
}

template <class Device>
Tensor int8_mm_dequant(const Tensor& a, const Tensor& row_stats, const Tensor& col_stats, std::optional<ScalarType> dtype,
                       const std::optional<Tensor>& bias) {
  const Int8Args<Device> args("int8_mm_dequant", a);
  args.type("A", a, ScalarType::Int);
  const Matrix shape(args, "A", a);
  const Tensor sums = args.input("A", a);
  const Tensor rows = args.scales("row_stats", row_stats, shape.rows), columns = args.scales("col_stats", col_stats, shape.columns);
  const ScalarType type = dtype.value_or(ScalarType::Half);
  args.float_type("dtype", type);
  const Bias<Device> kept(args, bias, shape.columns);
  const Tensor out = new_empty(args, a, sizes(a), type);
  args.device.dequantize_sums({shape.rows,
                               shape.columns,
                               read<int32_t>(sums),
                               {read<float>(rows), read<float>(columns), kept.view, args.mutable_values("out", out)}});
  return out;
}

template <class Device>
Tensor int8_scaled_mm(const Tensor& a, const Tensor& b, const Tensor& row_stats, const Tensor& col_stats, const std::optional<Tensor>& bias,
                      std::optional<ScalarType> dtype) {
  const Int8Args<Device> args("int8_scaled_mm", a);
  Int8Product<Device> product(args, "A", a, "B", b);
  auto& d = product.d;
  const Tensor rows = args.scales("row_stats", row_stats, d.m), columns = args.scales("col_stats", col_stats, d.n);
  const ScalarType type = dtype.value_or(ScalarType::Half);
  args.float_type("dtype", type);
  const Bias<Device> kept(args, bias, d.n);
  const Tensor out = new_empty(args, a, with_last(a, d.n), type);
  d.to = {read<float>(rows), read<float>(columns), kept.view, args.mutable_values("out", out)};
  args.device.gemm_int8(d);
  return out;
}

// The second result holds the outlier columns of A, if outlier_cols is given.
template <class Device>
std::tuple<Tensor, std::optional<Tensor>> int8_mixed_scaled_mm(const Tensor& a, const Tensor& ca, const Tensor& cb, const Tensor& sca,
                                                               const Tensor& scb, const std::optional<Tensor>& outlier_cols,
                                                               const std::optional<Tensor>& bias) {
  const Int8Args<Device> args("int8_mixed_scaled_mm", a);
  Int8Product<Device> product(args, "CA", ca, "CB", cb);
  auto& d = product.d;
  const Tensor x = args.input("A", a), rows = args.scales("SCA", sca, d.m), columns = args.scales("SCB", scb, d.n);
  if (!std::ranges::equal(a.sizes(), ca.sizes())) args.fail("A", "of shape " + text(sizes(a)), text(sizes(ca)) + ", the shape of CA");
  d.x = args.values("A", x);
  const Bias<Device> kept(args, bias, d.n);
  std::optional<Tensor> list, sub;
  if (outlier_cols) {
    args.type("outlier_cols", *outlier_cols, ScalarType::Long);
    args.that(outlier_cols->dim() == 1, "outlier_cols", "of " + std::to_string(outlier_cols->dim()) + " dimensions", "1");
    list = args.input("outlier_cols", *outlier_cols);
    d.outliers = read<int64_t>(*list);
    sub = new_empty(args, a, with_last(a, std::ssize(d.outliers)), type_of(a));
  }
  const Tensor out = new_empty(args, a, with_last(a, d.n), type_of(a));
  d.to = {read<float>(rows), read<float>(columns), kept.view, args.mutable_values("out", out)};
  args.device.gemm_int8(d);
  if (sub) args.device.gather_columns(d, sub->mutable_data_ptr());
  return {out, sub};
}

template <class Device>
Tensor int8_linear(const Tensor& a, const Tensor& cb, const Tensor& scb, const std::optional<Tensor>& bias, double threshold) {
  const Int8Args<Device> args("int8_linear", a);
  const Matrix shape(args, "A", a);
  const Tensor x = args.input("A", a), weight = args.weight("CB", cb, shape.columns);
  const int64_t n = weight.size(0);
  const Tensor scale = args.scales("SCB", scb, n);
  const Bias<Device> kept(args, bias, n);
  const ConstView values = args.values("A", x);
  const Tensor out = new_empty(args, a, with_last(a, n), type_of(a));
  const LinearInt8 d{.m = shape.rows,
                     .n = n,
                     .k = shape.columns,
                     .x = values,
                     .threshold = args.threshold(threshold),
                     .weight = read<int8_t>(weight),
                     .weight_scale = read<float>(scale),
                     .bias = kept.view,
                     .out = args.mutable_values("out", out)};
  args.device.linear_int8(d, [&](int64_t size) { return new_empty(args, a, std::array{size}, ScalarType::Byte); });
  return out;
}

template <class Device> void register_int8(torch::stable::detail::StableLibrary& m) {
  m.impl("int8_vectorwise_quant", Boxed<int8_vectorwise_quant<Device>>::call);
  m.impl("int8_vectorwise_dequant", Boxed<int8_vectorwise_dequant<Device>>::call);
  m.impl("int8_double_quant", Boxed<int8_double_quant<Device>>::call);
  m.impl("int8_linear_matmul", Boxed<int8_linear_matmul<Device>>::call);
  m.impl("int8_linear_matmul.out", Boxed<int8_linear_matmul_out<Device>>::call);
  m.impl("int8_mm_dequant", Boxed<int8_mm_dequant<Device>>::call);
  m.impl("int8_scaled_mm", Boxed<int8_scaled_mm<Device>>::call);
  m.impl("int8_mixed_scaled_mm", Boxed<int8_mixed_scaled_mm<Device>>::call);
  m.impl("int8_linear", Boxed<int8_linear<Device>>::call);
  m.impl("int8_linear.forward", Boxed<int8_linear<Device>>::call);
}

}  // namespace bnb::torch_ops
