// The C functions of CUDA (table.h). Those with a stream use it, the others the default stream, of the current device; none waits. Memory
// that a call needs for itself is had from the stream's pool.
#include <bnb/cuda.h>

#include "common/check.h"
#include "cuda/legacy/legacy.h"
#include "table.h"

namespace bnb::c_symbols {
namespace {

using cuda::Stream;
using cuda::dev::StreamMemory;
namespace legacy = cuda::legacy;

constexpr Stream kDefault = nullptr;

template <class T> void quantize(const float* code, const void* a, float* absmax, uint8_t* out, int64_t blocksize, int64_t n) {
  cuda::quantize_blockwise({blocksize, places(code, 256), read<T>(a, n), places(out, n), places(absmax, blocks(n, blocksize))}, kDefault);
}
template <class T, QuantType type> void quantize_4bit(const void* a, float* absmax, uint8_t* out, int64_t blocksize, int64_t n) {
  cuda::quantize_4bit({type, blocksize, read<T>(a, n), places(out, packed(n)), places(absmax, blocks(n, blocksize))}, kDefault);
}
template <class T>
void dequantize(const float* code, const uint8_t* a, const float* absmax, void* out, int64_t blocksize, int64_t n, Stream stream) {
  cuda::dequantize_blockwise({blocksize, places(code, 256), places(a, n), places(absmax, blocks(n, blocksize)), write<T>(out, n)}, stream);
}
template <class T, QuantType type>
void dequantize_4bit(const uint8_t* a, const float* absmax, void* out, int64_t blocksize, int64_t n, Stream stream) {
  cuda::dequantize_4bit({type, blocksize, places(a, packed(n)), places(absmax, blocks(n, blocksize)), write<T>(out, n)}, stream);
}

// quant_type: 1 for fp4, 2 for nf4. absmax: of the blocks, or with absmax_8bit of its blocks of 256.
template <class T>
void gemm_4bit(const void* a, const uint8_t* b, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,
               const float* absmax_offset, void* out, const void* bias, int64_t m, int64_t n, int64_t k, int64_t blocksize, int quant_type,
               Stream stream) {
  const Checker check("cgemm_4bit");
  check.that(quant_type == 1 || quant_type == 2, "quant_type", quant_type, "1 for fp4 or 2 for nf4");
  check.that(!absmax_8bit || (absmax_code && absmax_offset), "absmax_code or absmax_offset", "null", "both of them with absmax_8bit");
  const int64_t weights = check.product("n * k", n, k), count = blocks(weights, blocksize);
  Gemm4bit d = {.type = quant_type == 1 ? QuantType::fp4 : QuantType::nf4, .blocksize = blocksize, .m = m, .n = n, .k = k};
  d.a = read<T>(a, check.product("m * k", m, k));
  d.codes = places(b, packed(weights));
  if (absmax_8bit)
    d.absmax = {.codes = places(absmax_8bit, count),
                .code = places(absmax_code, 256),
                .nested = places(absmax, blocks(count, 256)),
                .device_offset = absmax_offset};
  else
    d.absmax.values = places(absmax, count);
  if (bias) d.bias = read<T>(bias, n);
  d.out = write<T>(out, check.product("m * n", m, n));
  const StreamMemory workspace("gemm_4bit", cuda::gemm_4bit_workspace(d), stream);
  cuda::gemm_4bit(d, workspace.data(), stream);
}

// out [n, m] = a [n, k] times the transpose of b [m, k], n being 1 in the releases. The leading dimensions are not looked at there either.
template <class T>
void gemv_4bit(int64_t m, int64_t n, int64_t k, const void* a, const uint8_t* b, const float* absmax, const float* datatype, void* out,
               int64_t blocksize, Stream stream) {
  const int64_t size = Checker("cgemm_4bit_inference_naive").product("n * k", n, k);
  legacy::gemv_4bit(
      {.m = n, .n = m, .k = k, .blocksize = blocksize, .x = read<T>(a, size), .codes = b, .absmax = absmax, .map = datatype, .y = out},
      stream);
}

void step(const OptimizerStep& s) {
  const StreamMemory workspace("optimizer_step", cuda::optimizer_workspace(s), kDefault);
  cuda::optimizer_step(s, workspace.data(), nullptr, kDefault);
}

struct Numbers {
  float beta1, beta2, beta3, alpha, eps, weight_decay;
  int step;
  float lr, gnorm_scale;
  bool skip_zeros;
  OptimizerConfig config(Optimizer rule, double max_unorm = 0) const {
    return {.rule = rule,
            .lr = lr,
            .beta1 = beta1,
            .beta2 = beta2,
            .beta3 = beta3,
            .alpha = alpha,
            .eps = eps,
            .weight_decay = weight_decay,
            .max_unorm = max_unorm,
            .skip_zeros = skip_zeros};
  }
};

template <class T, Optimizer rule>
void step_32bit(const void* g, void* p, float* state1, float* state2, float* unorm, float max_unorm, float param_norm, const Numbers& x,
                int64_t n) {
  OptimizerTensor t = {.p = write<T>(p, n), .g = read<T>(g, n), .state1 = places(state1, first_states(rule) * n)};
  if (has_second_state(rule)) t.state2 = places(state2, n);
  t.step = x.step;
  t.gnorm_scale = x.gnorm_scale;
  t.u_norm = unorm;
  if (max_unorm > 0) t.p_norm = param_norm;
  step({.config = x.config(rule, max_unorm), .tensors = {&t, 1}});
}

template <class T, Optimizer rule>
void step_8bit(void* p, const void* g, uint8_t* state1, uint8_t* state2, const float* quantiles1, const float* quantiles2, float* absmax1,
               float* absmax2, const Numbers& x, int64_t n) {
  constexpr int64_t kFirst = first_states(rule);
  const int64_t count = blocks(n, kOptimizerBlock);
  if (n == 0) return;
  const Checker check("optimizer_step");
  check.that(state1 != nullptr, "state1", "null", "a pointer to its elements");  // a tensor without codes has states in fp32
  OptimizerTensor t = {
      .p = write<T>(p, n), .g = read<T>(g, n), .codes1 = places(state1, kFirst * n), .absmax1 = places(absmax1, kFirst * count)};
  if (has_second_state(rule)) t.codes2 = places(state2, n), t.absmax2 = places(absmax2, count);
  t.step = x.step;
  t.gnorm_scale = x.gnorm_scale;
  step({.config = x.config(rule), .tensors = {&t, 1}, .code1 = places(quantiles1, 256), .code2 = places(quantiles2, 256)});
}

// A state of 8 bits with one scale, which becomes that of the moved state: x = map[code] * *max.
class StaticState {
 public:
  StaticState(uint8_t* codes, const float* map, const float* max, float* new_max, int64_t n)
      : codes_(codes), map_(map), new_max_(new_max), n_(n), values_("optimizer_step", n * 4, kDefault) {
    Checker("optimizer_step").that(codes && map && max && new_max, "state, quantiles or max", "null", "a pointer to its elements");
    const int64_t count = blocks(n, kMaxBlocksize);
    const StreamMemory absmax("optimizer_step", count * 4, kDefault);
    legacy::fill(absmax.as<float>(), max, count, kDefault);
    dequantize<float>(map, codes, absmax.as<float>(), values(), kMaxBlocksize, n, kDefault);
  }
  float* values() const { return values_.as<float>(); }
  void store() const {
    legacy::largest_magnitude(values(), n_, new_max_, kDefault);
    legacy::encode(values(), new_max_, map_, codes_, n_, kDefault);
  }

