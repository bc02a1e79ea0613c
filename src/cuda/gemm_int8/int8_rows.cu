// int8 codes of rows, and back; docs/NUMERICS.md has the rules.
//
// Rows: one per block, read once and kept in registers between the maximum and the codes (up to 64 KiB; longer rows are read again from the
// cache). Outlier columns are bits that blocks set in shared words; a second kernel clears the codes of those columns, if there are any.
// Moves sizeof(T) + 1 bytes per element; lower bound: those at copy bandwidth.
// Dequantization: 1 + sizeof(T) bytes per element.
#include <algorithm>

#include "common/arguments.h"
#include "common/convert.h"
#include "common/formats.h"
#include "cuda/gemm_int8/gemm_int8.cuh"
#include "cuda/gemm_int8/int8_codes.cuh"

namespace bnb::cuda {
namespace gemm {
namespace {

// Up to this size of x, each block reading all of x from the cache is faster than two more launches.
constexpr int64_t kTogetherBytes = int64_t{128} << 10;

// Threads per block for rows of `units` units: four units each.
constexpr int64_t kMostThreads = 1024;
uint32_t threads_for(int64_t units) {
  return static_cast<uint32_t>(std::clamp<int64_t>(ceil_div(units, kUnits * dev::kWarp), 1, kMostThreads / dev::kWarp) * dev::kWarp);
}

// `outliers`: one bit per column, null without a limit. Blocks set bits of words zeroed before; an outlier itself gets code 0. `together`,
// for few rows: each block searches all rows for outliers, so that it knows their columns without another kernel.
template <class T, bool together>
BNB_KERNEL(1024, 1)
quantize_rows_kernel(const uint8_t* x, int64_t rows, int64_t columns, bool vectors, uint32_t limit, uint8_t* codes, float* scale,
                     uint32_t* outliers) {
  constexpr int kPer = kPerUnit<T>;
  auto& largest = dev::shared<uint32_t[2][dev::kWarp]>();
  const int warps = static_cast<int>(dev::threads() / dev::kWarp), words = static_cast<int>((columns + 63) / 64 * 2);
  uint32_t* const bits = together ? &largest[0][0] + 2 * dev::kWarp : outliers;
  if constexpr (together) {
    for (int i = static_cast<int>(dev::thread()); i < words; i += static_cast<int>(dev::threads())) bits[i] = 0;
    dev::barrier();
  }
  const int64_t step = static_cast<int64_t>(dev::threads()) * kUnits;
  Bits<16> raw[kUnits];
  const auto unit_of = [&](int64_t base, int u) { return base + u * static_cast<int64_t>(dev::threads()) + dev::thread(); };
  const auto load = [&](const Row<T>& row, int64_t base) {
    BNB_UNROLL
    for (int u = 0; u < kUnits; ++u) raw[u] = row.load(unit_of(base, u));
  };
  bool any = false;
  const auto largest_kept = [&](const Row<T>& row) {
    uint32_t most = 0;
    BNB_KEEP_LOOP
    for (int64_t base = 0; base < row.units; base += step) {
      load(row, base);
      BNB_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        uint32_t here = largest_of<T>(raw[u]);
        if (here >= limit) {
          any = true;
          here = 0;
          float v[kPer];
          to_floats<T>(raw[u], v);
          uint32_t mask = 0;
          BNB_UNROLL
          for (int i = 0; i < kPer; ++i) {
            const uint32_t magnitude = dev::float_bits(v[i]) & 0x7fffffff;
            const bool out = is_outlier(v[i], limit);
            if (!out && magnitude > here) here = magnitude;
            mask |= out ? 1u << i : 0u;
          }
          const int64_t first = unit_of(base, u) * kPer;
          mask <<= first % 32;
          if (mask & ~bits[first / 32]) dev::atomic_or(bits + first / 32, mask);  // rows often share their outliers
        }
        most = here > most ? here : most;
      }
    }
    return most;
  };

