// The plain rule of block quantization, element by element: what the vectors of every instruction set must reproduce.
#pragma once

#include "common/convert.h"
#include "common/formats.h"

namespace bnb::cpu {
namespace {

inline constexpr int kChunk = 32;  // elements; vector code takes whole chunks, the end of the last block is padded with zeros

// 1 / absmax. The floor keeps it finite: blocks of zeros give t = 0, subnormal blocks small t. Infinity gives 0, NaN NaN.
BNB_INLINE float inverse(float absmax) { return 1.0f / (absmax < 1e-38f ? 1e-38f : absmax); }

template <class Format> BNB_INLINE uint8_t nearest(float t) {
  int below = 0;
  for (int i = 0; i < 15; ++i) below += !(t <= Format::thresholds.data()[i]);  // a NaN is above every threshold
  return Format::codes.data()[below];
}

// Codes at any t: the plain rule, for the scalar instruction set and for blocks that hold Inf or NaN. Behind an odd n: the code of zero.
template <class Format, class T> void encode4(const T* x, int64_t n, float inv, uint8_t* codes) {
  for (int64_t i = 0; i < n / 2; ++i)
    codes[i] = static_cast<uint8_t>(nearest<Format>(read(x + 2 * i) * inv) << 4 | nearest<Format>(read(x + 2 * i + 1) * inv));
  if (n % 2) codes[n / 2] = static_cast<uint8_t>(nearest<Format>(read(x + n - 1) * inv) << 4 | nearest<Format>(0));
}

}  // namespace
}  // namespace bnb::cpu