 private:
  uint8_t* codes_;
  const float* map_;
  float* new_max_;
  int64_t n_;
  StreamMemory values_;
};

template <class T, Optimizer rule>
void step_static(void* p, const void* g, uint8_t* state1, uint8_t* state2, float* unorm, float max_unorm, float param_norm,
                 const float* quantiles1, const float* quantiles2, const float* max1, const float* max2, float* new_max1, float* new_max2,
                 const Numbers& x, int64_t n) {
  if (n <= 0) return;
  const StaticState first(state1, quantiles1, max1, new_max1, n);
  if constexpr (has_second_state(rule)) {
    const StaticState second(state2, quantiles2, max2, new_max2, n);
    step_32bit<T, rule>(g, p, first.values(), second.values(), unorm, max_unorm, param_norm, x, n);
    second.store();
  } else {
    step_32bit<T, rule>(g, p, first.values(), nullptr, unorm, max_unorm, param_norm, x, n);
  }
  first.store();
}

void dequantize_sums(const int32_t* a, const float* row_stats, const float* column_stats, Half* out, const Half* bias, int64_t rows,
                     int64_t columns, Stream stream) {
  const int64_t size = Checker("dequantize_sums").product("rows * columns", rows, columns);
  DequantizeSums d = {.m = rows, .n = columns, .sums = places(a, size)};
  d.to = {.row_scale = places(row_stats, rows), .column_scale = places(column_stats, columns), .out = write<Half>(out, size)};
  if (bias) d.to.bias = read<Half>(bias, columns);
  cuda::dequantize_sums(d, stream);
}

// Outliers have code 0 and do not count in the scale of their row; the other elements of their columns keep their codes.
void quantize_int8(const Half* a, int8_t* out, float* row_stats, float threshold, int64_t rows, int64_t columns, Stream stream) {
  const Checker check("quantize_int8");
  const int64_t size = check.product("rows * columns", rows, columns);
  check.that(threshold >= 0, "threshold", threshold, "a number of 0 or more");
  const bool masked = threshold > 0 && a;
  const StreamMemory inside("quantize_int8", masked ? size * 2 : 0, stream);
  if (masked) legacy::clear_outliers(a, inside.as<Half>(), threshold, size, stream);
  cuda::quantize_int8({.rows = rows,
                       .columns = columns,
                       .x = read<Half>(masked ? inside.as<Half>() : a, size),
                       .codes = places(out, size),
                       .scale = places(row_stats, rows)},
                      stream);
}

// Rows of k int8 values one after the other: as they are stored, or a copy.
class Rows {
 public:
  Rows(const int8_t* from, int64_t rows, int64_t k, int64_t row_stride, int64_t step, Stream stream)
      : data_(from), copy_("gemm_int8", from && !(step == 1 && row_stride == k) ? rows * k : 0, stream) {
    if (!copy_.data()) return;
    legacy::gather(from, row_stride, step, copy_.as<int8_t>(), rows, k, stream);
    data_ = copy_.as<int8_t>();
  }
  const int8_t* data() const { return data_; }

