// Rows of a 4-bit weight, decoded for the products of gemm_4bit_dot.h and avx512/gemm_4bit_amx.h.
#pragma once

#include <cstring>

#include "cpu/gemm/product.h"
#include "cpu/isa/isa.h"

namespace bnb::cpu {
namespace {

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
template <class F> BNB_INLINE void with(Layout layout, F&& f) {
  using enum Layout;
  if (layout == groups) return f(std::integral_constant<Layout, groups>{});
  if (layout == halves) return f(std::integral_constant<Layout, halves>{});
  f(std::integral_constant<Layout, anywhere>{});
}

// One row of W. absmax holds one number a group (Layout::groups), two (halves), or one for each block that the row touches (anywhere).
struct Row {
  const uint8_t* codes;  // the byte that holds element 0
  const float* absmax;
};

// `Math` names the order and type of decoded weights: Element, Vec, lanes, Table, decode<split>, store, element.
template <class Isa, class Math> class Decoder {
  static constexpr int vectors = kGroup / Math::lanes;

 public:
  using Element = typename Math::Element;
  using Vec = typename Math::Vec;
  using Table = typename Math::Table;

  explicit Decoder(const Gemm4bit& d)
      : d_(d),
        values_(visit(d.type, [](auto format) { return decltype(format)::values.data(); })),
        table_(Math::table(values_)),
        shift_(__builtin_ctzll(static_cast<uint64_t>(d.blocksize))) {}

  // Floats of scratch that `count` rows take.
  static int64_t scratch_floats(const Gemm4bit& d, int64_t count) {
    const int64_t nested = d.absmax.is_nested() ? count * d.k / d.blocksize + 2 : 0;
    return ceil_div(count * row_halves(d) + nested, 16) * 16;
  }

  // Rows [n, n + count); those beyond the last row of W repeat it. What the rows after them need of absmax is prefetched.
  template <Layout layout> void rows(int64_t n, int64_t count, float* scratch, Row* to) const {
    prefetch_absmax(n + count, count);
    const int64_t inside = smaller(count, d_.n - n);
    if constexpr (layout == Layout::anywhere) {
      const float* blocks = blocks_of(n, inside, scratch + count * row_halves(d_));
      for (int64_t i = 0; i < inside; ++i) {
        const int64_t begin = (n + i) * d_.k;
        to[i] = {d_.codes.data() + begin / 2, blocks + ((begin >> shift_) - (n * d_.k >> shift_))};
      }
    } else {
      const float* absmax = absmax_of<layout>(n, inside, scratch);
      const uint8_t* codes = d_.codes.data() + n * d_.k / 2;
      for (int64_t i = 0; i < inside; ++i) to[i] = {codes + i * (d_.k / 2), absmax + i * (d_.k / unit<layout>)};
    }
    for (int64_t i = inside; i < count; ++i) to[i] = to[inside - 1];
  }

  // Whether absmax_of is a part of `absmax.values`.
  template <Layout layout> bool is_direct() const { return !d_.absmax.is_nested() && d_.blocksize == unit<layout>; }
  // The absmax of rows [n, n + count) of W, one number a group or half of one.
  template <Layout layout> const float* absmax_of(int64_t n, int64_t count, float* scratch) const {
    const int64_t units = count * d_.k / unit<layout>, offset = n * d_.k & (d_.blocksize - 1);
    const float* blocks = blocks_of(n, count, scratch + units);
    if (d_.blocksize == unit<layout>) return blocks;
    for (int64_t i = 0; i < units; ++i) scratch[i] = blocks[(offset + i * unit<layout>) >> shift_];
    return scratch;
  }

  // Brings the absmax of rows [n, n + count), or its codes, into L2.
  BNB_INLINE void prefetch_absmax(int64_t n, int64_t count) const {
    const Absmax& a = d_.absmax;
    const int64_t size = a.is_nested() ? 1 : int64_t{sizeof(float)};
    const auto* base = a.is_nested() ? reinterpret_cast<const char*>(a.codes.data()) : reinterpret_cast<const char*>(a.values.data());
    const char *from = base + (n * d_.k >> shift_) * size, *end = base + ((n + count) * d_.k >> shift_) * size;
    if (from >= end) return;
    for (; from < end; from += 64) __builtin_prefetch(from, 0, 2);
    __builtin_prefetch(end - 1, 0, 2);
  }

  // To be kept in a local variable, that is in registers, around a loop.
  const Table& table() const { return table_; }

  // Group g of a row, in registers. Not for Layout::anywhere.
  template <Layout layout> BNB_INLINE static void group(const Table& table, const Row& r, int64_t g, Vec (&w)[vectors]) {
    const uint8_t* codes = r.codes + g * (kGroup / 2);
    if constexpr (layout == Layout::groups)
      Math::template decode<false>(table, codes, r.absmax[g], 0, w);
    else
      Math::template decode<true>(table, codes, r.absmax[2 * g], r.absmax[2 * g + 1], w);
  }
  // The last group of a row of 64 i + 32 elements: the missing half is zero, whatever the absmax.
  BNB_INLINE void half_group(const Row& r, int64_t g, Vec (&w)[vectors]) const {
    uint8_t codes[kGroup / 2] = {};
    std::memcpy(codes, r.codes + g * (kGroup / 2), kGroup / 4);
    Math::template decode<true>(table_, codes, r.absmax[2 * g], 0, w);
  }

  // Group g of `count` rows from row n on to memory: rows row_stride, vectors of a group vector_stride elements apart.
  // Zeros follow the last element of a row.
  template <Layout layout, int count>
  BNB_INLINE void group_of_rows(const Table& table, const Row* rows, int64_t n, int64_t g, Element* to, int64_t row_stride,
                                int64_t vector_stride) const {
    if constexpr (layout == Layout::anywhere) {
      for (int r = 0; r < count; ++r) elements(rows[r], smaller(n + r, d_.n - 1), g, to + r * row_stride, vector_stride);
    } else if (layout == Layout::halves && g * kGroup + kGroup > d_.k) {
      for (int r = 0; r < count; ++r, to += row_stride) {
        Vec w[vectors];
        half_group(rows[r], g, w);
        for (int i = 0; i < vectors; ++i) Math::store(to + i * vector_stride, w[i]);
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < count; ++r, to += row_stride) {
        Vec w[vectors];
        group<layout>(table, rows[r], g, w);
        for (int i = 0; i < vectors; ++i) Math::store(to + i * vector_stride, w[i]);
      }
    }
  }

 private:
  static int64_t row_halves(const Gemm4bit& d) { return ceil_div(d.k, kGroup) * 2; }

  template <Layout layout> static constexpr int64_t unit = layout == Layout::groups ? kGroup : kGroup / 2;

  // The absmax of the blocks of rows [n, n + count), those of a nested one in the scratch.
  const float* blocks_of(int64_t n, int64_t count, float* scratch) const {
    const int64_t first = n * d_.k >> shift_;
    if (!d_.absmax.is_nested()) return d_.absmax.values.data() + first;
    nested(first, d_.k == 0 ? first : (((n + count) * d_.k - 1) >> shift_) + 1, scratch);
    return scratch;
  }

  // to[b - begin] = fl(code[codes[b]] * nested) + offset
  void nested(int64_t begin, int64_t end, float* to) const {
    const Absmax& a = d_.absmax;
    const int shift = __builtin_ctzll(static_cast<uint64_t>(a.nested_blocksize));
    const float *code = a.code.data(), *scale = a.nested.data(), offset = a.offset;
    const uint8_t* codes = a.codes.data();
    while (begin < end) {
      const int64_t stop = smaller(end, ((begin >> shift) + 1) << shift), count = stop - begin;
      const float absmax = scale[begin >> shift];
      int64_t i = 0;
      for (; i + Isa::lanes <= count; i += Isa::lanes)
        Isa::store(to + i, Isa::Gemm4bitOps::nested(code, codes + begin + i, absmax, offset));
      for (; i < count; ++i) {
        const float scaled = code[codes[begin + i]] * absmax;
        to[i] = scaled + offset;
      }
      to += count, begin = stop;
    }
  }

  // Group g of row n, whatever its blocks.
  void elements(const Row& row, int64_t n, int64_t g, Element* to, int64_t vector_stride) const {
    const int64_t odd = n * d_.k % 2, offset = n * d_.k & (d_.blocksize - 1);
    int64_t table_block = -1;
    Element table[16] = {};
    for (int i = 0; i < kGroup; ++i) {
      const int64_t k = g * kGroup + i, block = (offset + k) >> shift_, place = position<Math::lanes>(i);
      Element w{};
      if (k < d_.k) {
        if (block != table_block)
          for (int c = 0; c < 16; ++c) table[c] = Math::element(values_[c] * row.absmax[block]);
        table_block = block;
        w = table[row.codes[(k + odd) / 2] >> ((k + odd) % 2 != 0 ? 0 : 4) & 15];
      }
      to[place / Math::lanes * vector_stride + place % Math::lanes] = w;
    }
  }

  const Gemm4bit& d_;
  const float* values_;
  Table table_;
  int shift_;
};

}  // namespace
}  // namespace bnb::cpu
