// The names of src/cuda/device/ptx.cuh on the host: each instruction as the PTX manual defines it, including the bits of a NaN.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "common/convert.h"

namespace bnb::cuda::dev {

// ---- global memory
template <class V> V load(const void* from, Where where = Where::current()) {
  emulator::check_aligned(from, sizeof(V), "load", where);
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V> V load_const(const void* from, Where where = Where::current()) { return load<V>(from, where); }
template <class V> V load_once(const void* from, Where where = Where::current()) { return load<V>(from, where); }
template <class V> void store(void* to, const V& v, Where where = Where::current()) {
  emulator::check_aligned(to, sizeof(V), "store", where);
  std::memcpy(to, &v, sizeof v);
}
template <class V> void store_once(void* to, const V& v, Where where = Where::current()) { store(to, v, where); }

// ---- shared memory
template <class V> V load_shared(const void* from, Where where = Where::current()) {
  emulator::check_shared(from, sizeof(V), "load", where);
  return load<V>(from, where);
}
template <class V> void store_shared(void* to, const V& v, Where where = Where::current()) {
  emulator::check_shared(to, sizeof(V), "store", where);
  store(to, v, where);
}

template <int bytes> void copy_async(void* to, const void* from, unsigned valid = bytes, Where where = Where::current()) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emulator::check_shared(to, bytes, "asynchronous copy", where);
  emulator::check_aligned(from, bytes, "asynchronous copy", where);
  if (valid > bytes) emulator::fail("asynchronous copy of " + std::to_string(valid) + " of " + std::to_string(bytes) + " bytes", where);
  emulator::copy_async(to, from, bytes, valid, kHasCopyAsync);
}
inline void copy_commit() { emulator::copy_commit(); }
template <int n> void copy_wait() { emulator::copy_wait(n); }

struct alignas(8) Rows {
  const uint16_t* row;
  uint32_t word[4];
  uint32_t unused[10];
};
inline void load_matrices(uint32_t (&r)[4], const void* row, Where where = Where::current()) {
  emulator::check_shared(row, 16, "row of a matrix", where);
  const auto load_all = [](std::span<Rows, 32> all) {
    for (unsigned m = 0; m < 4; ++m)
      for (unsigned i = 0; i < kWarp; ++i) {
        const uint16_t* from = all[8 * m + i / 4].row + i % 4 * 2;
        all[i].word[m] = from[0] | uint32_t{from[1]} << 16;
      }
  };
  const auto all = emulator::collective("load_matrices", Rows{static_cast<const uint16_t*>(row), {}, {}}, kWarp, load_all, where);
  for (int m = 0; m < 4; ++m) r[m] = all[lane()].word[m];
}

// ---- arithmetic
inline uint32_t float_bits(float x) { return std::bit_cast<uint32_t>(x); }
inline float bits_float(uint32_t x) { return std::bit_cast<float>(x); }
inline float nan_rule(float x) { return x == x ? x : bits_float(0x7fffffff); }
inline float add(float a, float b) { return nan_rule(a + b); }
inline float mul(float a, float b) { return nan_rule(a * b); }
inline float div(float a, float b) { return nan_rule(a / b); }
inline float sqrt(float x) { return nan_rule(std::sqrt(x)); }
inline float fma(float a, float b, float c) { return nan_rule(std::fma(a, b, c)); }
inline float fma_up(float a, float b, float c) {
  const double product = double{a} * b, sum = product + c;  // the product is exact, `error` what the sum lost
  const double part = sum - product, error = (product - (sum - part)) + (c - part);
  const auto r = static_cast<float>(sum);
  return nan_rule(r < sum || (r == sum && error > 0) ? std::nextafter(r, INFINITY) : r);
}
inline float reciprocal(float x) { return nan_rule(1.0f / x); }

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = bytes >> (which >> 4 * i & 7) * 8 & 0xff;
    r |= (which >> 4 * i & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return r;
}
inline uint32_t count_above(uint32_t count, float x, float y) { return x <= y ? count : count + 1; }
template <class T> uint32_t max_halves(uint32_t a, uint32_t b) {
  return std::max(a & 0xffff, b & 0xffff) | std::max(a & 0xffff0000, b & 0xffff0000);
}
inline unsigned popcount(uint64_t x) { return static_cast<unsigned>(std::popcount(x)); }

// ---- conversions
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bnb::to_float(x); }
inline float to_float(Half x) { return nan_rule(bnb::to_float(x)); }
template <class T> T round_to(float x) {
  if constexpr (sizeof(T) == 2)
    if (x != x) return {0x7fff};
  return rounded<T>(x);
}
template <class T> uint32_t pack(float low, float high) { return round_to<T>(low).bits | uint32_t{round_to<T>(high).bits} << 16; }
template <class T> void unpack(uint32_t x, float& low, float& high) {
  low = dev::to_float(T{static_cast<uint16_t>(x)});
  high = dev::to_float(T{static_cast<uint16_t>(x >> 16)});
}

// ---- tensor cores
template <class D> struct alignas(8) Fragments {
  uint32_t a[4], b[2];
  D d[4];
  uint32_t unused[6];
};
// Rows of `a` and columns of `b` have `per_word` elements per word, read by element(word, i); Sum is exact or wider than D.
template <class D, class Sum, int per_word, class Element> void multiply(std::span<Fragments<D>, 32> all, Element element) {
  constexpr int depth = 8 * per_word;
  Sum a[16][depth], b[depth][8];
  for (int i = 0; i < 32; ++i) {
    const int g = i / 4, t = i % 4 * per_word;
    for (int h = 0; h < per_word; ++h) {
      for (int r = 0; r < 4; ++r) a[g + 8 * (r & 1)][t + h + depth / 2 * (r >> 1)] = element(all[i].a[r], h);
      for (int r = 0; r < 2; ++r) b[t + h + depth / 2 * r][g] = element(all[i].b[r], h);
    }
  }
  for (int i = 0; i < 32; ++i)
    for (int r = 0; r < 4; ++r) {
      Sum sum = all[i].d[r];
      for (int k = 0; k < depth; ++k) sum += a[i / 4 + 8 * (r >> 1)][k] * b[k][i % 4 * 2 + (r & 1)];
      all[i].d[r] = static_cast<D>(sum);
    }
}
template <class D, class F> void run_mma(const char* what, D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F act, Where where) {
  Fragments<D> mine{};
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  std::memcpy(mine.d, d, sizeof d);
  std::memcpy(d, emulator::collective(what, mine, kWarp, act, where)[lane()].d, sizeof d);
}
template <class T> void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current()) {
  static_assert(kHasMma<T>, "no mma for this type on this architecture: ask kHasMma<T>");
  const auto act = [](std::span<Fragments<float>, 32> all) {
    multiply<float, double, 2>(all, [](uint32_t word, int i) { return double{dev::to_float(T{static_cast<uint16_t>(word >> 16 * i)})}; });
  };
  run_mma("mma", d, a, b, act, where);
}
inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where where = Where::current()) {
  const auto act = [](std::span<Fragments<int32_t>, 32> all) {
    multiply<int32_t, int64_t, 4>(all, [](uint32_t word, int i) { return int64_t{static_cast<int8_t>(word >> 8 * i)}; });
  };
  run_mma("mma_s8", d, a, b, act, where);
}

}  // namespace bnb::cuda::dev