 private:
  const int8_t* data_;
  StreamMemory copy_;
};

// sums [n, m] = b [n, k] times the transpose of a [m, k], rows of n int32 one after the other.
void sum_int8(const Rows& a, const Rows& b, int32_t* sums, int64_t m, int64_t n, int64_t k, Stream stream) {
  cuda::gemm_int8({.m = n, .n = m, .k = k, .a = places(b.data(), n * k), .b = places(a.data(), m * k), .sums = places(sums, m * n)},
                  stream);
}

enum class Output { sums, int8, int8_scaled };

// c [n, m] = b [n, k] times the transpose of a [m, k]: int32, or int8 sums (times row_scale[m]), rounded and saturated.
template <Output output>
int gemm_int8(int64_t m, int64_t n, int64_t k, const int8_t* a, const int8_t* b, void* c, const float* row_scale, int64_t lda, int64_t ldb,
              int64_t ldc, Stream stream) {
  const Checker check("cigemmlt");
  const int64_t size = check.product("m * n", m, n);
  check.product("m * k", m, k), check.product("n * k", n, k);
  check.that(lda >= k && ldb >= k, "lda or ldb", lda < ldb ? lda : ldb, "k = " + std::to_string(k) + " or more");
  check.that(ldc >= m, "ldc", ldc, "m = " + std::to_string(m) + " or more");
  check.that(output != Output::int8_scaled || row_scale, "row_scale", "null", "a pointer to its elements");
  if (size == 0) return 0;
  check.that(c != nullptr, "C", "null", "a pointer to its elements");
  const bool direct = output == Output::sums && ldc == m;
  const Rows rows_a(a, m, k, lda, 1, stream), rows_b(b, n, k, ldb, 1, stream);
  const StreamMemory sums("gemm_int8", direct ? 0 : size * 4, stream);
  int32_t* to = direct ? static_cast<int32_t*>(c) : sums.as<int32_t>();
  sum_int8(rows_a, rows_b, to, m, n, k, stream);
  if (output != Output::sums)
    legacy::narrow(to, output == Output::int8_scaled ? row_scale : nullptr, static_cast<int8_t*>(c), ldc, n, m, stream);
  else if (!direct)
    legacy::scatter(to, static_cast<int32_t*>(c), ldc, n, m, stream);
  return 0;
}

// In columns, as BLAS has them: c [m, n] = op(a) [m, k] * op(b) [k, n].
void igemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const int8_t* a, const int8_t* b, int32_t* c, int64_t lda,
           int64_t ldb, int64_t ldc) {
  const Checker check("cigemm");
  const int64_t size = check.product("m * n", m, n);
  check.product("m * k", m, k), check.product("n * k", n, k);
  const int64_t least_a = transpose_a ? k : m, least_b = transpose_b ? n : k;
  check.that(lda >= least_a, "lda", lda, std::to_string(least_a) + " or more");
  check.that(ldb >= least_b, "ldb", ldb, std::to_string(least_b) + " or more");
  check.that(ldc >= m, "ldc", ldc, std::to_string(m) + " or more");
  if (size == 0) return;
  check.that(c != nullptr, "C", "null", "a pointer to its elements");
  const Rows rows_a(a, m, k, transpose_a ? lda : 1, transpose_a ? 1 : lda, kDefault);
  const Rows rows_b(b, n, k, transpose_b ? 1 : ldb, transpose_b ? ldb : 1, kDefault);
  const StreamMemory sums("gemm_int8", ldc == m ? 0 : size * 4, kDefault);
  int32_t* to = ldc == m ? c : sums.as<int32_t>();
  sum_int8(rows_a, rows_b, to, m, n, k, kDefault);
  if (to != c) legacy::scatter(to, c, ldc, n, m, kDefault);
}

void batched_igemm(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const int8_t* a, const int8_t* b, int32_t* c,
                   int64_t lda, int64_t ldb, int64_t ldc, int64_t stride_a, int64_t stride_b, int64_t stride_c, uint32_t count) {
  for (int64_t i = 0; i < count; ++i)
    igemm(transpose_a, transpose_b, m, n, k, a + i * stride_a, b + i * stride_b, c + i * stride_c, lda, ldb, ldc);
}

// What the releases keep handles of vendors' libraries in. Nothing here needs one, but null would say that there is none.
void* context() {
  static char nothing;
  return &nothing;
}

void prefetch(const void* from, size_t bytes, int device) {
  if (device < 0) return cuda::prefetch_managed(from, static_cast<int64_t>(bytes), true, kDefault);
  const cuda::dev::DeviceScope scope(device);
  cuda::prefetch_managed(from, static_cast<int64_t>(bytes), false, kDefault);
}

void quantize_unscaled(const float* code, const float* a, uint8_t* out, int64_t n) {
  Checker("cquantize").that(n <= 0 || (code && a && out), "code, A or out", "null", "a pointer to its elements");
  legacy::encode(a, nullptr, code, out, n, kDefault);
}
void dequantize_unscaled(const float* code, const uint8_t* a, float* out, int64_t n, Stream stream) {
  const int64_t count = blocks(n, kMaxBlocksize);
  const StreamMemory ones("cdequantize", count * 4, stream);
  legacy::fill(ones.as<float>(), 1.0f, count, stream);
  dequantize<float>(code, a, ones.as<float>(), out, kMaxBlocksize, n, stream);
}

// history[step % 100] = the sum of squares of g.
template <class T> void squares(const void* g, float* history, int step, int64_t n) {
  const Checker check("cpercentile_clipping");
  check.that(step >= 0, "step", step, "0 or more");
  check.that(history != nullptr, "gnorm_vec", "null", "a pointer to its 100 elements");
  check.view("g", read<T>(g, n));
  const StreamMemory partial("cpercentile_clipping", legacy::kSquares * 8, kDefault);
  legacy::sum_of_squares(read<T>(g, n), history + step % 100, partial.as<double>(), kDefault);
}

// c = a * b, or c += a * b, for a sparse a of int32 coordinates; sums in fp32. `pitch`: elements from row to row of c.
void multiply_sparse(legacy::Sparse s, Half* c, int64_t pitch, bool add) {
  const Checker check("cspmm_coo");
  const int64_t size = check.product("rows * columns", s.rows, s.n);
  check.product("nnz * columns", s.nnz, s.n);
  if (size == 0) return;
  check.that(c && (s.nnz == 0 || (s.row && s.column && s.value && (s.b || s.codes))), "rowidx, colidx, values, B or out", "null",
             "a pointer to its elements");
  const StreamMemory sums("cspmm_coo", size * 4, kDefault);
  s.sums = sums.as<float>();
  if (add)
    legacy::widen(c, pitch, s.sums, s.rows, s.n, kDefault);
  else
    cuda::dev::zero_async("cspmm_coo", s.sums, size * 4, kDefault);
  legacy::add_product(s, kDefault);
  legacy::round(s.sums, c, pitch, s.rows, s.n, kDefault);
}
void spmm(const int32_t* row, const int32_t* column, const Half* value, int64_t nnz, int64_t rows, int64_t columns, int64_t n, int64_t ldb,
          const Half* b, int64_t ldc, Half* c, bool transposed_b) {
  multiply_sparse({.nnz = nnz,
                   .rows = rows,
                   .columns = columns,
                   .n = n,
                   .row = row,
                   .column = column,
                   .value = value,
                   .b = b,
                   .row_stride = transposed_b ? 1 : ldb,
                   .column_stride = transposed_b ? ldb : 1},
                  c, ldc, false);
}
template <class T>
void spmm_very_sparse(const int32_t* row, const int32_t* column, const Half* value, const T* b, Half* out, const float* scale, int64_t nnz,
                      int64_t rows, int64_t columns, int64_t n) {
  legacy::Sparse s = {.nnz = nnz, .rows = rows, .columns = columns, .n = n, .row = row, .column = column, .value = value, .row_stride = n};
  if constexpr (std::is_same_v<T, Half>)
    s.b = b;
  else
    s.codes = b, s.scale = scale;
  multiply_sparse(s, out, n, true);
}

void need(bool there, const char* what) { Checker(what).that(there, "A or B", "null", "a pointer to its elements"); }

}  // namespace
}  // namespace bnb::c_symbols