  unsigned turn = 0;
  for (int64_t r = dev::block().x; r < rows; r += dev::grid().x, turn ^= 1) {
    if constexpr (together) {
      BNB_KEEP_LOOP
      for (int64_t other = 0; other < rows; ++other)
        if (other != r) largest_kept(Row<T>(x, other, columns, vectors));
    } else {
      any = false;
    }
    const Row<T> row(x, r, columns, vectors);
    uint32_t most = largest_kept(row);
    BNB_UNROLL
    for (unsigned by = 1; by < dev::kWarp; by *= 2) {
      const uint32_t other = dev::shuffle_xor(most, by);
      most = other > most ? other : most;
    }
    if (dev::lane() == 0) largest[turn][dev::warp()] = most;
    const bool any_outlier = dev::barrier_or(any);
    for (int w = 0; w < warps; ++w) most = largest[turn][w] > most ? largest[turn][w] : most;
    const float row_scale = dev::bits_float(most > kInfinity ? kNaN : most);
    if (dev::thread() == 0) scale[r] = row_scale;
    if constexpr (together)
      if (r == 0)
        for (int i = static_cast<int>(dev::thread()); i < words; i += static_cast<int>(dev::threads())) outliers[i] = bits[i];

    const Factors f(row_scale);
    BNB_KEEP_LOOP
    for (int64_t base = 0; base < row.units; base += step) {
      if (row.units > step) load(row, base);
      BNB_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        const int64_t unit = unit_of(base, u);
        if (unit >= row.units) break;
        float v[kPer];
        to_floats<T>(raw[u], v);
        if (any_outlier || f.first != 1 || f.second == 0) {
          const uint32_t out = together ? bits[unit * kPer / 32] >> unit * kPer % 32 : 0;
          BNB_UNROLL
          for (int i = 0; i < kPer; ++i) {
            const bool none = f.second == 0 || (together ? (out >> i & 1) != 0 : is_outlier(v[i], limit));
            v[i] = none ? 0 : dev::mul(v[i], f.first);
          }
        }
        uint32_t q[kPer];
        BNB_UNROLL
        for (int i = 0; i < kPer; ++i) q[i] = code(dev::mul(v[i], f.second));
        const auto packed = pack_codes(q);
        if (vectors)
          dev::store(codes + r * columns + unit * kPer, packed);
        else
          store_bytes(codes + r * columns, unit * kPer, columns, packed);
      }
    }
  }
}

// Codes of outlier columns become 0.
constexpr int kCleared = 256;  // columns at once
struct Cleared {
  int32_t column[kCleared];
  int32_t total;
};
BNB_KERNEL(256, 4) clear_columns(uint8_t* codes, int64_t rows, int64_t columns, Outliers outliers) {
  auto& s = dev::shared<Cleared>();
  int total = 0;
  for (int first = 0; first == 0 || first < total; first += kCleared) {
    if (dev::warp() == 0) {
      const int all = select_outliers(outliers, columns, first, kCleared, s.column);
      if (dev::lane() == 0) s.total = all;
    }
    dev::barrier();
    total = s.total;
    const int count = total - first < kCleared ? total - first : kCleared;
    for (int64_t row = dev::block().x * 8 + dev::warp(); row < rows; row += int64_t{dev::grid().x} * 8)
      for (int i = static_cast<int>(dev::lane()); i < count; i += dev::kWarp) codes[row * columns + s.column[i]] = 0;
    dev::barrier();
  }
}

// ---- dequantization
template <class T>
BNB_KERNEL(1024, 1)
dequantize_rows(const uint8_t* codes, const float* scale, int64_t rows, int64_t columns, bool vectors, uint8_t* out) {
  constexpr int kPer = kPerUnit<T>;
  const int64_t bytes = columns * static_cast<int64_t>(sizeof(T));
  for (int64_t r = dev::block().x; r < rows; r += dev::grid().x) {
    const float row_scale = scale[r];
    for (int64_t at = static_cast<int64_t>(dev::thread()) * kPer; at < columns; at += static_cast<int64_t>(dev::threads()) * kPer) {
      const auto q =
          vectors ? dev::load_once<Bits<kPer>>(codes + r * columns + at) : load_bytes<Bits<kPer>>(codes + r * columns, at, columns);
      Bits<16> y = {};
      BNB_UNROLL
      for (int i = 0; i < kPer; ++i) {
        const auto value = static_cast<float>(static_cast<int8_t>(q.word[i / 4] >> i % 4 * 8));
        float v = dev::mul(value, row_scale);
        if (!finite(row_scale)) v = product_with_nan(value, row_scale);
        if (v == v) v = dev::mul(v, 1 / 127.0f);
        if constexpr (sizeof(T) == 4)
          y.word[i] = dev::float_bits(v);
        else
          y.word[i / 2] |= uint32_t{rounded<T>(v).bits} << i % 2 * 16;
      }
      if (vectors)
        dev::store_once(out + r * bytes + at * static_cast<int64_t>(sizeof(T)), y);
      else
        store_bytes(out + r * bytes, at * static_cast<int64_t>(sizeof(T)), bytes, y);
    }
  }
}

// Blocks of a grid that loops over `units` units of work.
uint32_t blocks_for(int64_t work, int64_t per_sm = int64_t{1} << 20) {
  return static_cast<uint32_t>(std::min<int64_t>({work, per_sm * dev::device().sms, INT32_MAX}));
}

}  // namespace

