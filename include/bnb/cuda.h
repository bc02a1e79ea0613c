// The operations on a GPU. The descriptors are those of the CPU (bnb/quantize.h, bnb/gemm.h, bnb/int8.h, bnb/optim.h) and mean the same,
// byte by byte, except that every pointer in them (views, spans, maps, absmax) is a device pointer of the current device.
//
// A call checks sizes and pointers as on the CPU (bnb::Error{invalid_argument}), puts its kernels on `stream` and returns: it neither waits
// nor allocates, so it may be captured into a graph. What lies behind the pointers is not looked at: a map that does not ascend gives codes
// that mean nothing, never a fault. No alignment is demanded; 16-byte aligned tensors are the fast case.
// An error of the device (no driver, no kernel for it, an earlier fault) is bnb::Error{unsupported} and names the operation.
#pragma once

#include <bnb/gemm.h>
#include <bnb/int8.h>
#include <bnb/optim.h>
#include <bnb/quantize.h>

#include <cstdint>
#include <string>

namespace bnb::cuda {

using Stream = void*;  // a cudaStream_t or hipStream_t; null is the default stream

// The devices that can be used; 0 without a GPU or a driver.
BNB_API int device_count();

BNB_API void quantize_4bit(const Quantize4bit&, Stream);
BNB_API void dequantize_4bit(const Dequantize4bit&, Stream);
BNB_API void quantize_blockwise(const QuantizeBlockwise&, Stream);
BNB_API void dequantize_blockwise(const DequantizeBlockwise&, Stream);

// Sums are in fp32 and rounded once; the same call gives the same bytes. Exact weights, as dequantize_4bit has them, with `batch_invariant`
// (then a row of y depends on its row of a alone), for fp32, and where the kernel has them; other kernels multiply values, rounded to a's
// type after a stretch that makes their error small, and scale the sums of blocks by absmax. docs/NUMERICS.md has the errors. `workspace`
// is device memory of gemm_4bit_workspace(d) bytes, 256-byte aligned, used until the stream has passed the call; null where 0 bytes are
// asked for.
BNB_API int64_t gemm_4bit_workspace(const Gemm4bit&);
BNB_API void gemm_4bit(const Gemm4bit&, void* workspace, Stream);
// Which kernel does the call on the current device, its configuration and the estimate by which it was chosen.
BNB_API std::string describe_gemm_4bit(const Gemm4bit&);

// LLM.int8(). Codes, scales, bits of outlier columns and products are those of the CPU; a NaN in a product may have other bits.
BNB_API void quantize_int8(const QuantizeInt8&, Stream);
BNB_API void quantize_columns_int8(const QuantizeColumnsInt8&, Stream);
BNB_API void dequantize_int8(const DequantizeInt8&, Stream);
BNB_API void dequantize_sums(const DequantizeSums&, Stream);
// `outliers` is a list on the device like all else: columns that do not exist are passed over. Rows of a multiple of 16 bytes at addresses
// aligned to 16 are fast, others right.
BNB_API void gemm_int8(const GemmInt8&, Stream);
BNB_API std::string describe_gemm_int8(const GemmInt8&);
// to[i][c] = x[i][outliers[c]] for the x and outliers of a product; 0 for columns that do not exist.
BNB_API void gather_columns(const GemmInt8&, void* to, Stream);
// Outlier columns stay on the device: nothing waits for their number. Up to 128 KiB of x take two kernels, more take four steps
// (clear the bits, quantize, clear columns, multiply). `workspace` as for gemm_4bit.
BNB_API int64_t linear_int8_workspace(const LinearInt8&);
BNB_API void linear_int8(const LinearInt8&, void* workspace, Stream);

// One step of an optimizer over all tensors: parameters, states, absmax and norms are those of the CPU, byte by byte. With a clock, one
// int64 on the device, each tensor's step is *clock more, read when the kernels run, and *clock is one more afterwards: so a graph's
// replays count on. `workspace` as for gemm_4bit, some 250 bytes a tensor, 12 KiB for maps of 8 bits, and up to 2 KiB a tensor with
// max_unorm. Up to 288 tensors take two kernels, 576 three, one more where there are states of both widths.
BNB_API int64_t optimizer_workspace(const OptimizerStep&);
BNB_API void optimizer_step(const OptimizerStep&, void* workspace, int64_t* clock, Stream);
BNB_API std::string describe_optimizer_step(const OptimizerStep&);

// Memory that the current device shares with the host, page by page: there may be more of it than the device has. `free_managed` waits for
// the device. `prefetch_managed` starts moving pages to the current device or to the host, where the device can; nothing else changes.
BNB_API void* allocate_managed(int64_t bytes);
BNB_API void free_managed(void*);
BNB_API void prefetch_managed(const void* from, int64_t bytes, bool to_host, Stream);

}  // namespace bnb::cuda
