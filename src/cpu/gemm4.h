// y = a * W^T + bias, W of 4-bit codes (bnb/gemm.h). Plain version.
#pragma once

#include <bit>

#include "../formats.h"
#include "kernels.h"
#include "scratch.h"

namespace bnb::cpu {

template <class Isa>
struct Gemm {
  static float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(rest) * 0x1p-24f));
    return std::bit_cast<float>(sign | ((rest << 13) + 0x38000000));
  }
  static float load(ConstView v, int64_t i) {
    if (v.dtype == DType::f32) return static_cast<const float*>(v.data)[i];
    const uint16_t bits = static_cast<const uint16_t*>(v.data)[i];
    return v.dtype == DType::f16 ? half_to_float(bits) : std::bit_cast<float>(uint32_t(bits) << 16);
  }
  static uint16_t to_bfloat(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f);
    if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
    return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
  }
  static uint16_t to_half(float f) {
    const uint32_t u = std::bit_cast<uint32_t>(f), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return uint16_t(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (rest < 0x38800000) {
      const float shifted = std::bit_cast<float>(rest) + 0.5f;
      return uint16_t(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000));
    }
    return uint16_t(sign | ((rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13));
  }
  static float round_to(DType t, float f) {
    if (t == DType::f32) return f;
    return t == DType::f16 ? half_to_float(to_half(f)) : std::bit_cast<float>(uint32_t(to_bfloat(f)) << 16);
  }
  static void store(View v, int64_t i, float f) {
    if (v.dtype == DType::f32)
      static_cast<float*>(v.data)[i] = f;
    else
      static_cast<uint16_t*>(v.data)[i] = v.dtype == DType::f16 ? to_half(f) : to_bfloat(f);
  }
  static float weight(const Gemm4bit& d, int64_t e) {
    const int code = d.codes[static_cast<size_t>(e / 2)] >> (e % 2 ? 0 : 4) & 15;
    const float value = visit(d.type, [&](auto format) { return format.values[static_cast<size_t>(code)]; });
    return round_to(d.a.dtype, value * d.absmax[e / d.blocksize]);
  }

  static constexpr int64_t column_step = 1;
  static int64_t pack_bytes(const Gemm4bit& d) { return 0; }
  static int64_t pack_units(const Gemm4bit& d) { return 0; }
  static void pack(const Gemm4bit& d, void* packed, Range units) {}
  static void run(const Gemm4bit& d, const void* packed, Range columns) {
    const Scratch scratch(d.k * 4);
    auto* w = static_cast<float*>(scratch.data());
    for (int64_t n = columns.begin; n < columns.end; ++n) {
      for (int64_t k = 0; k < d.k; ++k) w[k] = weight(d, n * d.k + k);
      for (int64_t m = 0; m < d.m; ++m) {
        float lanes[16] = {};
        for (int64_t k = 0; k < d.k; ++k) lanes[k % 16] += load(d.a, m * d.k + k) * w[k];
        float sum = 0;
        for (const float lane : lanes) sum += lane;
        store(d.out, m * d.n + n, d.bias.size ? sum + load(d.bias, n) : sum);
      }
    }
  }
};

}  // namespace bnb::cpu
