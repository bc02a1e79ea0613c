// The 4-bit product for one row of a, in fp32, on vectors of 16: sum over blocks of absmax * (sum of value * x).
//
// The scale of a block leaves its sum, so that a weight costs one lookup and one FMA and is not rounded to the type of a: the result is
// nearer to the quantized weights than that of the other products, and not bit-equal to them. Gemm4bit::batch_invariant turns it off.
// Reads k / 2 bytes of codes a column. 128 weights take 7 shifts, 8 permutes, 8 FMA and 2 more for the scale on two ports.
#pragma once

#include <immintrin.h>

#include "cpu/gemm/gemm_4bit_dot.h"

namespace bnb::cpu {
namespace {

// y[n .. n + count) = sums + bias, count <= 16.
template <class Isa, class T> void write_row(const Gemm4bit& d, int64_t n, int64_t count, __m512 sums) {
  T* to = static_cast<T*>(d.out.data) + n;
  alignas(64) float bias[Isa::lanes];
  load_bias(d.bias, n, bias);
  const __m512 y = _mm512_add_ps(sums, _mm512_load_ps(bias));
  if (count == Isa::lanes) return Isa::store(to, y);
  T out[Isa::lanes];
  Isa::store(out, y);
  std::memcpy(to, out, static_cast<size_t>(count) * sizeof(T));
}

// absmax[0] in the lower half, absmax[second] in the upper one.
BNB_INLINE __m512 two_scales(const float* absmax, int64_t second) {
  return _mm512_mask_broadcastss_ps(_mm512_set1_ps(absmax[0]), 0xff00, _mm_load_ss(absmax + second));
}
// The halves of x to the lower halves of two sums, so that both are added up in the same order.
BNB_INLINE void add_halves(__m512& first, __m512& second, __m512 x) {
  first = _mm512_mask_add_ps(first, 0x00ff, first, x);
  second = _mm512_mask_add_ps(second, 0x00ff, second, _mm512_shuffle_f32x4(x, x, 0x0e));
}

// Fetches the codes further on in a stream: long before their use into L2, where more fetches can be under way than in L1, then into L1.
BNB_INLINE void prefetch_codes(const uint8_t* codes) {
  __builtin_prefetch(codes + 1024, 0, 2);
  __builtin_prefetch(codes + 512, 0, 3);
}

// `streams` rows of W that are multiplied at once, and where each begins.
template <int streams> struct Streams {
  const uint8_t* codes;
  const float* absmax;
  alignas(64) int64_t codes_at[streams];
  alignas(64) int64_t absmax_at[streams];
};

// Columns of y, `height` adjacent ones of `streams` parts of `columns` at a time: multiply(Streams, sums[height][streams]), and finish()
// before sums are read. The CPU fetches ahead on its own, but within a page of 4 KiB, so it does that in all parts at once: weights from
// memory take 0.6 of the time that they take in order. An absmax that is not read where it lies is decoded between products, for the next
// rows. `columns` are a multiple of `height`.
template <int streams, int height, class Isa, class T, class F, class Finish>
void in_streams(const Gemm4bit& d, const Decoder<Isa, FmaMath<Isa, T>>& decoder, Range columns, F&& multiply, Finish&& finish) {
  constexpr int lanes = Isa::lanes, steps = lanes / height, ahead = streams, lines_at_first = 16;
  if (columns.begin >= columns.end) return;
  const bool direct = decoder.template is_direct<Layout::groups>();
  const int64_t length = ceil_div(columns.end - columns.begin, streams * height), last = columns.end - height;
  const int64_t codes = d.k / 2, groups = d.k / kGroup, floats = decoder.scratch_floats(d, ahead * height);
  const auto row_of = [&](int64_t step, int64_t stream) { return smaller(columns.begin + (stream * length + step) * height, last); };
  for (int64_t n = columns.begin; d.k > 0 && n < columns.end; n += length * height) {
    for (int l = 0; l < lines_at_first; ++l) __builtin_prefetch(d.codes.data() + n * codes + 64 * l, 0, 2);
    decoder.prefetch_absmax(n, smaller(length, ahead) * height);
  }
  const Scratch scratch(direct ? 0 : 2 * streams * floats * int64_t{sizeof(float)});
  Streams<streams> rows{d.codes.data(), direct ? d.absmax.values.data() : static_cast<float*>(scratch.data()), {}, {}};
  int64_t next[streams];  // absmax_at for the steps after the prepared ones
  const auto prepare = [&](int64_t step, int s) {
    const int64_t n = row_of(step, s);
    float* to = static_cast<float*>(scratch.data()) + (step / ahead % 2 * streams + s) * floats;
    next[s] =
        decoder.template absmax_of<Layout::groups>(n, smaller(smaller(ahead, length - step) * height, columns.end - n), to) - rows.absmax;
  };
  for (int s = 0; s < streams; ++s) {
    rows.codes_at[s] = row_of(0, s) * codes;
    rows.absmax_at[s] = row_of(0, s) * groups;
    if (!direct) prepare(0, s);
  }
  alignas(64) float y[lanes][streams] = {};
  alignas(64) int32_t places[lanes];
  for (int i = 0; i < lanes; ++i) places[i] = i * streams;
  for (int64_t i = 0; i < length; i += steps) {
    const int64_t count = smaller(steps, length - i);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t slot = (i + j) % ahead, later = i + j - slot + ahead;
      if (!direct && slot == 0) std::memcpy(rows.absmax_at, next, sizeof(next));
      multiply(rows, y[j * height]);
      if (!direct && later < length) prepare(later, static_cast<int>(slot));
      for (int64_t& at : rows.codes_at) at = smaller(at + height * codes, last * codes);
      for (int64_t& at : rows.absmax_at) at = direct ? smaller(at + height * groups, last * groups) : at + height * groups;
    }
    finish();
    for (int s = 0; s < streams; ++s)
      if (const int64_t n = columns.begin + (s * length + i) * height; n < columns.end)
        write_row<Isa, T>(d, n, smaller(count * height, columns.end - n), _mm512_i32gather_ps(_mm512_load_si512(places), y[0] + s, 4));
  }
}

template <class Isa, class T> class RowGemm {
  static constexpr int columns_at_once = 4, vectors = 8;
  static constexpr int64_t step = 2 * kGroup;  // weights at a time

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
      if (count == kGroup) std::memcpy(x + kGroup, x, sizeof(x) / 2);  // the last group serves two columns of y at once
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) _mm512_store_ps(to + 16 * i, _mm512_i32gather_ps(lanes, x + (i ^ 1), 4));
    }
  }

  static void run(const Gemm4bit& d, const void* packed, Range columns) {
    const Decoder<Isa, FmaMath<Isa, T>> decoder(d);
    in_streams<columns_at_once, 1>(
        d, decoder, columns,
        [&](const Streams<columns_at_once>& rows, float* sums) {
          columns_of(decoder.table(), rows, d.k, static_cast<const float*>(packed), sums);
        },
        [] {});
  }

 private:
  [[gnu::noinline]] static void columns_of(__m512 values, const Streams<columns_at_once>& rows, int64_t k, const float* x, float* sums) {
    __m512 sum[columns_at_once];
    for (auto& s : sum) s = _mm512_setzero_ps();
    const int64_t whole = k / step;
    for (int64_t i = 0; i < whole; ++i, x += step) {
      const float* absmax = rows.absmax + 2 * i;
      __m512i eight[columns_at_once];
#pragma GCC unroll 4
      for (int j = 0; j < columns_at_once; ++j) {
        const uint8_t* codes = rows.codes + rows.codes_at[j] + i * (step / 2);
        prefetch_codes(codes);
        eight[j] = _mm512_loadu_si512(codes);
      }
      __m512 block[columns_at_once];
      multiply(values, eight, x, block);
#pragma GCC unroll 4
      for (int j = 0; j < columns_at_once; ++j) sum[j] = _mm512_fmadd_ps(block[j], two_scales(absmax + rows.absmax_at[j], 1), sum[j]);
    }
    if (k % step != 0) {  // one group: that of rows j and j + 1 in the halves of a vector
      const uint8_t* codes = rows.codes + whole * (step / 2);
      const float* absmax = rows.absmax + 2 * whole;
      __m512i eight[columns_at_once / 2];
#pragma GCC unroll 2
      for (int j = 0; j < columns_at_once / 2; ++j)
        eight[j] =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + rows.codes_at[2 * j]))),
                               _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + rows.codes_at[2 * j + 1])), 1);
      __m512 block[columns_at_once / 2];
      multiply(values, eight, x, block);
