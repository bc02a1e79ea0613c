// The checks of every operation's arguments, for all devices: pointers and sizes, never what lies behind the pointers.
#pragma once

#include <bnb/gemm.h>
#include <bnb/quantize.h>

#include "check.h"

namespace bnb {

inline void check_arguments(const Quantize4bit& d) {
  const Checker check("quantize_4bit");
  check.type(d.type);
  check.blocksize(d.blocksize);
  check.view("x", d.x);
  check.size("codes", d.codes, packed_size(d.x.size));
  check.size("absmax", d.absmax, blocks_of(d.x.size, d.blocksize));
}

inline void check_arguments(const Dequantize4bit& d) {
  const Checker check("dequantize_4bit");
  check.type(d.type);
  check.blocksize(d.blocksize);
  check.view("out", d.out);
  check.size("codes", d.codes, packed_size(d.out.size));
  check.size("absmax", d.absmax, blocks_of(d.out.size, d.blocksize));
}

inline void check_arguments(const QuantizeBlockwise& d) {
  const Checker check("quantize_blockwise");
  check.blocksize(d.blocksize);
  check.view("x", d.x);
  check.size("code", d.code, 256);
  check.size("codes", d.codes, d.x.size);
  check.size("absmax", d.absmax, blocks_of(d.x.size, d.blocksize));
}

inline void check_arguments(const DequantizeBlockwise& d) {
  const Checker check("dequantize_blockwise");
  check.blocksize(d.blocksize);
  check.view("out", d.out);
  check.size("code", d.code, 256);
  check.size("codes", d.codes, d.out.size);
  check.size("absmax", d.absmax, blocks_of(d.out.size, d.blocksize));
}

inline void check_arguments(const Gemm4bit& d) {
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
}

}  // namespace bnb
