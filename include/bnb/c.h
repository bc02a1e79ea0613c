/* The C interface, for C99, Rust, Go and whatever else calls C: quantized weights as opaque handles. Link libbnb.so, or libbnb.a with the
 * C++ standard library.
 *
 *   bnb_weight* w;
 *   if (bnb_weight_read_4bit(codes, size, items, 5, &w) != BNB_OK) die(bnb_last_error());
 *   if (bnb_weight_gemm(w, x, BNB_F32, m, NULL, BNB_F32, 0, y) != BNB_OK) die(bnb_last_error());
 *   bnb_weight_free(w);
 *
 * A function that can fail returns a status and, if it failed, has written to no output; bnb_last_error() then says why. No exception and
 * no signal leaves a call. Handles may be used by several threads at once, since no function changes one; only one may free it. Formats,
 * arithmetic and limits are those of the C++ headers named below. New functions and constants may be added; those here keep their meaning.
 */
#ifndef BNB_C_H
#define BNB_C_H

#include <bnb/export.h>
#include <bnb/version.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef int32_t bnb_status;
enum {
  BNB_OK = 0,
  BNB_INVALID_ARGUMENT = 1, /* a size, shape, type or pointer that the function does not accept */
  BNB_UNSUPPORTED = 2,      /* not available on this machine or in this build */
  BNB_OUT_OF_MEMORY = 3,
  BNB_INTERNAL_ERROR = 4
};

typedef int32_t bnb_type; /* of the elements of a tensor */
enum { BNB_F32 = 0, BNB_F16 = 1, BNB_BF16 = 2, BNB_F64 = 3, BNB_U8 = 4, BNB_I8 = 5, BNB_OTHER = 6 };

typedef int32_t bnb_format; /* of a weight */
enum { BNB_NF4 = 0, BNB_FP4 = 1, BNB_DYNAMIC8 = 2, BNB_INT8 = 3 };

/* A tensor of a checkpoint: contiguous, row-major, of any alignment. The memory stays its owner's. */
typedef struct bnb_tensor {
  const char* name; /* UTF-8, ends with a NUL; any path may stand in front, as in "layers.0.weight.absmax" */
  bnb_type type;
  const void* data;
  int64_t size; /* elements */
} bnb_tensor;

typedef struct bnb_weight bnb_weight; /* owns its memory */

/* Why the last call that failed on this thread did: "<operation>: <argument> is <given>, expected <allowed>". Valid until the next failure.
 */
BNB_API const char* bnb_last_error(void);
/* BNB_VERSION of the library that runs, which may be newer than that of this header. */
BNB_API const char* bnb_version(void);
/* The instruction set in use: "avx2", "avx512bf16", ..; NULL where BNB_FORCE_ISA names one that cannot run. */
BNB_API const char* bnb_isa(void);
/* Threads of the library, the caller's among them; 0: as many as the machine has. */
BNB_API bnb_status bnb_set_num_threads(int32_t threads);

/* Quantizes `dims` sizes of `shape`, row-major, in BNB_F32, BNB_F16 or BNB_BF16.
 *   format     BNB_NF4, BNB_FP4: `blocksize` a power of two from 32 to 4096 (64 is usual); BNB_DYNAMIC8: any of 1 or more (4096);
 *              BNB_INT8: 0, and two sizes, for it has one scale per row
 *   nested     not 0: scales are quantized to 8 bits too; not for BNB_INT8
 *   result     gets the handle, to be freed with bnb_weight_free */
BNB_API bnb_status bnb_weight_quantize(const void* x, bnb_type type, const int64_t* shape, size_t dims, bnb_format format,
                                       int64_t blocksize, int32_t nested, bnb_weight** result);

/* A weight out of a checkpoint, copied: `codes` are the bytes of the tensor "weight", `items` all tensors of its state and no others
 * ("weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", ..; see bnb/state.h). */
BNB_API bnb_status bnb_weight_read_4bit(const void* codes, size_t bytes, const bnb_tensor* items, size_t count, bnb_weight** result);
BNB_API bnb_status bnb_weight_read_8bit(const void* codes, size_t bytes, const bnb_tensor* items, size_t count, bnb_weight** result);
/* LLM.int8(): rows * columns codes and one scale per row (the tensors "weight" and "SCB"). */
BNB_API bnb_status bnb_weight_read_int8(const int8_t* codes, const float* scale, int64_t rows, int64_t columns, bnb_weight** result);
BNB_API void bnb_weight_free(bnb_weight* weight); /* NULL is allowed, as in all that follows: an error, or nothing */

/* What it is. Sizes are 0 and pointers NULL where `weight` is NULL. They stay valid as long as the handle. */
BNB_API bnb_format bnb_weight_format(const bnb_weight* weight);
BNB_API int64_t bnb_weight_elements(const bnb_weight* weight);
BNB_API const int64_t* bnb_weight_shape(const bnb_weight* weight, size_t* dims); /* of BNB_DYNAMIC8 without a shape: one size */
BNB_API const void* bnb_weight_codes(const bnb_weight* weight, size_t* bytes);
BNB_API const float* bnb_weight_row_scale(const bnb_weight* weight, size_t* count); /* of BNB_INT8, else NULL */
/* The items of its state, as a checkpoint has them, names without path; none for BNB_INT8. */
BNB_API const bnb_tensor* bnb_weight_items(const bnb_weight* weight, size_t* count);

/* All elements, row-major, rounded once to `type` (BNB_F32, BNB_F16 or BNB_BF16); `elements` must be bnb_weight_elements(weight). */
BNB_API bnb_status bnb_weight_dequantize(const bnb_weight* weight, void* out, bnb_type type, int64_t elements);

/* y = a * W^T + bias for a weight [n, k] of 4 bits or int8: a [m, k] and y [m, n] of `type`, bias [n] of `bias_type` or NULL. `threshold`
 * is that of LLM.int8() outliers for BNB_INT8, 0 for none. (bnb/gemm.h, bnb/int8.h) */
BNB_API bnb_status bnb_weight_gemm(const bnb_weight* weight, const void* a, bnb_type type, int64_t m, const void* bias, bnb_type bias_type,
                                   float threshold, void* y);

/* from[i] to another of BNB_F32, BNB_F16, BNB_BF16, rounded to nearest even. (bnb/convert.h) */
BNB_API bnb_status bnb_convert(const void* from, bnb_type from_type, void* to, bnb_type to_type, int64_t elements);

#ifdef __cplusplus
}
#endif

#endif