using namespace bnb;
using namespace bnb::c_symbols;

#define QUANTIZE(name, T)                                                                                         \
  BNB_SYMBOL(name, (const float* code, const void* a, float* absmax, uint8_t* out, int32_t blocksize, int32_t n), \
             c_symbols::quantize<T>(code, a, absmax, out, blocksize, n))
#define QUANTIZE_4BIT(name, T, type)                                                                              \
  BNB_SYMBOL(name, (const float* code, const void* a, float* absmax, uint8_t* out, int32_t blocksize, int32_t n), \
             c_symbols::quantize_4bit<T, QuantType::type>(a, absmax, out, blocksize, n))
#define DEQUANTIZE(name, T)                                                                                                           \
  BNB_SYMBOL(name, (const float* code, const uint8_t* a, const float* absmax, void* out, int32_t blocksize, int32_t n, void* stream), \
             c_symbols::dequantize<T>(code, a, absmax, out, blocksize, n, stream))
#define DEQUANTIZE_4BIT(name, T, type)                                                                                                \
  BNB_SYMBOL(name, (const float* code, const uint8_t* a, const float* absmax, void* out, int32_t blocksize, int32_t n, void* stream), \
             c_symbols::dequantize_4bit<T, QuantType::type>(a, absmax, out, blocksize, n, stream))
