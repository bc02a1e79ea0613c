// AMX tiles, one instruction a wrapper; tiles are named by template arguments, which the macros of the compiler do not take.
#pragma once

#include <cstdint>

#include "common/convert.h"

#include <immintrin.h>

namespace bnb::cpu {
namespace {

template <int t> BNB_INLINE void tile_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(t)); }
// 16 rows of the configured length, `stride` bytes apart.
template <int t> BNB_INLINE void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
// The same, but what it reads need not stay in L1.
template <int t> BNB_INLINE void tile_load_once(const void* p, int64_t stride) {
  asm volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
template <int t> BNB_INLINE void tile_store(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
// c[i][j] += a[i][k] * b[k / 2][2 j + k % 2] over the bf16 elements of a row of a.
template <int c, int a, int b> BNB_INLINE void tile_dot_bf16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}
// The same over its int8 elements, with b[k / 4][4 j + k % 4], in int32.
template <int c, int a, int b> BNB_INLINE void tile_dot_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

// While it lives, this thread's 8 tiles have 16 rows: of 64 bytes the operands a, of 4 * `width` bytes the others.
class Tiles {
 public:
  template <int... a> Tiles(std::integer_sequence<int, a...>, int64_t width) {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) {
      config.rows[t] = 16;
      config.row_bytes[t] = static_cast<uint16_t>(((t == a) || ...) ? 64 : 4 * width);
    }
    asm volatile("ldtilecfg %0" : : "m"(config));  // the intrinsic of GCC 12 says that it reads 8 of the 64 bytes
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace bnb::cpu
