// The checks of every operation's arguments, for all devices: pointers and sizes, never what lies behind the pointers.
#pragma once

#include <bnb/gemm.h>
#include <bnb/int8.h>
#include <bnb/optim.h>
#include <bnb/quantize.h>

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "common/check.h"

namespace bnb {

// Both directions of a quantization have one set of buffers: elements are written and codes and scales read, or the other way about.
template <class D>
void apart(const Checker& check, const D& d, const Memory& elements, const Memory& codes, const Memory& scales,
           const Memory& map = {"code", nullptr, 0, 0}) {
  if constexpr (requires { d.out; })
    check.apart({elements}, {codes, scales, map});
  else
    check.apart({codes, scales}, {elements, map});
}

// `argument` names the one that holds `elements`.
template <class D> Checker check_4bit(std::string_view op, const D& d, std::string_view argument, const ConstView& elements) {
  const Checker check(op);
  check.type(d.type);
  check.blocksize(d.blocksize);
  const Memory x = check.view(argument, elements);
  const Memory codes = check.size("codes", d.codes, packed_size(elements.size));
  const Memory absmax = check.size("absmax", d.absmax, blocks_of(elements.size, d.blocksize));
  apart(check, d, x, codes, absmax);
  return check;
}
template <class D> Checker check_blockwise(std::string_view op, const D& d, std::string_view argument, const ConstView& elements) {
  const Checker check(op);
  check.any_blocksize(d.blocksize);
  const Memory x = check.view(argument, elements), code = check.size("code", d.code, 256);
  const Memory codes = check.size("codes", d.codes, elements.size);
  const Memory absmax = check.size("absmax", d.absmax, blocks_of(elements.size, d.blocksize));
  apart(check, d, x, codes, absmax, code);
  return check;
}

// Give the checker, for checks that a device adds.
inline Checker check_arguments(const Quantize4bit& d) { return check_4bit("quantize_4bit", d, "x", d.x); }
inline Checker check_arguments(const Dequantize4bit& d) { return check_4bit("dequantize_4bit", d, "out", d.out); }
inline Checker check_arguments(const QuantizeBlockwise& d) { return check_blockwise("quantize_blockwise", d, "x", d.x); }
inline Checker check_arguments(const DequantizeBlockwise& d) { return check_blockwise("dequantize_blockwise", d, "out", d.out); }

inline Memory check_bias(const Checker& check, const ConstView& bias, int64_t n) {
  const Memory memory = check.view("bias", bias);
  if (bias.size != 0) check.equal("bias", bias.size, n, "n elements");
  return memory;
}

inline Checker check_arguments(const Gemm4bit& d) {
  const Checker check("gemm_4bit");
  check.type(d.type);
  check.blocksize(d.blocksize);
  const int64_t weights = check.product("n * k", d.n, d.k);
  const Memory a = check.view("a", d.a);
  check.equal("a", d.a.size, check.product("m * k", d.m, d.k), "m * k elements");
  const Memory out = check.view("out", d.out);
  check.equal("out", d.out.size, check.product("m * n", d.m, d.n), "m * n elements");
  check.that(d.out.dtype == d.a.dtype, "out", name(d.out.dtype), "the type of a");
  const Memory codes = check.size("codes", d.codes, packed_size(weights));
  const int64_t blocks = blocks_of(weights, d.blocksize);
  if (d.absmax.is_nested()) {
    const Memory nested_codes = check.size("absmax.codes", d.absmax.codes, blocks);
    const Memory code = check.size("absmax.code", d.absmax.code, 256);
    check.blocksize(d.absmax.nested_blocksize, "absmax.nested_blocksize");
    check.apart({out}, {nested_codes, code, check.size("absmax.nested", d.absmax.nested, blocks_of(blocks, d.absmax.nested_blocksize))});
  } else {
    check.apart({out}, {check.size("absmax.values", d.absmax.values, blocks)});
  }
  check.apart({out}, {a, codes, check_bias(check, d.bias, d.n)});
  return check;
}

// Both directions of the int8 quantizations: `scales` of them for rows x columns elements.
template <class D>
Checker check_int8(std::string_view op, const D& d, std::string_view argument, const ConstView& elements, int64_t scales) {
  const Checker check(op);
  const int64_t n = check.product("rows * columns", d.rows, d.columns);
  const Memory x = check.view(argument, elements);
  check.equal(argument, elements.size, n, "rows * columns");
  const Memory codes = check.size("codes", d.codes, n), scale = check.size("scale", d.scale, scales);
  apart(check, d, x, codes, scale);
  if constexpr (requires { d.outliers; })
    if (d.threshold > 0) check.apart({check.size("outliers", d.outliers, outlier_words(d.columns))}, {x, codes, scale});
  return check;
}
inline void check_threshold(const Checker& check, float threshold) {
  check.that(threshold >= 0, "threshold", threshold, "a number of 0 or more");
}

inline Checker check_arguments(const QuantizeInt8& d) {
  const Checker check = check_int8("quantize_int8", d, "x", d.x, d.rows);
  check_threshold(check, d.threshold);
  return check;
}
inline Checker check_arguments(const QuantizeColumnsInt8& d) {
  const Checker check = check_int8("quantize_columns_int8", d, "x", d.x, d.columns);
  check_threshold(check, d.threshold);
  return check;
}
inline Checker check_arguments(const DequantizeInt8& d) { return check_int8("dequantize_int8", d, "out", d.out, d.rows); }

// Gives where the output lies.
inline Memory check_epilogue(const Checker& check, const Int8Epilogue& to, int64_t m, int64_t n) {
  const Memory rows = check.size("row_scale", to.row_scale, m), columns = check.size("column_scale", to.column_scale, n);
  const Memory bias = check_bias(check, to.bias, n), out = check.view("out", to.out);
  check.equal("out", to.out.size, m * n, "m * n");
  check.apart({out}, {rows, columns, bias});
  return out;
}

inline Checker check_arguments(const DequantizeSums& d) {
  const Checker check("dequantize_sums");
  const Memory sums = check.size("sums", d.sums, check.product("m * n", d.m, d.n));
  check.apart({check_epilogue(check, d.to, d.m, d.n)}, {sums});
  return check;
}

// m x k times n x k.
inline void check_depth(const Checker& check, int64_t m, int64_t n, int64_t k) {
  check.product("m * n", m, n), check.product("m * k", m, k), check.product("n * k", n, k);
  check.that(k <= kMaxInt8Depth, "k", k, "at most " + std::to_string(kMaxInt8Depth) + ": longer sums leave int32");
}

// `readable`: the list of columns can be looked at.
inline Checker check_arguments(const GemmInt8& d, bool readable = true) {
  const Checker check("gemm_int8");
  check_depth(check, d.m, d.n, d.k);
  const Memory a = check.size("a", d.a, d.m * d.k), b = check.size("b", d.b, d.n * d.k);
  // Of no sums, those that are wanted look like those that are not; they are where nothing of the epilogue is given.
  const bool bare = d.to.row_scale.empty() && d.to.column_scale.empty() && d.to.bias.size == 0 && d.to.out.size == 0;
  if (!d.sums.empty() || (d.m * d.n == 0 && bare)) {
    check.apart({check.size("sums", d.sums, d.m * d.n)}, {a, b});
    return check;
  }
  const Memory out = check_epilogue(check, d.to, d.m, d.n);
  check.apart({out}, {a, b});
  if (d.outliers.empty()) return check;
  const Memory x = check.view("x", d.x);
  check.equal("x", d.x.size, d.m * d.k, "m * k");
  check.apart({out}, {x, check.size("outliers", d.outliers, std::ssize(d.outliers))});
  if (readable)
    for (const int64_t c : d.outliers) check.that(c >= 0 && c < d.k, "outliers", c, "columns below k = " + std::to_string(d.k));
  return check;
}

inline Checker check_arguments(const LinearInt8& d) {
  const Checker check("linear_int8");
  check_depth(check, d.m, d.n, d.k);
  check_threshold(check, d.threshold);
  const Memory x = check.view("x", d.x);
  check.equal("x", d.x.size, d.m * d.k, "m * k");
  const Memory weight = check.size("weight", d.weight, d.n * d.k), scale = check.size("weight_scale", d.weight_scale, d.n);
  const Memory bias = check_bias(check, d.bias, d.n), out = check.view("out", d.out);
  check.equal("out", d.out.size, d.m * d.n, "m * n");
  check.apart({out}, {x, weight, scale, bias});
  return check;
}

inline void check_arguments(const Checker& check, const OptimizerConfig& c) {
  const int rule = static_cast<int>(c.rule);
  check.that(rule >= 0 && rule < kOptimizers, "rule", rule, "adam, lamb, ademamix, lion, momentum, lars, rmsprop or adagrad");
  // Steps are computed in fp32, where these must be finite too.
  const auto number = [&](std::string_view argument, double x, bool negative) {
    constexpr double kLargest = std::numeric_limits<float>::max();
    check.that(x <= kLargest && x >= (negative ? -kLargest : 0), argument, x,
               negative ? "a number that is finite in fp32" : "a number of 0 or more that is finite in fp32");
  };
  number("lr", c.lr, false), number("eps", c.eps, false), number("weight_decay", c.weight_decay, false);
  number("lr * weight_decay", c.lr * c.weight_decay, false);
  number("max_unorm", c.max_unorm, false), number("alpha", c.alpha, true), number("dampening", c.dampening, true);
  const bool corrected = has_second_state(c.rule) && c.bias_correction;
  const auto beta = [&](std::string_view argument, double x) {
    check.that(x >= 0 && (corrected ? x < 1 : x <= 1), argument, x, corrected ? "a number from 0 to below 1" : "a number from 0 to 1");
  };
  beta("beta1", c.beta1);
  if (has_second_state(c.rule) || c.rule == Optimizer::lion) beta("beta2", c.beta2);
  if (c.rule == Optimizer::ademamix) check.that(c.beta3 >= 0 && c.beta3 <= 1, "beta3", c.beta3, "a number from 0 to 1");
  check.that(c.t_alpha >= 0, "t_alpha", c.t_alpha, "0 or more steps");
  check.that(c.t_beta3 >= 0, "t_beta3", c.t_beta3, "0 or more steps");
}

// The memory of all tensors of a call: what is written lies apart from all else. Sorted by their begins, two pieces meet where one begins
// before the greatest end so far.
class OptimizerMemory {
  struct Piece {
    uintptr_t begin, end;
    std::string_view argument;
    int64_t tensor;
    bool written;
  };
  std::vector<Piece> pieces_;
  std::vector<std::pair<uintptr_t, uint32_t>> order_;

