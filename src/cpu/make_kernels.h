// The table of one instruction set, made of the generic kernels. Included once in each isa_*.cpp, after its simd header.
#pragma once

#include "dequantize.h"
#include "gemm4.h"
#include "kernels.h"
#include "quantize.h"

namespace bnb::cpu {
namespace {

template <class Isa> consteval Kernels make_kernels() {
  return {.isa = Isa::name,
          .quantize_4bit = Quantize<Isa>::run_4bit,
          .dequantize_4bit = Dequantize<Isa>::run_4bit,
          .quantize_blockwise = Quantize<Isa>::run_blockwise,
          .dequantize_blockwise = Dequantize<Isa>::run_blockwise,
          .gemm_4bit = {.column_step = Gemm<Isa>::column_step,
                        .pack_bytes = Gemm<Isa>::pack_bytes,
                        .pack_units = Gemm<Isa>::pack_units,
                        .pack = Gemm<Isa>::pack,
                        .run = Gemm<Isa>::run}};
}

}  // namespace
}  // namespace bnb::cpu
