// a * b^T in int8 (bnb/int8.h): which kernel serves which number of rows on which instruction set. All give the same sums.
#pragma once

#include "cpu/gemm/gemm_int8_dot.h"
#include "cpu/gemm/gemm_int8_lanes.h"

namespace bnb::cpu {
namespace {

// Defined in avx512/gemm_int8_amx.h and gemm_amx.h, which the isa_*.cpp that needs them includes.
template <class Isa> class Int8Tiles;
template <class Operand> class AmxGemm;

template <class Isa> struct Choice8 {
  template <class F> static auto of(const GemmInt8& d, F&& f) {
    constexpr int64_t kFewRows = 4;  // tiles cost as much for one row as for sixteen
    if constexpr (Isa::has_tiles) {
      if (d.m > kFewRows) return f.template operator()<AmxGemm<Int8Tiles<Isa>>>();
    } else if constexpr (Isa::lanes > 1) {
      if (d.m > LanesGemm8<Isa>::few_rows) return f.template operator()<LanesGemm8<Isa>>();
    }
    return f.template operator()<DotGemm8<Isa>>();
  }
};
template <class Isa> using Gemm8 = ProductBy<GemmInt8, Choice8<Isa>>;

}  // namespace
}  // namespace bnb::cpu