 public:
  // Nothing but this takes memory.
  void reserve(size_t tensors) { pieces_.reserve(6 * tensors + 2), order_.reserve(6 * tensors + 2); }
  void add(const Memory& m, int64_t tensor, bool written) {
    if (m.bytes == 0) return;
    order_.emplace_back(m.begin, static_cast<uint32_t>(pieces_.size()));
    pieces_.push_back({m.begin, m.begin + m.bytes, m.argument, tensor, written});
  }
  void check_apart(Checker& check, bool many) {
    std::ranges::sort(order_);  // those of one begin as they were given, so that a message does not depend on the sort
    const Piece *furthest = nullptr, *furthest_written = nullptr;
    for (const auto& [begin, i] : order_) {
      const Piece& x = pieces_[i];
      const Piece* before = x.written ? furthest : furthest_written;
      if (before && begin < before->end) [[unlikely]] {
        const Piece &mine = x.written ? x : *before, &other = x.written ? *before : x;
        check.entry(many ? mine.tensor : -1);
        check.fail(mine.argument, "in the memory of " + Checker::entry_name(other.argument, many ? other.tensor : -1), "memory of its own");
      }
      if (!furthest || x.end > furthest->end) furthest = &x;
      if (x.written && (!furthest_written || x.end > furthest_written->end)) furthest_written = &x;
    }
  }
};

// Messages name the tensor where there are several: p[3] is ..
inline Checker check_arguments(const OptimizerStep& s) {
  Checker check("optimizer_step");
  check_arguments(check, s.config);
  const bool two = has_second_state(s.config.rule), many = s.tensors.size() > 1;
  bool codes = false;
  OptimizerMemory memory;
  check.within_memory([&] { memory.reserve(s.tensors.size()); });
  for (int64_t i = 0; i < std::ssize(s.tensors); ++i) {
    const OptimizerTensor& t = s.tensors[static_cast<size_t>(i)];
    if (many) check.entry(i);
    const auto exactly = [&](std::string_view argument, const auto& state, int64_t n, std::string_view meaning) {
      check.equal(argument, std::ssize(state), n, meaning);
      memory.add(check.size(argument, state, n), i, true);
    };
    memory.add(check.view("p", t.p), i, true);
    memory.add(check.view("g", t.g), i, false);
    check.equal("g", t.g.size, t.p.size, "as many as p");
    check.that(t.step >= 1, "step", t.step, "1 or more");
    check.that(t.offset >= 0 && t.offset <= std::numeric_limits<int64_t>::max() - t.p.size, "offset", t.offset,
               "0 or more, and a last place below 2^63");
    check.that(t.gnorm_scale - t.gnorm_scale == 0, "gnorm_scale", t.gnorm_scale, "a finite number");
    if (t.p_norm) check.that(*t.p_norm >= 0, "p_norm", *t.p_norm, "a number of 0 or more");
    const int64_t first = check.product("elements of state1", first_states(s.config.rule), t.p.size);
    const std::string_view all = first > t.p.size ? "two for each of p" : "as many as p";
    if (!t.has_codes()) {
      exactly("state1", t.state1, first, all);
      if (two) exactly("state2", t.state2, t.p.size, "as many as p");
      continue;
    }
    codes = true;
    const int64_t blocks = blocks_of(t.p.size, kOptimizerBlock);
    exactly("codes1", t.codes1, first, all);
    memory.add(check.size("absmax1", t.absmax1, first_states(s.config.rule) * blocks), i, true);
    if (two) exactly("codes2", t.codes2, t.p.size, "as many as p"), memory.add(check.size("absmax2", t.absmax2, blocks), i, true);
  }
  check.entry(-1);
  if (codes) memory.add(check.size("code1", s.code1, 256), -1, false);
  if (codes && two) memory.add(check.size("code2", s.code2, 256), -1, false);
  memory.check_apart(check, many);
  return check;
}

}  // namespace bnb
