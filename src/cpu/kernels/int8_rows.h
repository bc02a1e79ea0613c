// int8 codes of rows and of columns, and back (bnb/int8.h).
#pragma once

#include <cstring>

#include "cpu/kernels/kernels.h"
#include "cpu/kernels/plain.h"

namespace bnb::cpu {
namespace {

template <class Isa> class Int8Rows {
  static constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;
  static constexpr int kAtOnce = 2 * kChunk;  // elements; the bits of a word of outliers

  // Elements as floats; zeros behind the end.
  template <class T> BNB_INLINE static void load(const T* x, int64_t count, float (&v)[kAtOnce]) {
    if (count >= kAtOnce) {
#pragma GCC unroll 4
      for (int i = 0; i < kAtOnce; i += Isa::lanes) Isa::store(v + i, Isa::load(x + i));
      return;
    }
    for (int i = 0; i < kAtOnce; ++i) v[i] = i < count ? read(x + i) : 0;
  }

  // An outlier's |x| as an integer is from `limit` to infinity. Without a threshold `limit` is above all, NaN included.
  static uint32_t limit_of(float threshold) { return threshold > 0 ? bits_of(threshold) : 0x80000000u; }
  BNB_INLINE static bool is_outlier(uint32_t magnitude, uint32_t limit) { return magnitude >= limit && magnitude <= kInfinity; }

  // What turns x into x * (127 * (1 / scale)): x * first * second. Zeros where there are no codes to be had.
  struct Factors {
    float first = 1, second = 0;
    explicit Factors(float scale) {
      if (!(scale > 0) || bits_of(scale) >= kInfinity) return;
      if (scale < 0x1p-100f) first = 0x1p100f;  // 1 / scale might be infinite
      second = 127.0f * (1.0f / (scale * first));
    }
  };
  // The integer nearest to v, ties to even: the low bits of the sum.
  BNB_INLINE static int8_t code(float v) { return static_cast<int8_t>(bits_of(v + 0x1.8p23f)); }

  template <class T> static void row(const T* x, int64_t columns, uint32_t limit, int8_t* codes, float* scale, uint64_t* outliers) {
    alignas(64) float v[kAtOnce];
    alignas(64) uint32_t most[kAtOnce] = {};
    for (int64_t k = 0; k < columns; k += kAtOnce) {
      load(x + k, columns - k, v);
      uint32_t any = 0;
      for (int i = 0; i < kAtOnce; ++i) {
        const uint32_t magnitude = bits_of(v[i]) & 0x7fffffff;
        const uint32_t out = is_outlier(magnitude, limit) ? ~0u : 0u, kept = magnitude & ~out;
        any |= out;
        most[i] = kept > most[i] ? kept : most[i];
      }
      if (any) [[unlikely]]
        for (int i = 0; i < kAtOnce; ++i)
          if (is_outlier(bits_of(v[i]) & 0x7fffffff, limit)) outliers[k / kAtOnce] |= uint64_t{1} << i;
    }
    uint32_t bits = 0;
    for (const uint32_t m : most) bits = m > bits ? m : bits;
    *scale = float_of(bits > kInfinity ? kNaN : bits);
    const Factors f(*scale);
    if (f.second == 0) {
      std::memset(codes, 0, static_cast<size_t>(columns));
      return;
    }
    for (int64_t k = 0; k < columns; k += kAtOnce) {
      load(x + k, columns - k, v);
      int8_t q[kAtOnce];
      if (f.first == 1) [[likely]]
        for (int i = 0; i < kAtOnce; ++i) q[i] = code(v[i] * f.second);
      else
        for (int i = 0; i < kAtOnce; ++i) q[i] = code(v[i] * f.first * f.second);
      std::memcpy(codes + k, q, columns - k >= kAtOnce ? kAtOnce : static_cast<size_t>(columns - k));
    }
  }

 public:
  // `outliers`: words of these rows alone. Codes of outliers themselves are left undefined.
  static void quantize(const QuantizeInt8& d, uint64_t* outliers, Range rows) {
    const uint32_t limit = limit_of(d.threshold);
    visit(d.x.dtype, [&](auto t) {
      for (int64_t r = rows.begin; r < rows.end; ++r)
        row(static_cast<const decltype(t)*>(d.x.data) + r * d.columns, d.columns, limit, d.codes.data() + r * d.columns, d.scale.data() + r,
            outliers);
    });
  }

  static_assert(kAtOnce == kInt8Columns);
  static void quantize_columns(const QuantizeColumnsInt8& d, Range columns) {
    const uint32_t limit = limit_of(d.threshold);
    visit(d.x.dtype, [&](auto t) {
      const auto* x = static_cast<const decltype(t)*>(d.x.data);
      for (int64_t k = columns.begin; k < columns.end; k += kAtOnce) {
        const int64_t count = columns.end - k;
        alignas(64) float v[kAtOnce], first[kAtOnce], second[kAtOnce];
        alignas(64) uint32_t most[kAtOnce] = {};
        for (int64_t r = 0; r < d.rows; ++r) {
          load(x + r * d.columns + k, count, v);
          for (int i = 0; i < kAtOnce; ++i) {
            const uint32_t magnitude = bits_of(v[i]) & 0x7fffffff, kept = is_outlier(magnitude, limit) ? 0 : magnitude;
            most[i] = kept > most[i] ? kept : most[i];
          }
        }
        for (int i = 0; i < kAtOnce; ++i) {
          const float scale = float_of(most[i] > kInfinity ? kNaN : most[i]);
          if (i < count) d.scale[static_cast<size_t>(k + i)] = scale;
          const Factors f(scale);
          first[i] = f.first, second[i] = f.second;
        }
        for (int64_t r = 0; r < d.rows; ++r) {
          load(x + r * d.columns + k, count, v);
          int8_t q[kAtOnce];
          for (int i = 0; i < kAtOnce; ++i) {
            const bool none = is_outlier(bits_of(v[i]) & 0x7fffffff, limit) || second[i] == 0;
            q[i] = code(none ? 0 : v[i] * first[i] * second[i]);
          }
          std::memcpy(d.codes.data() + r * d.columns + k, q, count >= kAtOnce ? kAtOnce : static_cast<size_t>(count));
        }
      }
    });
  }

  static void dequantize(const DequantizeInt8& d, Range rows) {
    visit(d.out.dtype, [&](auto t) {
      using T = decltype(t);
      for (int64_t r = rows.begin; r < rows.end; ++r) {
        const int8_t* codes = d.codes.data() + r * d.columns;
        T* out = static_cast<T*>(d.out.data) + r * d.columns;
        const float scale = d.scale[static_cast<size_t>(r)];
        for (int64_t k = 0; k < d.columns; k += kAtOnce) {
          const int64_t count = d.columns - k < kAtOnce ? d.columns - k : kAtOnce;
          int8_t q[kAtOnce] = {};
          alignas(64) float v[kAtOnce];
          alignas(64) T y[kAtOnce];
          std::memcpy(q, codes + k, static_cast<size_t>(count));
          for (int i = 0; i < kAtOnce; ++i) v[i] = static_cast<float>(q[i]) * scale * (1 / 127.0f);
          for (int i = 0; i < kAtOnce; i += Isa::lanes) Isa::store(y + i, Isa::load(v + i));
          std::memcpy(out + k, y, static_cast<size_t>(count) * sizeof(T));
        }
      }
    });
  }
};

}  // namespace
}  // namespace bnb::cpu