#pragma GCC unroll 2
      for (int j = 0; j < columns_at_once / 2; ++j) {
        const int64_t first = rows.absmax_at[2 * j], second = rows.absmax_at[2 * j + 1];
        const __m512 product = _mm512_mul_ps(block[j], two_scales(absmax + first, second - first));
        add_halves(sum[2 * j], sum[2 * j + 1], product);
      }
    }
    Isa::Gemm4bitOps::add_lanes(sum[0], sum[1], sum[2], sum[3], true, sums);
  }

  // block[j] = sum over nibbles of value * x
  template <int count> BNB_INLINE static void multiply(__m512 values, __m512i (&eight)[count], const float* x, __m512 (&block)[count]) {
#pragma GCC unroll 4
    for (auto& e : eight) asm("" : "+v"(e));  // in a register: GCC would load it anew for every shift
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      const __m512 xv = _mm512_load_ps(x + 16 * v);
#pragma GCC unroll 4
      for (int j = 0; j < count; ++j) {
        // The permute looks at the low 4 bits.
        const __m512 w = _mm512_permutexvar_ps(_mm512_srli_epi32(eight[j], static_cast<unsigned>(4 * v)), values);
        block[j] = v == 0 ? _mm512_mul_ps(w, xv) : _mm512_fmadd_ps(w, xv, block[j]);
      }
    }
  }
};

}  // namespace
}  // namespace bnb::cpu
