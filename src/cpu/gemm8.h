// a * b^T in int8 (bnb/int8.h): which kernel serves which number of rows on which instruction set.
#pragma once

#include "gemm8_dot.h"

namespace bnb::cpu {
namespace {

template <class Isa> struct Gemm8 : DotGemm8<Isa> {
  static constexpr int64_t column_step = kSumColumns;
};

}  // namespace
}  // namespace bnb::cpu