#define GEMM_4BIT(name, T)                                                                                                              \
  BNB_SYMBOL(                                                                                                                           \
      name,                                                                                                                             \
      (const void* a, const uint8_t* b, const float* absmax, const uint8_t* absmax_8bit, const float* absmax_code,                      \
       const float* absmax_offset, void* out, const void* bias, int32_t m, int32_t n, int32_t k, int32_t blocksize, int32_t quant_type, \
       void* stream),                                                                                                                   \
      c_symbols::gemm_4bit<T>(a, b, absmax, absmax_8bit, absmax_code, absmax_offset, out, bias, m, n, k, blocksize, quant_type, stream))
#define GEMV_4BIT(name, T)                                                                                                             \
  BNB_SYMBOL(name,                                                                                                                     \
             (int32_t m, int32_t n, int32_t k, const void* a, const uint8_t* b, const float* absmax, const float* datatype, void* out, \
              int32_t lda, int32_t ldb, int32_t ldc, int32_t blocksize, void* stream),                                                 \
             c_symbols::gemv_4bit<T>(m, n, k, a, b, absmax, datatype, out, blocksize, stream))
#define STEP_32BIT(name, T, rule)                                                                                                       \
  BNB_SYMBOL(                                                                                                                           \
      name,                                                                                                                             \
      (const void* g, void* p, float* state1, float* state2, float* unorm, float max_unorm, float param_norm, float beta1, float beta2, \
       float beta3, float alpha, float eps, float weight_decay, int32_t step, float lr, float gnorm_scale, bool skip_zeros, int32_t n), \
      c_symbols::step_32bit<T, Optimizer::rule>(g, p, state1, state2, unorm, max_unorm, param_norm,                                     \
                                                {beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros}, n))
