// Kernels that only the C functions of the released package need (python/c_symbols); legacy.h says what each computes.
#include "cuda/legacy/legacy.h"

#include <algorithm>
#include <bit>

#include "common/check.h"
#include "common/convert.h"
#include "common/formats.h"
#include "cuda/blockwise/encode8.cuh"

namespace bnb::cuda::legacy {
namespace {

using dev::Bits;

constexpr unsigned kThreads = 256, kWarps = kThreads / dev::kWarp;

dev::Launch launch_for(const char* op, int64_t n, Stream stream, uint32_t shared = 0) {
  const int64_t most = int64_t{8} * dev::device().sms;
  return {.op = op,
          .shape = {n},
          .grid = {static_cast<uint32_t>(std::min(ceil_div(n, kThreads), most))},
          .threads = kThreads,
          .shared = shared,
          .stream = stream};
}
BNB_DEVICE int64_t first_index() { return int64_t{dev::block().x} * dev::threads() + dev::thread(); }
BNB_DEVICE int64_t index_step() { return int64_t{dev::grid().x} * dev::threads(); }

// ---- element by element: f(i) for each i

template <class F> BNB_KERNEL(kThreads, 8) each(int64_t n, F f) {
  for (int64_t i = first_index(); i < n; i += index_step()) f(i);
}
template <class F> void for_each(const char* op, int64_t n, Stream stream, const F& f) {
  if (n > 0) dev::launch(launch_for(op, n, stream), each<F>, n, f);
}

template <class T> struct Fill {
  T* to;
  T value;
  BNB_DEVICE void operator()(int64_t i) const { to[i] = value; }
};
struct FillFrom {
  float* to;
  const float* value;
  BNB_DEVICE void operator()(int64_t i) const { to[i] = *value; }
};
struct Count {
  float* to;
  BNB_DEVICE void operator()(int64_t i) const { to[i] = static_cast<float>(i); }
};
struct Multiply {
  float* a;
  const float* b;
  BNB_DEVICE void operator()(int64_t i) const { a[i] = dev::mul(a[i], b[i]); }
};
struct ClearOutliers {
  const Half* x;
  Half* to;
  float threshold;
  BNB_DEVICE void operator()(int64_t i) const {
    const float magnitude = dev::bits_float(dev::float_bits(dev::to_float(x[i])) & 0x7fffffff);
    to[i] = magnitude >= threshold ? Half{0} : x[i];
  }
};
struct Gather {
  const int8_t* from;
  int8_t* to;
  int64_t columns, row_stride, column_stride;
  BNB_DEVICE void operator()(int64_t i) const { to[i] = from[i / columns * row_stride + i % columns * column_stride]; }
};
struct Scatter {
  const int32_t* from;
  int32_t* to;
  int64_t columns, pitch;
  BNB_DEVICE void operator()(int64_t i) const { to[i / columns * pitch + i % columns] = from[i]; }
};
struct Narrow {
  const int32_t* from;
  const float* scale;
  int8_t* to;
  int64_t columns, pitch;
  BNB_DEVICE void operator()(int64_t i) const {
    const float x = dev::mul(static_cast<float>(from[i]), scale ? scale[i % columns] : 1.0f);
    const float inside = x > 127.0f ? 127.0f : x < -128.0f ? -128.0f : x;
    to[i / columns * pitch + i % columns] = static_cast<int8_t>(dev::float_bits(dev::add(inside, 0x1.8p23f)));
  }
};
struct Widen {
  const Half* from;
  float* to;
  int64_t columns, pitch;
  BNB_DEVICE void operator()(int64_t i) const { to[i] = dev::to_float(from[i / columns * pitch + i % columns]); }
};
struct Round {
  const float* from;
  Half* to;
  int64_t columns, pitch;
  BNB_DEVICE void operator()(int64_t i) const { to[i / columns * pitch + i % columns] = dev::round_to<Half>(from[i]); }
};
struct AddProduct {
  Sparse s;
  BNB_DEVICE void operator()(int64_t i) const {
    const int64_t entry = i / s.n, j = i % s.n, row = s.row[entry], column = s.column[entry];
    if (row < 0 || row >= s.rows || column < 0 || column >= s.columns) return;
    const int64_t at = column * s.row_stride + j * s.column_stride;
    float b = 0;
    if (s.codes)
      b = s.scale ? dev::mul(dev::mul(static_cast<float>(s.codes[at]), s.scale[j]), 1.0f / 127) : static_cast<float>(s.codes[at]);
    else
      b = dev::to_float(s.b[at]);
    dev::atomic_add(s.sums + row * s.n + j, dev::mul(dev::to_float(s.value[entry]), b));
  }
};

// ---- reductions

BNB_KERNEL(kThreads, 8) largest(const float* x, int64_t n, uint32_t* to) {
  uint32_t most = 0;
  for (int64_t i = first_index(); i < n; i += index_step()) {
    const uint32_t magnitude = dev::float_bits(x[i]) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  for (unsigned by = dev::kWarp / 2; by; by /= 2) {
    const uint32_t other = dev::shuffle_xor(most, by);
    most = other > most ? other : most;
  }
  if (dev::lane() == 0) dev::atomic_max(to, most);
}

BNB_DEVICE double sum_of_warp(double sum) {
  for (unsigned by = dev::kWarp / 2; by; by /= 2) sum = sum + dev::shuffle_xor(sum, by);
  return sum;
}
// partial[warp of the grid]
template <class T> BNB_KERNEL(kThreads, 8) squares(const void* x, int64_t n, double* partial) {
  double sum = 0;
  for (int64_t i = first_index(); i < n; i += index_step()) {
    const double v = value_at<T>(x, i);
    sum = sum + v * v;
  }
  sum = sum_of_warp(sum);
  if (dev::lane() == 0) partial[int64_t{dev::block().x} * kWarps + dev::warp()] = sum;
}
BNB_KERNEL(dev::kWarp, 1) total(const double* partial, int64_t n, float* to) {
  double sum = 0;
  for (int64_t i = dev::lane(); i < n; i += dev::kWarp) sum = sum + partial[i];
  sum = sum_of_warp(sum);
  if (dev::lane() == 0) *to = static_cast<float>(sum);
}

// ---- codes

BNB_KERNEL(kThreads, 4) encode_with(const float* x, const float* absmax, const float* map, uint8_t* codes, int64_t n) {
  const Lane8 lane = prepare8(dev::shared<Tables8>(), map, false);
  const float largest = absmax ? *absmax : 1.0f, inverse = dev::reciprocal(largest < 1e-38f ? 1e-38f : largest);
  for (int64_t i = first_index(); i < n; i += index_step()) codes[i] = static_cast<uint8_t>(lane.search(dev::mul(x[i], inverse)));
}

// A lane takes 8 codes per iteration. `vectors`: rows are whole groups of 8, and codes are aligned for them.
template <class T> BNB_KERNEL(kThreads, 4) gemv(const Gemv d, int log2_blocksize, bool vectors) {
  constexpr int kPer = 8;
  constexpr int64_t kTurn = kPer * dev::kWarp;
  const int64_t column = int64_t{dev::block().x} * kWarps + dev::warp(), row = dev::block().y;
  if (column >= d.n) return;  // all lanes of the warp
  const float value = d.map[dev::lane() % 16];
  const int64_t begin = column * d.k, bytes = (d.n * d.k + 1) / 2;
  float sum = 0;
  for (int64_t base = 0; base < d.k; base += kTurn) {
    const int64_t k = base + dev::lane() * kPer, at = begin + k;
    uint32_t codes = 0;
    if (vectors) {
      if (k < d.k) codes = dev::load_once<Bits<4>>(d.codes + at / 2).word[0];
    } else {
      for (int i = 0; i < kPer; ++i)
        if (k + i < d.k && (at + i) / 2 < bytes) codes |= (d.codes[(at + i) / 2] >> ((at + i) % 2 ? 0 : 4) & 15u) << (i ^ 1) * 4;
    }
    float w[kPer], x[kPer] = {};
    BNB_UNROLL
    for (int i = 0; i < kPer; ++i) w[i] = dev::shuffle(value, codes >> (i ^ 1) * 4);
    BNB_UNROLL
    for (int i = 0; i < kPer; ++i)
      if (k + i < d.k) {
        x[i] = value_at<T>(d.x.data, row * d.k + k + i);
        w[i] = dev::to_float(dev::round_to<T>(dev::mul(w[i], d.absmax[(at + i) >> log2_blocksize])));
      }
    BNB_UNROLL
    for (int i = 0; i < kPer; ++i)
      if (k + i < d.k) sum = dev::fma(x[i], w[i], sum);
  }
  for (unsigned by = dev::kWarp / 2; by; by /= 2) sum = dev::add(sum, dev::shuffle_xor(sum, by));
  if (dev::lane() == 0) static_cast<T*>(d.y)[row * d.n + column] = dev::round_to<T>(sum);
}

}  // namespace

void fill(float* to, float value, int64_t n, Stream stream) { for_each("fill", n, stream, Fill<float>{to, value}); }
void fill(uint8_t* to, uint8_t value, int64_t n, Stream stream) { for_each("fill", n, stream, Fill<uint8_t>{to, value}); }
void fill(float* to, const float* value, int64_t n, Stream stream) { for_each("fill", n, stream, FillFrom{to, value}); }
void count(float* to, int64_t n, Stream stream) { for_each("arange", n, stream, Count{to}); }
void multiply(float* a, const float* b, int64_t n, Stream stream) { for_each("mul", n, stream, Multiply{a, b}); }
void clear_outliers(const Half* x, Half* to, float threshold, int64_t n, Stream stream) {
  for_each("clear_outliers", n, stream, ClearOutliers{x, to, threshold});
}
void gather(const int8_t* from, int64_t row_stride, int64_t column_stride, int8_t* to, int64_t rows, int64_t columns, Stream stream) {
  for_each("gather", rows * columns, stream, Gather{from, to, columns, row_stride, column_stride});
}
void scatter(const int32_t* from, int32_t* to, int64_t pitch, int64_t rows, int64_t columns, Stream stream) {
  for_each("scatter", rows * columns, stream, Scatter{from, to, columns, pitch});
}
void narrow(const int32_t* from, const float* scale, int8_t* to, int64_t pitch, int64_t rows, int64_t columns, Stream stream) {
  for_each("narrow", rows * columns, stream, Narrow{from, scale, to, columns, pitch});
}
void widen(const Half* from, int64_t pitch, float* to, int64_t rows, int64_t columns, Stream stream) {
  for_each("widen", rows * columns, stream, Widen{from, to, columns, pitch});
}
void round(const float* from, Half* to, int64_t pitch, int64_t rows, int64_t columns, Stream stream) {
  for_each("round", rows * columns, stream, Round{from, to, columns, pitch});
}
void add_product(const Sparse& s, Stream stream) { for_each("spmm", s.nnz * s.n, stream, AddProduct{s}); }

void largest_magnitude(const float* x, int64_t n, float* to, Stream stream) {
  dev::zero_async("largest_magnitude", to, sizeof(float), stream);
  if (n > 0) dev::launch(launch_for("largest_magnitude", n, stream), largest, x, n, reinterpret_cast<uint32_t*>(to));
}

void sum_of_squares(const ConstView& x, float* to, double* partial, Stream stream) {
  dev::Launch l = launch_for("sum_of_squares", std::max<int64_t>(x.size, 1), stream);
  l.dtype = x.dtype;
  l.grid.x = std::min(l.grid.x, static_cast<uint32_t>(kSquares / kWarps));
  visit(x.dtype, [&]<class T>(T) { dev::launch(l, squares<T>, x.data, x.size, partial); });
  const int64_t n = int64_t{l.grid.x} * kWarps;
  l.grid.x = 1;
  l.threads = dev::kWarp;
  dev::launch(l, total, partial, n, to);
}

void encode(const float* x, const float* absmax, const float* map, uint8_t* codes, int64_t n, Stream stream) {
  if (n > 0) dev::launch(launch_for("encode", n, stream, sizeof(Tables8)), encode_with, x, absmax, map, codes, n);
}

void gemv_4bit(const Gemv& d, Stream stream) {
  const Checker check("gemv_4bit");
  check.blocksize(d.blocksize);
  check.product("n * k", d.n, d.k);
  check.that(d.m <= 65535, "m", d.m, "at most 65535 rows");
  check.equal("x", d.x.size, check.product("m * k", d.m, d.k), "m * k elements");
  if (check.product("m * n", d.m, d.n) == 0) return;
  check.that(d.y && (d.k == 0 || (d.x.data && d.codes && d.absmax && d.map)), "x, codes, absmax, map or y", "null",
             "a pointer to its elements");
  const bool vectors = d.k % 8 == 0 && dev::aligned(d.codes, 4);
  const dev::Launch l = {.op = "gemv_4bit",
                         .dtype = d.x.dtype,
                         .shape = {d.m, d.n, d.k},
                         .grid = {static_cast<uint32_t>(ceil_div(d.n, kWarps)), static_cast<uint32_t>(d.m)},
                         .threads = kThreads,
                         .stream = stream};
  visit(d.x.dtype, [&]<class T>(T) { dev::launch(l, gemv<T>, d, std::countr_zero(static_cast<uint64_t>(d.blocksize)), vectors); });
}

}  // namespace bnb::cuda::legacy
