// The 4-bit product for one row of a, in fp32, on vectors of 16: sum over blocks of absmax * (sum of value * x).
//
// The scale of a block leaves its sum, so that a weight costs one lookup and one FMA and is not rounded to the type of a: the result is
// nearer to the quantized weights than that of the other products, and not bit-equal to them. Gemm4bit::batch_invariant turns it off.
// Reads k / 2 bytes of codes a column, in order. 128 weights take 7 shifts, 8 permutes, 8 FMA and 2 more for the scale on two ports.
#pragma once

#if defined(__AVX512F__)

#include "gemm4_dot.h"

namespace bnb::cpu {
namespace {

template <class Isa, class T> class RowGemm {
  static constexpr int columns_at_once = 4, vectors = 8;
  static constexpr int64_t step = 2 * kGroup, ahead = 8192;  // weights at a time; bytes of codes between their prefetch and their use

 public:
  static bool serves(const Gemm4bit& d) { return !d.batch_invariant && d.m == 1 && layout_of(d) == Layout::groups; }

  static int64_t pack_bytes(const Gemm4bit& d) { return ceil_div(d.k, step) * step * int64_t{sizeof(float)}; }
  static int64_t pack_units(const Gemm4bit&) { return 1; }
  // Lane l of vector i holds the element whose code is nibble i of dword l: 8 l + (i ^ 1).
  static void pack(const Gemm4bit& d, void* packed, Range) {
    const __m512i lanes = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    const T* from = static_cast<const T*>(d.a.data);
    auto* to = static_cast<float*>(packed);
    for (int64_t k = 0; k < d.k; k += step, to += step) {
      alignas(64) float x[step] = {};
      const int64_t count = smaller(step, d.k - k);
      for (int64_t i = 0; i < count; i += Isa::lanes) _mm512_store_ps(x + i, Isa::load(from + k + i));
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) _mm512_store_ps(to + 16 * i, _mm512_i32gather_ps(lanes, x + (i ^ 1), 4));
    }
  }

  static void run(const Gemm4bit& d, const void* packed, Range columns) {
    const Decoder<Isa, FmaMath<Isa, T>> decoder(d);
    const Scratch scratch(decoder.scratch_floats(d, columns_at_once) * 4);
    for (int64_t n = columns.begin; n < columns.end; n += columns_at_once) {
      Row rows[columns_at_once];
      decoder.template rows<Layout::groups>(n, columns_at_once, static_cast<float*>(scratch.data()), rows);
      __m512 c[columns_at_once];
#pragma GCC unroll 4
      for (int j = 0; j < columns_at_once; ++j) c[j] = column(decoder.table(), rows[j], d.k, static_cast<const float*>(packed));
      float sums[columns_at_once];
      Gemm4Ops<Isa>::add_lanes(c[0], c[1], c[2], c[3], true, sums);
      write_columns<T, columns_at_once>(d, 0, 1, n, sums);
    }
  }

 private:
  [[gnu::noinline]] static __m512 column(__m512 values, const Row& row, int64_t k, const float* x) {
    const uint8_t* codes = row.codes;
    const float* absmax = row.absmax;
    __m512 sum = _mm512_setzero_ps();
    const auto add = [&](__m512i eight, __m512 scale) __attribute__((always_inline)) {
      asm("" : "+v"(eight));  // in a register: GCC would load it anew for every shift
      __m512 block;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) {
        // The permute looks at the low 4 bits.
        const __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(eight, static_cast<unsigned>(4 * v)), values),
                     xv = _mm512_load_ps(x + 16 * v);
        block = v == 0 ? _mm512_mul_ps(w, xv) : _mm512_fmadd_ps(w, xv, block);
      }
      sum = _mm512_fmadd_ps(block, scale, sum);
    };
    const auto scale = [](const float* first, const float* second) __attribute__((always_inline)) {
      return _mm512_mask_broadcastss_ps(_mm512_set1_ps(*first), 0xff00, _mm_load_ss(second));
    };
    for (; k > step; k -= step, codes += step / 2, absmax += 2, x += step) {
      __builtin_prefetch(codes + ahead, 0, 2);
      add(_mm512_loadu_si512(codes), scale(absmax, absmax + 1));
    }
    if (k == step)
      add(_mm512_loadu_si512(codes), scale(absmax, absmax + 1));
    else if (k > 0)
      add(_mm512_maskz_loadu_epi32(0x00ff, codes), scale(absmax, absmax));
    return sum;
  }
};

}  // namespace
}  // namespace bnb::cpu

#endif
