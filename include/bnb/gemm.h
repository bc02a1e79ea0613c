// y = a * W^T + bias with a 4-bit weight W that is decoded on the way and never written back.
//
// W has shape [n, k], row-major, quantized as one flat row of n * k elements (bnb/quantize.h), so blocks may run over the ends of rows.
// The arithmetic follows the type of `a`:
//   f32         w = fp32(value * absmax), products and sums in fp32
//   bf16, f16   w is rounded once to that type, exactly what dequantize_4bit gives; products exact, sums in fp32, one rounding at the end
// A single row may instead be multiplied by fp32(value) and absmax, neither rounded nor multiplied first, or in integers of 15 bits, with
// half the error of weights rounded to bf16, where that is faster by more than a tenth (AVX-512 without bf16 dot products, and AMX);
// `batch_invariant` forbids it.
// An output that lies in an input is an error. Nothing depends on the number of threads. With `batch_invariant`, and for m > 1 without it,
// row i of y depends on row i of a alone.
// Reads n * k / 2 bytes of codes and 4 bytes per block (nested: 1) once, whatever m is. Work: 2 m n k operations.
#pragma once

#include <bnb/quantize.h>

namespace bnb {

// The absmax of each block, as it is or itself quantized ("double quantization", QLoRA section 3):
//   absmax[i] = fp32(code[codes[i]] * nested[i / nested_blocksize]) + offset, each step rounded to fp32.
struct Absmax {
  std::span<const float> values = {};  // blocks_of(n * k, blocksize); used when `codes` is empty

  std::span<const uint8_t> codes = {};  // blocks_of(n * k, blocksize)
  std::span<const float> code = {};     // 256
  std::span<const float> nested = {};   // blocks_of(codes.size(), nested_blocksize)
  int64_t nested_blocksize = 256;
  float offset = 0;
  const float* device_offset = nullptr;  // on a GPU: where it holds the offset, null to take `offset`; the CPU does not look at it

  bool is_nested() const { return !codes.empty(); }
  float operator[](int64_t block) const {
    if (!is_nested()) return values[block];
    const float scaled = code[codes[block]] * nested[block / nested_blocksize];
    return scaled + offset;
  }
};

struct Gemm4bit {
  QuantType type = QuantType::nf4;
  int64_t blocksize = 64;
  int64_t m = 0, n = 0, k = 0;
  ConstView a = {};                     // m * k
  std::span<const uint8_t> codes = {};  // packed_size(n * k)
  Absmax absmax = {};
  ConstView bias = {};  // n elements, of any type; empty: none
  View out = {};        // m * n, of a's type
  bool batch_invariant = false;
};
BNB_API void gemm_4bit(const Gemm4bit&);

}  // namespace bnb
