// y = a * W^T + bias with a 4-bit W (bnb/gemm.h): which arithmetic serves which type on which instruction set.
#pragma once

#include "cpu/gemm/gemm_4bit_dot.h"

namespace bnb::cpu {
namespace {

// Products of their own of wide vectors and of tiles. The isa_*.cpp that needs one includes its file.
template <class Isa, class T> class RowGemm;     // avx512/gemm_4bit_row.h
template <class Isa, class T> class IntRowGemm;  // avx512/gemm_4bit_row16.h
template <class Isa> class Bf16Tiles4;           // avx512/gemm_4bit_amx.h
template <class Operand> class AmxGemm;          // gemm_amx.h

template <class Isa, class T> struct ProductOf {
  using type = DotGemm<Isa, T, FmaMath<Isa, T>>;
};
template <class Isa>
  requires(Isa::has_bf16_dot && !Isa::has_tiles)
struct ProductOf<Isa, BFloat16> {
  using type = DotGemm<Isa, BFloat16, Bf16Math<Isa>>;
};
template <class Isa>
  requires(Isa::has_tiles)
struct ProductOf<Isa, BFloat16> {
  using type = AmxGemm<Bf16Tiles4<Isa>>;
};

template <class Isa, class T> struct RowProductOf {
  using type = void;
};
template <class Isa, class T>
  requires(Isa::template single_row<T> == SingleRow::fp32)
struct RowProductOf<Isa, T> {
  using type = RowGemm<Isa, T>;
};
template <class Isa, class T>
  requires(Isa::template single_row<T> == SingleRow::digits)
struct RowProductOf<Isa, T> {
  using type = IntRowGemm<Isa, T>;
};

template <class Isa> struct Choice4 {
  template <class F> static auto of(const Gemm4bit& d, F&& f) {
    return visit(d.a.dtype, [&]<class T>(T) {
      using RowProduct = typename RowProductOf<Isa, T>::type;
      if constexpr (!std::is_void_v<RowProduct>)
        if (RowProduct::serves(d)) return f.template operator()<RowProduct>();
      return f.template operator()<typename ProductOf<Isa, T>::type>();
    });
  }
};
template <class Isa> using Gemm4 = ProductBy<Gemm4bit, Choice4<Isa>>;

}  // namespace
}  // namespace bnb::cpu
