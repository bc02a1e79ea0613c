// The checks of every operation's arguments, for all devices: pointers and sizes, never what lies behind the pointers.
#pragma once

#include <bnb/gemm.h>
#include <bnb/quantize.h>

#include "check.h"

namespace bnb {

// Both directions of a block quantization have one set of buffers; `argument` names the one that holds `elements`.
template <class D> Checker check_4bit(std::string_view op, const D& d, std::string_view argument, const ConstView& elements) {
  const Checker check(op);
  check.type(d.type);
  check.blocksize(d.blocksize);
  check.view(argument, elements);
  check.size("codes", d.codes, packed_size(elements.size));
  check.size("absmax", d.absmax, blocks_of(elements.size, d.blocksize));
  return check;
}
template <class D> Checker check_blockwise(std::string_view op, const D& d, std::string_view argument, const ConstView& elements) {
  const Checker check(op);
  check.blocksize(d.blocksize);
  check.view(argument, elements);
  check.size("code", d.code, 256);
  check.size("codes", d.codes, elements.size);
  check.size("absmax", d.absmax, blocks_of(elements.size, d.blocksize));
  return check;
}

// Give the checker, for checks that a device adds.
inline Checker check_arguments(const Quantize4bit& d) { return check_4bit("quantize_4bit", d, "x", d.x); }
inline Checker check_arguments(const Dequantize4bit& d) { return check_4bit("dequantize_4bit", d, "out", d.out); }
inline Checker check_arguments(const QuantizeBlockwise& d) { return check_blockwise("quantize_blockwise", d, "x", d.x); }
inline Checker check_arguments(const DequantizeBlockwise& d) { return check_blockwise("dequantize_blockwise", d, "out", d.out); }

inline Checker check_arguments(const Gemm4bit& d) {
  const Checker check("gemm_4bit");
  check.type(d.type);
  check.blocksize(d.blocksize);
  const int64_t weights = check.product("n * k", d.n, d.k);
  check.view("a", d.a);
  check.equal("a", d.a.size, check.product("m * k", d.m, d.k), "m * k elements");
  check.view("out", d.out);
  check.equal("out", d.out.size, check.product("m * n", d.m, d.n), "m * n elements");
  check.that(d.out.dtype == d.a.dtype, "out", name(d.out.dtype), "the type of a");
  check.size("codes", d.codes, packed_size(weights));
  const int64_t blocks = blocks_of(weights, d.blocksize);
  if (d.absmax.is_nested()) {
    check.size("absmax.codes", d.absmax.codes, blocks);
    check.size("absmax.code", d.absmax.code, 256);
    check.blocksize(d.absmax.nested_blocksize, "absmax.nested_blocksize");
    check.size("absmax.nested", d.absmax.nested, blocks_of(blocks, d.absmax.nested_blocksize));
  } else {
    check.size("absmax.values", d.absmax.values, blocks);
  }
  check.view("bias", d.bias);
  if (d.bias.size != 0) check.equal("bias", d.bias.size, d.n, "n elements");
  return check;
}

}  // namespace bnb
