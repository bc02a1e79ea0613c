// y = a * W^T + bias with a 4-bit W (bnb/gemm.h): which arithmetic serves which type on which instruction set.
#pragma once

#include "cpu/gemm/gemm_4bit_amx.h"
#include "cpu/gemm/gemm_4bit_dot.h"
#include "cpu/gemm/gemm_4bit_row.h"
#include "cpu/gemm/gemm_4bit_row16.h"

namespace bnb::cpu {
namespace {

template <class Isa> inline constexpr bool has_bf16_dot = Isa::name == "avx512bf16";
template <class Isa> inline constexpr bool has_tiles = Isa::name == "amx";

template <class Isa, class T> struct ProductOf {
  using type = DotGemm<Isa, T, FmaMath<Isa, T>>;
};
#if defined(__AVX512BF16__)
template <class Isa>
  requires(has_bf16_dot<Isa>)
struct ProductOf<Isa, BFloat16> {
  using type = DotGemm<Isa, BFloat16, Bf16Math<Isa>>;
};
#endif
#if defined(__AMX_BF16__)
template <class Isa>
  requires(has_tiles<Isa>)
struct ProductOf<Isa, BFloat16> {
  using type = AmxGemm<Bf16Tiles4<Isa>>;
};
#endif

// Where one row costs as much as sixteen (tiles) or weights are decoded in fp32 (plain AVX-512), few rows have a product of their own.
template <class Isa, class T> struct RowProductOf {
  using type = void;
};
#if defined(__AVX512F__)
template <class Isa, class T>
  requires(!has_bf16_dot<Isa> && !(has_tiles<Isa> && sizeof(T) == 2))
struct RowProductOf<Isa, T> {
  using type = RowGemm<Isa, T>;
};
#endif
#if defined(__AMX_BF16__)
template <class Isa, class T>
  requires(has_tiles<Isa> && sizeof(T) == 2)
struct RowProductOf<Isa, T> {
  using type = IntRowGemm<Isa, T>;
};
#endif

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