#define STEP_8BIT(name, T, rule)                                                                                                     \
  BNB_SYMBOL(                                                                                                                        \
      name,                                                                                                                          \
      (void* p, const void* g, uint8_t* state1, uint8_t* state2, float beta1, float beta2, float beta3, float alpha, float eps,      \
       int32_t step, float lr, const float* quantiles1, const float* quantiles2, float* absmax1, float* absmax2, float weight_decay, \
       float gnorm_scale, bool skip_zeros, int32_t n),                                                                               \
      c_symbols::step_8bit<T, Optimizer::rule>(p, g, state1, state2, quantiles1, quantiles2, absmax1, absmax2,                       \
                                               {beta1, beta2, beta3, alpha, eps, weight_decay, step, lr, gnorm_scale, skip_zeros}, n))
#define STEP_STATIC(name, T, rule)                                                                                                        \
  BNB_SYMBOL(name,                                                                                                                        \
             (void* p, const void* g, uint8_t* state1, uint8_t* state2, float* unorm, float max_unorm, float param_norm, float beta1,     \
              float beta2, float eps, int32_t step, float lr, const float* quantiles1, const float* quantiles2, const float* max1,        \
              const float* max2, float* new_max1, float* new_max2, float weight_decay, float gnorm_scale, int32_t n),                     \
             c_symbols::step_static<T, Optimizer::rule>(p, g, state1, state2, unorm, max_unorm, param_norm, quantiles1, quantiles2, max1, \
                                                        max2, new_max1, new_max2,                                                         \
                                                        {beta1, beta2, 0, 0, eps, weight_decay, step, lr, gnorm_scale, false}, n))
#define DEQUANTIZE_SUMS(name, T)                                                                                                         \
  BNB_SYMBOL(name,                                                                                                                       \
             (const int32_t* a, const float* row_stats, const float* column_stats, T* out, const T* bias, int32_t rows, int32_t columns, \
              void* stream),                                                                                                             \
             c_symbols::dequantize_sums(a, row_stats, column_stats, out, bias, rows, columns, stream))
#define QUANTIZE_INT8(name, T)                                                                                                \
  BNB_SYMBOL(name, (const T* a, int8_t* out, float* row_stats, float threshold, int32_t rows, int32_t columns, void* stream), \
             c_symbols::quantize_int8(a, out, row_stats, threshold, rows, columns, stream))
#define GEMM_INT8(name, output)                                                                                                  \
  BNB_SYMBOL(name,                                                                                                               \
             (void* context, int32_t m, int32_t n, int32_t k, const int8_t* a, const int8_t* b, void* c, const float* row_scale, \
              int32_t lda, int32_t ldb, int32_t ldc, void* stream),                                                              \
             c_symbols::gemm_int8<Output::output>(m, n, k, a, b, c, row_scale, lda, ldb, ldc, stream))
