// The C functions that releases 0.49 and 0.50 of the package export, by their names and with their arguments, for programs that call them
// through ctypes (bitsandbytes.functional.lib) or link them. Nothing here computes: each is a call of the core.
//
// BNB_CPU_SYMBOLS and BNB_CUDA_SYMBOLS are the table: X(family, name, types). A family, in cpu.cpp or cuda.cpp, has the arguments and the
// call that its functions share. Everything else follows from the table: the functions, what ctypes is told of their arguments
// (bnb_signature), what the tests go through.
//
// A function that the releases declare as void gives 0, or 1 after an error, whose text bnb_last_error() has; one that gives a pointer
// then gives null. No exception leaves, nothing is printed, the process goes on.
#pragma once

#include <bnb/quantize.h>
#include <bnb/types.h>

#include <cstddef>
#include <cstdint>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#define BNB_CPU_SYMBOLS(X)                                              \
  X(QUANTIZE, cquantize_blockwise_cpu_fp32, float)                      \
  X(QUANTIZE, cquantize_blockwise_cpu_fp16, Half)                       \
  X(QUANTIZE, cquantize_blockwise_cpu_bf16, BFloat16)                   \
  X(DEQUANTIZE, cdequantize_blockwise_cpu_fp32, float)                  \
  X(DEQUANTIZE, cdequantize_blockwise_cpu_fp16, Half)                   \
  X(DEQUANTIZE, cdequantize_blockwise_cpu_bf16, BFloat16)               \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_cpu_fp4_fp32, float, fp4)    \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_cpu_fp4_fp16, Half, fp4)     \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_cpu_fp4_bf16, BFloat16, fp4) \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_cpu_nf4_fp32, float, nf4)    \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_cpu_nf4_fp16, Half, nf4)     \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_cpu_nf4_bf16, BFloat16, nf4) \
  X(GEMV_4BIT, gemv_4bit_inference_cpu_fp4_bf16, fp4)                   \
  X(GEMV_4BIT, gemv_4bit_inference_cpu_nf4_bf16, nf4)                   \
  X(HAS, has_avx512f_cpu, has_avx512)                                   \
  X(HAS, has_avx512bf16_cpu, has_avx512bf16)

