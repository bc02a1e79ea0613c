// y = a * W^T + bias with a 4-bit W (bnb/gemm.h): which arithmetic serves which type on which instruction set.
#pragma once

#include "gemm4_amx.h"
#include "gemm4_dot.h"
#include "gemm4_row.h"

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
  using type = AmxGemm<Isa>;
};
#endif

// Where one row costs as much as sixteen (tiles) or weights are decoded in fp32 (plain AVX-512), few rows have a product of their own.
template <class Isa, class T> struct RowProductOf {
  using type = void;
};
#if defined(__AVX512F__)
template <class Isa, class T>
  requires(!has_bf16_dot<Isa>)
struct RowProductOf<Isa, T> {
  using type = RowGemm<Isa, T>;
};
#endif

template <class Isa> class Gemm {
  // f<the product that serves d>()
  template <class F> static auto with_product(const Gemm4bit& d, F&& f) {
    return visit(d.a.dtype, [&]<class T>(T) {
      using RowProduct = typename RowProductOf<Isa, T>::type;
      if constexpr (!std::is_void_v<RowProduct>)
        if (RowProduct::serves(d)) return f.template operator()<RowProduct>();
      return f.template operator()<typename ProductOf<Isa, T>::type>();
    });
  }

 public:
  static constexpr int64_t column_step = 16;
  static int64_t pack_bytes(const Gemm4bit& d) {
    return with_product(d, [&]<class P>() { return P::pack_bytes(d); });
  }
  static int64_t pack_units(const Gemm4bit& d) {
    return with_product(d, [&]<class P>() { return P::pack_units(d); });
  }
  static void pack(const Gemm4bit& d, void* packed, Range units) {
    with_product(d, [&]<class P>() { P::pack(d, packed, units); });
  }
  static void run(const Gemm4bit& d, const void* packed, Range columns) {
    with_product(d, [&]<class P>() { P::run(d, packed, columns); });
  }
};

}  // namespace
}  // namespace bnb::cpu
