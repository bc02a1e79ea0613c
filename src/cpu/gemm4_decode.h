// Rows of a 4-bit weight, decoded for the products of gemm4_dot.h and gemm4_amx.h.
#pragma once

#include <cstring>

#include "../formats.h"
#include "kernels.h"
#include "simd/gemm4_ops.h"

namespace bnb::cpu {
namespace {

BNB_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BNB_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How the blocks lie in a row, from the fastest to decode to the slowest.
enum class Layout : uint8_t {
  groups,   // every group of 64 has one absmax
  halves,   // blocks begin at multiples of 32 of every row
  anywhere  // rows may begin in the middle of a block or of a byte
};
BNB_INLINE Layout layout_of(const Gemm4bit& d) {
  if (d.k % 32 != 0) return Layout::anywhere;
  return d.k % kGroup == 0 && d.blocksize >= kGroup ? Layout::groups : Layout::halves;
}

// f(constant) for each layout.
template <class F>
BNB_INLINE void with(Layout layout, F&& f) {
  using enum Layout;
  if (layout == groups) return f(std::integral_constant<Layout, groups>{});
  if (layout == halves) return f(std::integral_constant<Layout, halves>{});
  f(std::integral_constant<Layout, anywhere>{});
}

// One row of W: element k has code number `first + k` of `codes` and absmax[(offset + k) >> shift].
struct Row {
  const uint8_t* codes;  // of the byte that holds element 0
  const float* absmax;
  int64_t offset;  // of element 0 in its block
  bool odd;        // element 0 is a low nibble
};

// `Math` names the order and type of decoded weights: Element, Vec, lanes, Table, decode<split>, store, element.
template <class Math>
class Decoder {
 public:
  explicit Decoder(const Gemm4bit& d)
      : d_(d),
        values_(visit(d.type, [](auto format) { return decltype(format)::values.data(); })),
        table_(Math::table(values_)),
        shift_(__builtin_ctzll(static_cast<uint64_t>(d.blocksize))) {}

  // Floats of scratch for the absmax of one row.
  static int64_t absmax_floats(const Gemm4bit& d) { return d.absmax.is_nested() ? (d.k / d.blocksize + 2 + 15) / 16 * 16 : 0; }

  // Nested absmax is decoded to `scratch`, once a row.
  Row row(int64_t n, float* scratch) const {
    const int64_t begin = n * d_.k, first = begin >> shift_;
    const uint8_t* codes = d_.codes.data() + begin / 2;
    const int64_t offset = begin & (d_.blocksize - 1);
    if (!d_.absmax.is_nested()) return {codes, d_.absmax.values.data() + first, offset, begin % 2 != 0};
    const int64_t end = d_.k == 0 ? first : ((begin + d_.k - 1) >> shift_) + 1;
    const int nested_shift = __builtin_ctzll(static_cast<uint64_t>(d_.absmax.nested_blocksize));
    const float *code = d_.absmax.code.data(), offset_of_all = d_.absmax.offset;
    for (int64_t b = first; b < end;) {
      const float nested = d_.absmax.nested[static_cast<size_t>(b >> nested_shift)];
      const int64_t stop = smaller(end, ((b >> nested_shift) + 1) << nested_shift), count = stop - b;
      const uint8_t* q = d_.absmax.codes.data() + b;
      float* to = scratch + (b - first);
      for (int64_t i = 0; i < count; ++i) {
        const float scaled = code[q[i]] * nested;
        to[i] = scaled + offset_of_all;
      }
      b = stop;
    }
    return {codes, scratch, offset, begin % 2 != 0};
  }

  BNB_INLINE float absmax(const Row& r, int64_t k) const { return r.absmax[(r.offset + k) >> shift_]; }

  // Group g of a row, in registers. Not for Layout::anywhere, nor for a last group of 32.
  template <Layout layout>
  BNB_INLINE void group(const Row& r, int64_t g, typename Math::Vec (&w)[kGroup / Math::lanes]) const {
    constexpr bool split = layout == Layout::halves;
    Math::template decode<split>(table_, r.codes + g * (kGroup / 2), absmax(r, g * kGroup), split ? absmax(r, g * kGroup + 32) : 0, w);
  }
  // The last group of a row of 64 i + 32 elements: the missing half is zero, whatever the absmax.
  BNB_INLINE void half_group(const Row& r, int64_t g, typename Math::Vec (&w)[kGroup / Math::lanes]) const {
    uint8_t codes[kGroup / 2] = {};
    std::memcpy(codes, r.codes + g * (kGroup / 2), kGroup / 4);
    Math::template decode<true>(table_, codes, absmax(r, g * kGroup), 0, w);
  }

  // Groups [begin, end) of a row to memory, vectors `stride` elements apart. Zeros follow the row's last element.
  template <Layout layout>
  void groups(const Row& r, int64_t begin, int64_t end, typename Math::Element* to, int64_t stride) const {
    if constexpr (layout == Layout::anywhere) return elements(r, begin, end, to, stride);
    constexpr int vectors = kGroup / Math::lanes;
    const int64_t whole = smaller(end, d_.k / kGroup);
    typename Math::Vec w[vectors];
    for (int64_t g = begin; g < whole; ++g, to += vectors * stride) {
      group<layout>(r, g, w);
      for (int i = 0; i < vectors; ++i) Math::store(to + i * stride, w[i]);
    }
    if (layout == Layout::halves && whole < end) {
      half_group(r, whole, w);
      for (int i = 0; i < vectors; ++i) Math::store(to + i * stride, w[i]);
    }
  }

 private:
  void elements(const Row& r, int64_t begin, int64_t end, typename Math::Element* to, int64_t stride) const {
    int64_t table_block = -1;
    typename Math::Element table[16];
    for (int64_t k = begin * kGroup; k < end * kGroup; ++k) {
      const int64_t block = (r.offset + k) >> shift_;
      if (block != table_block && k < d_.k)
        for (int i = 0; i < 16; ++i) table[i] = Math::element(values_[i] * r.absmax[block]);
      table_block = block;
      const int64_t e = k + r.odd, place = (k / kGroup - begin) * kGroup + position<Math::lanes>(static_cast<int>(k % kGroup));
      to[place / Math::lanes * stride + place % Math::lanes] =
          k < d_.k ? table[r.codes[e / 2] >> (e % 2 != 0 ? 0 : 4) & 15] : typename Math::Element{};
    }
  }

  const Gemm4bit& d_;
  const float* values_;
  typename Math::Table table_;
  int shift_;
};

}  // namespace
}  // namespace bnb::cpu