// Release 0.50 no longer has the last 15, from cquantize on; cgemm_4bit_* are new there.
#define BNB_CUDA_SYMBOLS(X)                                            \
  X(QUANTIZE, cquantize_blockwise_fp32, float)                         \
  X(QUANTIZE, cquantize_blockwise_fp16, Half)                          \
  X(QUANTIZE, cquantize_blockwise_bf16, BFloat16)                      \
  X(QUANTIZE_4BIT, cquantize_blockwise_fp32_fp4, float, fp4)           \
  X(QUANTIZE_4BIT, cquantize_blockwise_fp16_fp4, Half, fp4)            \
  X(QUANTIZE_4BIT, cquantize_blockwise_bf16_fp4, BFloat16, fp4)        \
  X(QUANTIZE_4BIT, cquantize_blockwise_fp32_nf4, float, nf4)           \
  X(QUANTIZE_4BIT, cquantize_blockwise_fp16_nf4, Half, nf4)            \
  X(QUANTIZE_4BIT, cquantize_blockwise_bf16_nf4, BFloat16, nf4)        \
  X(DEQUANTIZE, cdequantize_blockwise_fp32, float)                     \
  X(DEQUANTIZE, cdequantize_blockwise_fp16, Half)                      \
  X(DEQUANTIZE, cdequantize_blockwise_bf16, BFloat16)                  \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_fp32_fp4, float, fp4)       \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_fp16_fp4, Half, fp4)        \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_bf16_fp4, BFloat16, fp4)    \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_fp32_nf4, float, nf4)       \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_fp16_nf4, Half, nf4)        \
  X(DEQUANTIZE_4BIT, cdequantize_blockwise_bf16_nf4, BFloat16, nf4)    \
  X(GEMM_4BIT, cgemm_4bit_fp32, float)                                 \
  X(GEMM_4BIT, cgemm_4bit_fp16, Half)                                  \
  X(GEMM_4BIT, cgemm_4bit_bf16, BFloat16)                              \
  X(GEMV_4BIT, cgemm_4bit_inference_naive_fp32, float)                 \
  X(GEMV_4BIT, cgemm_4bit_inference_naive_fp16, Half)                  \
  X(GEMV_4BIT, cgemm_4bit_inference_naive_bf16, BFloat16)              \
  X(STEP_32BIT, cadam32bit_grad_fp32, float, adam)                     \
  X(STEP_32BIT, cadam32bit_grad_fp16, Half, adam)                      \
  X(STEP_32BIT, cadam32bit_grad_bf16, BFloat16, adam)                  \
  X(STEP_32BIT, cademamix32bit_grad_fp32, float, ademamix)             \
  X(STEP_32BIT, cademamix32bit_grad_fp16, Half, ademamix)              \
  X(STEP_32BIT, cademamix32bit_grad_bf16, BFloat16, ademamix)          \
  X(STEP_32BIT, clion32bit_grad_fp32, float, lion)                     \
  X(STEP_32BIT, clion32bit_grad_fp16, Half, lion)                      \
  X(STEP_32BIT, clion32bit_grad_bf16, BFloat16, lion)                  \
  X(STEP_32BIT, cmomentum32bit_grad_32, float, momentum)               \
  X(STEP_32BIT, cmomentum32bit_grad_16, Half, momentum)                \
  X(STEP_32BIT, crmsprop32bit_grad_32, float, rmsprop)                 \
  X(STEP_32BIT, crmsprop32bit_grad_16, Half, rmsprop)                  \
  X(STEP_32BIT, cadagrad32bit_grad_32, float, adagrad)                 \
  X(STEP_32BIT, cadagrad32bit_grad_16, Half, adagrad)                  \
  X(STEP_8BIT, cadam_8bit_blockwise_grad_fp32, float, adam)            \
  X(STEP_8BIT, cadam_8bit_blockwise_grad_fp16, Half, adam)             \
  X(STEP_8BIT, cadam_8bit_blockwise_grad_bf16, BFloat16, adam)         \
  X(STEP_8BIT, cademamix_8bit_blockwise_grad_fp32, float, ademamix)    \
  X(STEP_8BIT, cademamix_8bit_blockwise_grad_fp16, Half, ademamix)     \
  X(STEP_8BIT, cademamix_8bit_blockwise_grad_bf16, BFloat16, ademamix) \
  X(STEP_8BIT, clion_8bit_blockwise_grad_fp32, float, lion)            \
  X(STEP_8BIT, clion_8bit_blockwise_grad_fp16, Half, lion)             \
  X(STEP_8BIT, clion_8bit_blockwise_grad_bf16, BFloat16, lion)         \
  X(STEP_8BIT, cmomentum_8bit_blockwise_grad_fp32, float, momentum)    \
  X(STEP_8BIT, cmomentum_8bit_blockwise_grad_fp16, Half, momentum)     \
  X(STEP_8BIT, cmomentum_8bit_blockwise_grad_bf16, BFloat16, momentum) \
  X(STEP_8BIT, crmsprop_8bit_blockwise_grad_fp32, float, rmsprop)      \
  X(STEP_8BIT, crmsprop_8bit_blockwise_grad_fp16, Half, rmsprop)       \
  X(STEP_8BIT, crmsprop_8bit_blockwise_grad_bf16, BFloat16, rmsprop)   \
  X(STEP_8BIT, cadagrad_8bit_blockwise_grad_fp32, float, adagrad)      \
  X(STEP_8BIT, cadagrad_8bit_blockwise_grad_fp16, Half, adagrad)       \
  X(STEP_8BIT, cadagrad_8bit_blockwise_grad_bf16, BFloat16, adagrad)   \
  X(DEQUANTIZE_SUMS, cdequant_mm_int32_fp16, Half)                     \
  X(QUANTIZE_INT8, cint8_vector_quant, Half)                           \
  X(GEMM_INT8, cigemmlt_32, sums)                                      \
  X(GEMM_INT8, cigemmlt_8, int8)                                       \
  X(GEMM_INT8, cigemmlt_8_rowscale, int8_scaled)                       \
  X(IGEMM, cigemm, )                                                   \
  X(BATCHED_IGEMM, cbatched_igemm, )                                   \
  X(CONTEXT, get_context, )                                            \
  X(ALLOCATE, cget_managed_ptr, )                                      \
  X(PREFETCH, cprefetch, )                                             \
  X(FILL, cfill_fp32, float)                                           \
  X(FILL, cfill_uint8, uint8_t)                                        \
  X(ARANGE, carange_fp32, float)                                       \
  X(MULTIPLY, c_mul_fp32, float)                                       \
  X(QUANTIZE_UNSCALED, cquantize, )                                    \
  X(DEQUANTIZE_UNSCALED, cdequantize, )                                \
  X(STEP_STATIC, cadam_static_8bit_grad_32, float, adam)               \
  X(STEP_STATIC, cadam_static_8bit_grad_16, Half, adam)                \
  X(STEP_STATIC, clion_static_8bit_grad_32, float, lion)               \
  X(STEP_STATIC, clion_static_8bit_grad_16, Half, lion)                \
  X(STEP_STATIC, cmomentum_static_8bit_grad_32, float, momentum)       \
  X(STEP_STATIC, cmomentum_static_8bit_grad_16, Half, momentum)        \
  X(STEP_STATIC, crmsprop_static_8bit_grad_32, float, rmsprop)         \
  X(STEP_STATIC, crmsprop_static_8bit_grad_16, Half, rmsprop)          \
  X(SQUARES, cpercentile_clipping_g32, float)                          \
  X(SQUARES, cpercentile_clipping_g16, Half)                           \
  X(SPARSE, cspmm_coo, )                                               \
  X(VERY_SPARSE, cspmm_coo_very_sparse_naive_fp16, Half)               \
  X(VERY_SPARSE, cspmm_coo_very_sparse_naive_int8, int8_t)             \
  X(CONTEXT, get_cusparse, )

