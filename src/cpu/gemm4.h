// y = a * W^T + bias with a 4-bit W (bnb/gemm.h): which arithmetic serves which type on which instruction set.
#pragma once

#include "gemm4_amx.h"
#include "gemm4_dot.h"

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

template <class Isa> class Gemm {
  template <class T> using Product = typename ProductOf<Isa, T>::type;

 public:
  static constexpr int64_t column_step = 16;
  static int64_t pack_bytes(const Gemm4bit& d) {
    return visit(d.a.dtype, [&]<class T>(T) { return Product<T>::pack_bytes(d); });
  }
  static int64_t pack_units(const Gemm4bit& d) {
    return visit(d.a.dtype, [&]<class T>(T) { return Product<T>::pack_units(d); });
  }
  static void pack(const Gemm4bit& d, void* packed, Range units) {
    visit(d.a.dtype, [&]<class T>(T) { Product<T>::pack(d, packed, units); });
  }
  static void run(const Gemm4bit& d, const void* packed, Range columns) {
    visit(d.a.dtype, [&]<class T>(T) { Product<T>::run(d, packed, columns); });
  }
};

}  // namespace
}  // namespace bnb::cpu