#define IGEMM(name, ...)                                                                                                            \
  BNB_SYMBOL(name,                                                                                                                  \
             (void* context, bool transpose_a, bool transpose_b, int32_t m, int32_t n, int32_t k, const int8_t* a, const int8_t* b, \
              int32_t* c, int32_t lda, int32_t ldb, int32_t ldc),                                                                   \
             c_symbols::igemm(transpose_a, transpose_b, m, n, k, a, b, c, lda, ldb, ldc))
#define BATCHED_IGEMM(name, ...)                                                                                                        \
  BNB_SYMBOL(name,                                                                                                                      \
             (void* context, bool transpose_a, bool transpose_b, int32_t m, int32_t n, int32_t k, const int8_t* a, const int8_t* b,     \
              int32_t* c, int32_t lda, int32_t ldb, int32_t ldc, int64_t stride_a, int64_t stride_b, int64_t stride_c, uint32_t count), \
             c_symbols::batched_igemm(transpose_a, transpose_b, m, n, k, a, b, c, lda, ldb, ldc, stride_a, stride_b, stride_c, count))
#define CONTEXT(name, ...) BNB_SYMBOL(name, (), c_symbols::context())
#define ALLOCATE(name, ...) BNB_SYMBOL(name, (size_t bytes), cuda::allocate_managed(static_cast<int64_t>(bytes)))
#define PREFETCH(name, ...) BNB_SYMBOL(name, (void* data, size_t bytes, int32_t device), c_symbols::prefetch(data, bytes, device))
#define FILL(name, T) \
  BNB_SYMBOL(name, (T * a, const T* b, T value, int64_t n), need(a || n <= 0, "fill"), legacy::fill(a, value, n, kDefault))
#define ARANGE(name, T) \
  BNB_SYMBOL(name, (T * a, const T* b, T value, int64_t n), need(a || n <= 0, "arange"), legacy::count(a, n, kDefault))
#define MULTIPLY(name, T) \
  BNB_SYMBOL(name, (T * a, const T* b, T value, int64_t n), need((a && b) || n <= 0, "mul"), legacy::multiply(a, b, n, kDefault))
#define QUANTIZE_UNSCALED(name, ...) \
  BNB_SYMBOL(name, (const float* code, const float* a, uint8_t* out, int32_t n), c_symbols::quantize_unscaled(code, a, out, n))
#define DEQUANTIZE_UNSCALED(name, ...)                                                         \
  BNB_SYMBOL(name, (const float* code, const uint8_t* a, float* out, int32_t n, void* stream), \
             c_symbols::dequantize_unscaled(code, a, out, n, stream))
#define SQUARES(name, T) \
  BNB_SYMBOL(name, (const void* g, float* gnorm_vec, int32_t step, int32_t n), c_symbols::squares<T>(g, gnorm_vec, step, n))
#define SPARSE(name, ...)                                                                                                                  \
  BNB_SYMBOL(name,                                                                                                                         \
             (void* context, const int32_t* rowidx, const int32_t* colidx, const Half* values, int32_t nnz, int32_t rows, int32_t columns, \
              int32_t n, int32_t ldb, const Half* b, int32_t ldc, Half* c, bool transposed_b),                                             \
             c_symbols::spmm(rowidx, colidx, values, nnz, rows, columns, n, ldb, b, ldc, c, transposed_b))
#define VERY_SPARSE(name, T)                                                                                                               \
  BNB_SYMBOL(name,                                                                                                                         \
             (const int32_t* max_count, const int32_t* max_idx, const int32_t* offset_rowidx, const int32_t* rowidx,                       \
              const int32_t* colidx, const Half* values, const T* b, Half* out, const float* dequant_stats, int32_t nnz_rows, int32_t nnz, \
              int32_t rows, int32_t columns, int32_t n),                                                                                   \
             c_symbols::spmm_very_sparse<T>(rowidx, colidx, values, b, out, dequant_stats, nnz, rows, columns, n))

BNB_CUDA_SYMBOLS(BNB_DEFINE)
BNB_EXPORT_TABLE(BNB_CUDA_SYMBOLS)
