// Quantized tensors that own their memory (bnb/state.h): each function is one call of an operation on spans, and memory for it.
#include <bnb/bnb.h>

#include <algorithm>
#include <array>
#include <bit>

#include "common/check.h"

namespace bnb {
namespace {

// The sum of fp32 numbers in the order in which torch adds them on one thread of an x86 CPU (its cascade sum): 4 x 8 lanes, each with up to
// four levels of partial sums; then the lanes, after what is left over. The error grows with the root of n at most.
constexpr size_t kLanes = 8, kRows = 4, kLevels = 4;
using Lanes = std::array<float, kLanes>;
using Rows = std::array<Lanes, kRows>;

void add(Lanes& to, const float* from) {
  for (size_t i = 0; i < kLanes; ++i) to[i] += from[i];
}

Rows cascade(const float* x, size_t steps) {
  const size_t bits = steps <= 2 ? 1 : static_cast<size_t>(std::bit_width(steps - 1));  // ceil(log2(steps))
  const size_t power = std::max<size_t>(4, bits / kLevels), step = size_t{1} << power;
  std::array<Rows, kLevels> levels = {};
  const auto take = [&](size_t i) {
    for (size_t r = 0; r < kRows; ++r) add(levels[0][r], x + (i * kRows + r) * kLanes);
  };
  size_t i = 0;
  while (i + step <= steps) {
    for (size_t j = 0; j < step; ++j) take(i++);
    for (size_t level = 1; level < kLevels; ++level) {
      for (size_t r = 0; r < kRows; ++r) add(levels[level][r], levels[level - 1][r].data());
      levels[level - 1] = {};
      if ((i & (step - 1) << level * power) != 0) break;
    }
  }
  while (i < steps) take(i++);
  for (size_t level = 1; level < kLevels; ++level)
    for (size_t r = 0; r < kRows; ++r) add(levels[0][r], levels[level][r].data());
  return levels[0];
}

float sum_of(std::span<const float> x) {
  const size_t vectors = x.size() / kLanes, steps = vectors / kRows;
  float sum = 0;
  if (vectors == 0) {  // four numbers at a time
    std::array<float, kRows> partial = {};
    size_t i = 0;
    for (; i + kRows <= x.size(); i += kRows)
      for (size_t r = 0; r < kRows; ++r) partial[r] += x[i + r];
    for (; i < x.size(); ++i) partial[0] += x[i];
    return ((partial[0] + partial[1]) + partial[2]) + partial[3];
  }
  Rows rows = cascade(x.data(), steps);
  for (size_t v = steps * kRows; v < vectors; ++v) add(rows[0], x.data() + v * kLanes);
  for (size_t r = 1; r < kRows; ++r) add(rows[0], rows[r].data());
  for (size_t i = vectors * kLanes; i < x.size(); ++i) sum += x[i];
  for (const float lane : rows[0]) sum += lane;
  return sum;
}

// The sizes of a value, before memory is taken for it.
Shape shape_of(const Checker& check, const Shape& given, int64_t n) {
  if (given.empty()) return {n};
  int64_t product = 1;
  for (const int64_t size : given) product = check.product("shape", product, size);
  check.equal("x", n, product, "the elements of the shape");
  return given;
}
template <class T = float> std::vector<T> allocated(int64_t n) {
  std::vector<T> v;
  if (static_cast<size_t>(n) > v.max_size()) throw std::bad_alloc();
  v.resize(static_cast<size_t>(n));
  return v;
}

Absmax view_of(const BlockScales& s) {
  if (!s.nested) return {.values = s.values};
  return {.codes = s.codes, .code = s.code, .nested = s.second, .nested_blocksize = s.second_blocksize, .offset = s.offset};
}
// What gemm_4bit multiplies with as they are.
bool is_native(const BlockScales& s) { return !s.nested || is_blocksize(s.second_blocksize); }

}  // namespace

BlockScales nest(std::span<const float> scales, int64_t blocksize) {
  const Checker check("nest");
  check.any_blocksize(blocksize);
  check.size("scales", scales, std::ssize(scales));
  BlockScales s{.nested = true, .second_blocksize = blocksize};
  check.within_memory([&] {
    s.offset = scales.empty() ? 0 : sum_of(scales) / static_cast<float>(scales.size());
    std::vector<float> centred(scales.begin(), scales.end());
    for (float& x : centred) x -= s.offset;
    s.codes.resize(scales.size());
    s.code = create_dynamic_map();
    s.second = allocated(blocks_of(std::ssize(scales), blocksize));
    quantize_blockwise({.blocksize = blocksize, .code = s.code, .x = centred, .codes = s.codes, .absmax = s.second});
  });
  return s;
}

std::vector<float> decode(const BlockScales& s) {
  std::vector<float> values;
  Checker("decode").within_memory([&] {
    if (!s.nested) {
      values = s.values;
      return;
    }
    values = allocated(s.size());
    dequantize_blockwise({.blocksize = s.second_blocksize, .code = s.code, .codes = s.codes, .absmax = s.second, .out = values});
    for (float& x : values) x += s.offset;
  });
  return values;
}

Quantized4bit quantize(ConstView x, const Options4bit& options) {
  const Checker check("quantize");
  check.view("x", x);
  check.type(options.type);
  check.blocksize(options.blocksize);
  Quantized4bit q{.type = options.type, .blocksize = options.blocksize, .dtype = x.dtype, .shape = shape_of(check, options.shape, x.size)};
  check.within_memory([&] {
    q.codes = allocated<uint8_t>(packed_size(x.size));
    q.scales.values = allocated(blocks_of(x.size, q.blocksize));
    quantize_4bit({.type = q.type, .blocksize = q.blocksize, .x = x, .codes = q.codes, .absmax = q.scales.values});
    if (options.nested) q.scales = nest(q.scales.values);
  });
  return q;
}

Quantized8bit quantize(ConstView x, const Options8bit& options) {
  const Checker check("quantize");
  check.view("x", x);
  check.any_blocksize(options.blocksize);
  Quantized8bit q{.blocksize = options.blocksize, .dtype = x.dtype};
  if (!options.shape.empty()) q.shape = shape_of(check, options.shape, x.size);
  check.within_memory([&] {
    q.code = options.code.empty() ? create_dynamic_map() : options.code;
    q.codes = allocated<uint8_t>(x.size);
    q.scales.values = allocated(blocks_of(x.size, q.blocksize));
    quantize_blockwise({.blocksize = q.blocksize, .code = q.code, .x = x, .codes = q.codes, .absmax = q.scales.values});
    if (options.nested) q.scales = nest(q.scales.values, q.blocksize);
  });
  return q;
}

QuantizedInt8 quantize(ConstView x, const OptionsInt8& options) {
  const Checker check("quantize");
  check.view("x", x);
  QuantizedInt8 q{.dtype = x.dtype, .shape = options.shape.empty() ? Shape{1, x.size} : options.shape};
  check.that(q.shape.size() == 2, "shape", "one of " + std::to_string(q.shape.size()) + " sizes", "[rows, columns]");
  shape_of(check, q.shape, x.size);
  check.within_memory([&] {
    q.codes = allocated<int8_t>(x.size);
    q.scale = allocated(q.shape[0]);
    quantize_int8({.rows = q.shape[0], .columns = q.shape[1], .x = x, .codes = q.codes, .scale = q.scale});
  });
  return q;
}

void dequantize_into(const Quantized4bit& q, View out) {
  Checker("dequantize").equal("out", out.size, elements_of(q), "elements of the tensor");
  dequantize_4bit({.type = q.type, .blocksize = q.blocksize, .codes = q.codes, .absmax = decode(q.scales), .out = out});
}
void dequantize_into(const Quantized8bit& q, View out) {
  Checker("dequantize").equal("out", out.size, elements_of(q), "elements of the tensor");
  dequantize_blockwise({.blocksize = q.blocksize, .code = q.code, .codes = q.codes, .absmax = decode(q.scales), .out = out});
}
void dequantize_into(const QuantizedInt8& q, View out) {
  Checker("dequantize").equal("out", out.size, elements_of(q), "elements of the tensor");
  dequantize_int8({.rows = q.shape[0], .columns = q.shape[1], .codes = q.codes, .scale = q.scale, .out = out});
}

int64_t product_size(ConstView a, const Shape& w) {
  const Checker check("gemm");
  check.view("a", a);
  check.that(w.size() == 2, "shape of the weight", "one of " + std::to_string(w.size()) + " sizes", "[n, k]");
  const int64_t k = w[1], m = k > 0 ? a.size / k : 0;
  check.that(m * k == a.size, "a", std::to_string(a.size) + " elements", "rows of k = " + std::to_string(k));
  return check.product("m * n", m, w[0]);
}

namespace {

// m of a product, also where a row of `a` has no elements.
int64_t rows_of(ConstView a, const Shape& w, ConstView out) {
  const int64_t size = product_size(a, w);
  if (w[1] == 0) return w[0] > 0 ? out.size / w[0] : 0;
  Checker("gemm").equal("out", out.size, size, "m * n");
  return a.size / w[1];
}

}  // namespace

void gemm_into(ConstView a, const Quantized4bit& w, View out, ConstView bias) {
  elements_of(w);
  const int64_t m = rows_of(a, w.shape, out);
  const bool native = is_native(w.scales);
  const std::vector<float> decoded = native ? std::vector<float>() : decode(w.scales);
  const int64_t n = w.shape[0], k = w.shape[1];
  gemm_4bit({.type = w.type,
             .blocksize = w.blocksize,
             .m = m,
             .n = n,
             .k = k,
             .a = a,
             .codes = w.codes,
             .absmax = native ? view_of(w.scales) : Absmax{.values = decoded},
             .bias = bias,
             .out = out});
}

void gemm_into(ConstView a, const QuantizedInt8& w, View out, const Int8Product& options) {
  elements_of(w);
  const int64_t m = rows_of(a, w.shape, out);
  const int64_t n = w.shape[0], k = w.shape[1];
  linear_int8({.m = m,
               .n = n,
               .k = k,
               .x = a,
               .threshold = options.threshold,
               .weight = w.codes,
               .weight_scale = w.scale,
               .bias = options.bias,
               .out = out});
}

}  // namespace bnb
