// What the products of all weights share.
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "common/formats.h"
#include "cpu/kernels/kernels.h"

namespace bnb::cpu {
namespace {

BNB_INLINE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BNB_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows [m, m + count) in near-equal tiles of at most `most` rows: f(first row, constant number of rows).
template <int most, class F> BNB_INLINE void tiles_of(int64_t m, int64_t count, F&& f) {
  for (int64_t left = ceil_div(count, most), end = m + count; left > 0; --left) {
    const int64_t height = ceil_div(end - m, left);
    [&]<int... i>(std::integer_sequence<int, i...>) {
      ((height == i + 1 ? f(m, std::integral_constant<int, i + 1>{}) : void()), ...);
    }(std::make_integer_sequence<int, most>{});
    m += height;
  }
}

// The bias of `columns` columns of y from n on; 0 where there is none or no column.
template <int columns> void load_bias(const ConstView& all, int64_t n, float (&bias)[columns]) {
  for (float& b : bias) b = 0;
  if (all.size == 0) return;
  visit(all.dtype, [&]<class B>(B) {
    B values[columns] = {};
    std::memcpy(values, static_cast<const B*>(all.data) + n, static_cast<size_t>(smaller(columns, all.size - n)) * sizeof(B));
    for (int j = 0; j < columns; ++j) bias[j] = to_float(values[j]);
  });
}

inline constexpr int64_t kColumnStep = 32;  // columns that every product takes at once, or a part of

// A product whose kernel depends on the call: Choice::of(d, f) is f<the kernel that serves d>().
template <class D, class Choice> struct ProductBy {
  static constexpr int64_t column_step = kColumnStep;
  static int64_t pack_bytes(const D& d) {
    return Choice::of(d, [&]<class P>() { return P::pack_bytes(d); });
  }
  static int64_t pack_units(const D& d) {
    return Choice::of(d, [&]<class P>() { return P::pack_units(d); });
  }
  static void pack(const D& d, void* packed, Range units) {
    Choice::of(d, [&]<class P>() { P::pack(d, packed, units); });
  }
  static void run(const D& d, const void* packed, Range columns) {
    Choice::of(d, [&]<class P>() { P::run(d, packed, columns); });
  }
};

}  // namespace
}  // namespace bnb::cpu
