// The table of one instruction set, made of the generic kernels. Included once in each isa_*.cpp, after the header of the set.
#pragma once

#include "cpu/gemm/gemm_4bit.h"
#include "cpu/gemm/gemm_int8.h"
#include "cpu/isa/isa.h"
#include "cpu/kernels/dequantize.h"
#include "cpu/kernels/int8_rows.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/optim.h"
#include "cpu/kernels/quantize.h"

namespace bnb::cpu {
namespace {

template <class D, class P> consteval Product<D> make_product() {
  return {.column_step = P::column_step, .pack_bytes = P::pack_bytes, .pack_units = P::pack_units, .pack = P::pack, .run = P::run};
}

template <InstructionSet Isa> consteval Kernels make_kernels() {
  constexpr Kernels kernels = {.isa = Isa::name,
                               .quantize_4bit = Quantize<Isa>::run_4bit,
                               .dequantize_4bit = Dequantize<Isa>::run_4bit,
                               .quantize_blockwise = Quantize<Isa>::run_blockwise,
                               .dequantize_blockwise = Dequantize<Isa>::run_blockwise,
                               .gemm_4bit = make_product<Gemm4bit, Gemm4<Isa>>(),
                               .quantize_int8 = Int8Rows<Isa>::quantize,
                               .quantize_columns_int8 = Int8Rows<Isa>::quantize_columns,
                               .dequantize_int8 = Int8Rows<Isa>::dequantize,
                               .dequantize_sums = dequantize_sums<Isa>,
                               .gemm_int8 = make_product<GemmInt8, Gemm8<Isa>>(),
                               .optimizer_step = Optimize<Isa>::step,
                               .optimizer_norms = Optimize<Isa>::norms};
  static_assert(is_complete(kernels), "a member of Kernels is not set above");
  return kernels;
}

}  // namespace
}  // namespace bnb::cpu
