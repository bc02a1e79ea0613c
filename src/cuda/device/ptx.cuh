// One instruction per wrapper, with plain code where the architecture lacks it. tests/cuda_on_host/ptx.h has the same names for the host,
// where each does what the PTX manual says and reports what it forbids.
#pragma once

#include "cuda/device/device.cuh"

namespace bnb::cuda::dev {

// Words that travel together. Vector accesses need addresses aligned to their size.
template <int bytes> struct alignas(bytes) Bits {
  uint32_t word[bytes / 4];
};
template <> struct alignas(2) Bits<2> {
  uint16_t word[1];
};

// What the code is compiled for: 10 * major + minor, 0 in the host's part. For `if constexpr` in device code.
inline constexpr int kArch = BNB_ARCH;
inline constexpr bool kHasCopyAsync = kArch >= 80;                                 // else copy_async is a plain copy
template <class T> inline constexpr bool kHasMma = sizeof(T) == 2 && kArch >= 75;  // Half: from sm_75
template <> inline constexpr bool kHasMma<BFloat16> = kArch >= 80;

}  // namespace bnb::cuda::dev

#if defined(__CUDACC__)

namespace bnb::cuda::dev {

// ---- global memory. V: Bits<2>, Bits<4>, Bits<8> or Bits<16>

#define BNB_LOAD(name, qualifiers)                                                                        \
  template <class V> BNB_DEVICE V name(const void* from) {                                                \
    const auto at = __cvta_generic_to_global(from);                                                       \
    V v;                                                                                                  \
    if constexpr (sizeof(V) == 16)                                                                        \
      asm("ld.global" qualifiers ".v4.u32 {%0, %1, %2, %3}, [%4];"                                        \
          : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])                            \
          : "l"(at));                                                                                     \
    else if constexpr (sizeof(V) == 8)                                                                    \
      asm("ld.global" qualifiers ".v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(at)); \
    else if constexpr (sizeof(V) == 4)                                                                    \
      asm("ld.global" qualifiers ".u32 %0, [%1];" : "=r"(v.word[0]) : "l"(at));                           \
    else                                                                                                  \
      asm("ld.global" qualifiers ".u16 %0, [%1];" : "=h"(v.word[0]) : "l"(at));                           \
    return v;                                                                                             \
  }
// For memory that nothing writes while the kernel runs. The compiler may hoist these to the start of the kernel, so a kernel that overlaps
// the previous one (programmatic dependent launch) must not use them on what that one writes.
BNB_LOAD(load_const, ".nc")
BNB_LOAD(load_once, ".nc.L1::no_allocate")  // read by one thread only
#undef BNB_LOAD
template <class V> BNB_DEVICE V load(const void* from) {
  if constexpr (sizeof(V) == 16) return __builtin_bit_cast(V, *static_cast<const uint4*>(from));
  if constexpr (sizeof(V) == 8) return __builtin_bit_cast(V, *static_cast<const uint2*>(from));
  if constexpr (sizeof(V) == 4) return __builtin_bit_cast(V, *static_cast<const uint32_t*>(from));
  if constexpr (sizeof(V) == 2) return __builtin_bit_cast(V, *static_cast<const uint16_t*>(from));
}

template <class V> BNB_DEVICE void store(void* to, const V& v) {
  if constexpr (sizeof(V) == 16) *static_cast<uint4*>(to) = __builtin_bit_cast(uint4, v);
  if constexpr (sizeof(V) == 8) *static_cast<uint2*>(to) = __builtin_bit_cast(uint2, v);
  if constexpr (sizeof(V) == 4) *static_cast<uint32_t*>(to) = __builtin_bit_cast(uint32_t, v);
  if constexpr (sizeof(V) == 2) *static_cast<uint16_t*>(to) = __builtin_bit_cast(uint16_t, v);
}
// Not read again soon: evicted first.
template <class V> BNB_DEVICE void store_once(void* to, const V& v) {
  if constexpr (sizeof(V) == 16) __stcs(static_cast<uint4*>(to), __builtin_bit_cast(uint4, v));
  if constexpr (sizeof(V) == 8) __stcs(static_cast<uint2*>(to), __builtin_bit_cast(uint2, v));
  if constexpr (sizeof(V) == 4) __stcs(static_cast<unsigned*>(to), __builtin_bit_cast(uint32_t, v));
  if constexpr (sizeof(V) == 2) __stcs(static_cast<unsigned short*>(to), __builtin_bit_cast(uint16_t, v));
}

// ---- shared memory
template <class V> BNB_DEVICE V load_shared(const void* from) { return load<V>(from); }
template <class V> BNB_DEVICE void store_shared(void* to, const V& v) { store(to, v); }

// `bytes` (4, 8, 16) from global to shared memory, zeros past the first `valid` of them. Both addresses aligned to `bytes`. Visible to this
// thread after copy_wait, to others after a barrier that follows it.
template <int bytes> BNB_DEVICE void copy_async(void* to, const void* from, unsigned valid = bytes) {
  if constexpr (kHasCopyAsync) {
    const auto at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    if constexpr (bytes == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(__cvta_generic_to_global(from)), "r"(valid) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(__cvta_generic_to_global(from)), "n"(bytes), "r"(valid)
                   : "memory");
  } else {
    Bits<bytes> v = {};
    if (valid == bytes)
      v = load<Bits<bytes>>(from);
    else
      for (unsigned i = 0; i < valid; ++i) v.word[i / 4] |= uint32_t{static_cast<const uint8_t*>(from)[i]} << i % 4 * 8;
    store(to, v);
  }
}
// Commits a group of this thread's copies; copy_wait<n> waits for all groups except the last n.
BNB_DEVICE void copy_commit() {
  if constexpr (kHasCopyAsync) asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int n> BNB_DEVICE void copy_wait() {
  if constexpr (kHasCopyAsync) asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8 (16-byte aligned) and gets
// elements (i / 4, i % 4 * 2) and (i / 4, i % 4 * 2 + 1) of each.
BNB_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// ---- tensor cores: d += a * b, one warp. With g = lane / 4, t = lane % 4 and 16-bit elements in pairs (the left one low):
//   a 16x16  a[0]: row g,     columns 2t, 2t+1   a[1]: row g + 8   a[2]: row g, columns 2t+8, 2t+9   a[3]: row g + 8, likewise
//   b 16x8   b[0]: column g,  rows 2t, 2t+1      b[1]: rows 2t+8, 2t+9
//   d 16x8   d[0], d[1]: row g, columns 2t, 2t+1  d[2], d[3]: row g + 8
template <class T> BNB_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(kHasMma<T> || kArch == 0, "no mma for this type on this architecture: ask kHasMma<T>");
  if constexpr (kArch >= 80 && dtype_of<T> == DType::bf16)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (kArch >= 80)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    for (int half = 0; half < 2; ++half)
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
}

// The same for int8: 16x32 times 32x8, four elements of a row of `a` or a column of `b` per word, exact in 32 bits.
BNB_DEVICE void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if BNB_ARCH >= 80
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif BNB_ARCH >= 75
  BNB_UNROLL
  for (int i = 0; i < 4; ++i)  // the words of a are its quarters, 8x16 each
    asm volatile("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
                 : "+r"(d[i % 2 * 2]), "+r"(d[i % 2 * 2 + 1])
                 : "r"(a[i]), "r"(b[i / 2]));
#else
  __trap();
#endif
}

// ---- arithmetic, rounded to nearest even, subnormals kept, never contracted. A NaN that comes out has bits 0x7fffffff
BNB_DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
BNB_DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
BNB_DEVICE float div(float a, float b) { return __fdiv_rn(a, b); }
BNB_DEVICE float sqrt(float x) { return __fsqrt_rn(x); }
BNB_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
BNB_DEVICE float fma_up(float a, float b, float c) { return __fmaf_ru(a, b, c); }  // rounded up
BNB_DEVICE float reciprocal(float x) { return __frcp_rn(x); }

BNB_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
BNB_DEVICE float bits_float(uint32_t x) { return __uint_as_float(x); }

// Four bytes out of the eight of (low, high), chosen by the nibbles of `which`.
BNB_DEVICE uint32_t permute(uint32_t low, uint32_t high, uint32_t which) { return __byte_perm(low, high, which); }
// count + !(x <= y): incremented where x is above y or NaN.
BNB_DEVICE uint32_t count_above(uint32_t count, float x, float y) {
  asm("{ .reg .pred above; setp.gtu.f32 above, %1, %2; @above add.u32 %0, %0, 1; }" : "+r"(count) : "f"(x), "f"(y));
  return count;
}
// The greater of each half, both unsigned: 16-bit integers, or the bits of |x| of type T, NaN greatest.
template <class T> BNB_DEVICE uint32_t max_halves(uint32_t a, uint32_t b) {
  uint32_t r;
  if constexpr (kArch >= 90)
    asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else if constexpr (kArch >= 80 && dtype_of<T> == DType::bf16)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else if constexpr (kArch >= 80)
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  else
    r = max(a & 0xffff, b & 0xffff) | max(a & 0xffff0000, b & 0xffff0000);
  return r;
}
BNB_DEVICE unsigned popcount(uint64_t x) { return static_cast<unsigned>(__popcll(x)); }

// ---- conversions
BNB_DEVICE float to_float(float x) { return x; }
BNB_DEVICE float to_float(BFloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
BNB_DEVICE float to_float(Half x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}
// To nearest even, subnormals kept. A NaN becomes 0x7fff: where its bits matter use bnb::rounded (common/convert.h).
template <class T> BNB_DEVICE T round_to(float x) {
  T r;
  if constexpr (dtype_of<T> == DType::f32) {
    r = x;
  } else if constexpr (dtype_of<T> == DType::f16) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  } else if constexpr (kArch >= 80) {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
  } else {
    const uint32_t b = __float_as_uint(x);
    r.bits = (b & 0x7fffffff) > 0x7f800000 ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
  }
  return r;
}
// Two 16-bit floats in a word, and out of it.
template <class T> BNB_DEVICE uint32_t pack(float low, float high) {
  uint32_t r;
  if constexpr (kArch >= 80 && dtype_of<T> == DType::bf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else if constexpr (kArch >= 80)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  else
    r = round_to<T>(low).bits | uint32_t{round_to<T>(high).bits} << 16;
  return r;
}
template <class T> BNB_DEVICE void unpack(uint32_t x, float& low, float& high) {
  if constexpr (dtype_of<T> == DType::bf16) {
    low = __uint_as_float(x << 16);
    high = __uint_as_float(x & 0xffff0000);
  } else {
    low = dev::to_float(T{static_cast<uint16_t>(x)});
    high = dev::to_float(T{static_cast<uint16_t>(x >> 16)});
  }
}

}  // namespace bnb::cuda::dev

#else
#include "cuda_on_host/ptx.h"
#endif
