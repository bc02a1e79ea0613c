// The reference instruction set: plain C++, one element at a time. Every other one must give the same bytes.
#pragma once

#include "../convert.h"

#include <string_view>

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

struct Scalar {
  static constexpr std::string_view name = "scalar";
  static constexpr int lanes = 1;
  using F32 = float;

  template <class T>
  BNB_INLINE static F32 load(const T* p) { return to_float(*p); }
  template <class T>
  BNB_INLINE static void store(T* p, F32 x) { from_float(x, *p); }
  BNB_INLINE static F32 zero() { return 0; }
  BNB_INLINE static F32 set1(float x) { return x; }
  BNB_INLINE static F32 add(F32 a, F32 b) { return a + b; }
  BNB_INLINE static F32 mul(F32 a, F32 b) { return a * b; }
};

}  // namespace
}  // namespace bnb::cpu