#define BNB_EXPORT __attribute__((visibility("default")))

// One function of the table. `parameters` is its list of arguments, the rest the call that it makes.
#define BNB_SYMBOL(name, parameters, ...)                                                      \
  extern "C" BNB_EXPORT auto name parameters->::bnb::c_symbols::Given<decltype(__VA_ARGS__)> { \
    return ::bnb::c_symbols::guarded([&] { return __VA_ARGS__; });                             \
  }
#define BNB_DEFINE(family, name, ...) family(name, __VA_ARGS__)
#define BNB_ENTRY(family, name, ...) {#name, &signature<name>},

// After the families: the functions of a table, and the two that tell of them.
#define BNB_EXPORT_TABLE(table)                                                                              \
  namespace {                                                                                                \
  constexpr Entry kTable[] = {table(BNB_ENTRY)};                                                             \
  }                                                                                                          \
  extern "C" BNB_EXPORT const char* bnb_signature(const char* name) { return find_signature(kTable, name); } \
  extern "C" BNB_EXPORT const char* bnb_last_error() { return last_error().c_str(); }

namespace bnb::c_symbols {
namespace {

// Of the last call of this thread; empty if there was none.
inline std::string& last_error() {
  thread_local std::string text;
  return text;
}

template <class R> using Given = std::conditional_t<std::is_void_v<R>, int, R>;

template <class F> auto guarded(F&& f) noexcept -> Given<decltype(f())> {
  using R = decltype(f());
  try {
    last_error().clear();
    if constexpr (std::is_void_v<R>)
      f();
    else
      return f();
    return Given<R>{};
  } catch (const std::exception& e) {
    try {
      last_error() = e.what();
    } catch (...) { last_error() = "out of memory"; }
  } catch (...) { last_error() = "unknown error"; }
  if constexpr (std::is_void_v<R> || std::is_same_v<R, int>)
    return 1;
  else
    return Given<R>{};
}

// A letter for each type, that of the result first, as Python's struct module has them.
template <class T> constexpr char letter() {
  if constexpr (std::is_pointer_v<T>) return 'P';
  if constexpr (std::is_same_v<T, float>) return 'f';
  if constexpr (std::is_same_v<T, bool>) return '?';
  if constexpr (std::is_same_v<T, uint8_t>) return 'B';
  if constexpr (std::is_same_v<T, int32_t>) return 'i';
  if constexpr (std::is_same_v<T, uint32_t>) return 'I';
  if constexpr (std::is_same_v<T, int64_t>) return 'q';
  if constexpr (std::is_same_v<T, size_t>) return 'Q';
}
template <class R, class... A> struct Letters {
  char text[sizeof...(A) + 2];
  constexpr explicit Letters(R (*)(A...)) : text{letter<R>(), letter<A>()..., '\0'} {}
};
template <auto function> const char* signature() {
  static constexpr Letters letters(function);
  return letters.text;
}

struct Entry {
  std::string_view name;
  const char* (*signature)();
};
inline const char* find_signature(std::span<const Entry> table, std::string_view name) {
  for (const Entry& e : table)
    if (e.name == name) return e.signature();
  return nullptr;
}

// ---- arguments as the core takes them; the core checks them

// Places for n elements; none for sizes below 0, which the core then finds in the view of n elements.
template <class T> std::span<T> places(T* data, int64_t n) { return {data, n > 0 ? static_cast<size_t>(n) : 0}; }
template <class T> ConstView read(const void* data, int64_t n) { return {data, dtype_of<T>, n}; }
template <class T> View write(void* data, int64_t n) { return {data, dtype_of<T>, n}; }
inline int64_t blocks(int64_t n, int64_t blocksize) { return n > 0 && blocksize > 0 ? blocks_of(n, blocksize) : 0; }
inline int64_t packed(int64_t n) { return n > 0 ? packed_size(n) : 0; }

}  // namespace
}  // namespace bnb::c_symbols