void quantize_rows(const char* op, const QuantizeInt8& d, Stream stream) {
  const bool limited = d.threshold > 0;
  const int64_t words = limited ? outlier_words(d.columns) : 0;
  const bool together = words > 0 && d.rows > 0 && d.rows * d.columns * size_of(d.x.dtype) <= kTogetherBytes;
  if (words > 0 && !together) dev::zero_async(op, d.outliers.data(), words * 8, stream);
  if (d.rows == 0) return;
  auto* codes = reinterpret_cast<uint8_t*>(d.codes.data());
  auto* bits = limited ? reinterpret_cast<uint32_t*>(d.outliers.data()) : nullptr;
  dev::Launch l = {.op = op, .dtype = d.x.dtype, .shape = {d.rows, d.columns}, .stream = stream};
  visit(d.x.dtype, [&](auto t) {
    using T = decltype(t);
    l.grid = {together ? static_cast<uint32_t>(d.rows) : blocks_for(d.rows, 64)};
    l.threads = threads_for(ceil_div(d.columns, kPerUnit<T>));
    l.shared = 2 * dev::kWarp * 4 + (together ? static_cast<uint32_t>(words) * 8 : 0);
    dev::launch(l, together ? quantize_rows_kernel<T, true> : quantize_rows_kernel<T, false>, static_cast<const uint8_t*>(d.x.data), d.rows,
                d.columns, vectors_of<T>(d.x.data, d.columns, codes), limit_of(d.threshold), codes, d.scale.data(), bits);
  });
  if (words == 0 || together) return;
  l.grid = {blocks_for(ceil_div(d.rows, 8), 4)};
  l.threads = 256;
  l.shared = sizeof(Cleared);
  dev::launch(l, clear_columns, codes, d.rows, d.columns, Outliers{.words = d.outliers.data(), .word_count = words});
}

}  // namespace gemm

void quantize_int8(const QuantizeInt8& d, Stream stream) {
  check_arguments(d);
  gemm::quantize_rows("quantize_int8", d, stream);
}

void dequantize_int8(const DequantizeInt8& d, Stream stream) {
  using namespace gemm;
  check_arguments(d);
  if (d.rows == 0 || d.columns == 0) return;
  visit(d.out.dtype, [&](auto t) {
    using T = decltype(t);
    dev::launch({.op = "dequantize_int8",
                 .dtype = d.out.dtype,
                 .shape = {d.rows, d.columns},
                 .grid = {blocks_for(d.rows)},
                 .threads = threads_for(ceil_div(d.columns, kPerUnit<T>)),
                 .stream = stream},
                dequantize_rows<T>, reinterpret_cast<const uint8_t*>(d.codes.data()), d.scale.data(), d.rows, d.columns,
                vectors_of<T>(d.out.data, d.columns, d.codes.data()), static_cast<uint8_t*>(d.out.data));
  });
}

}  // namespace bnb::cuda
