// Block-wise quantization (Dettmers et al., 4-bit: QLoRA, arXiv 2305.14314; 8-bit: 8-bit Optimizers, arXiv 2110.02861).
//
// A tensor is read as one flat row of n elements, cut into blocks of `blocksize` (the last may be shorter). Of each block
//   absmax = max |x|   and   t = x * (1 / absmax), both rounded to fp32,
// and t is replaced by the number of its nearest code. The inverse is x' = value[code] * absmax, rounded once to the output type.
// NaN and infinity: a block that holds one has that absmax; see docs/NUMERICS.md for the codes. A block with a NaN in absmax decodes to
// that NaN, made quiet.
//
// All functions: any n >= 0; work is spread by parallel_for (bnb/parallel.h) and the bytes do not depend on the number of threads or on the
// instruction set. Errors: bnb::Error{invalid_argument} for sizes that do not fit and for an output that lies in an input or in another
// output.
#pragma once

#include <bnb/types.h>

#include <cstdint>
#include <span>

namespace bnb {

// 4 bits, and 8 bits on a GPU, take powers of two between these. 8 bits on the CPU take any blocksize of 1 or more; multiples of 32 are
// fastest, and one block is never shared by threads.
inline constexpr int64_t kMinBlocksize = 32, kMaxBlocksize = 4096;

constexpr int64_t blocks_of(int64_t n, int64_t blocksize) { return n / blocksize + (n % blocksize != 0); }
constexpr int64_t packed_size(int64_t n) { return n / 2 + (n % 2 != 0); }  // bytes of n 4-bit codes

// Element 2i is the high nibble of byte i, element 2i+1 the low one; the low nibble behind an odd n is the code of zero.
// Reads sizeof(T), writes 0.5 bytes per element, and 4 bytes per block.
struct Quantize4bit {
  QuantType type = QuantType::nf4;
  int64_t blocksize = 64;
  ConstView x = {};               // n elements
  std::span<uint8_t> codes = {};  // packed_size(n)
  std::span<float> absmax = {};   // blocks_of(n, blocksize)
};
BNB_API void quantize_4bit(const Quantize4bit&);

struct Dequantize4bit {
  QuantType type = QuantType::nf4;
  int64_t blocksize = 64;
  std::span<const uint8_t> codes = {};  // packed_size(n)
  std::span<const float> absmax = {};   // blocks_of(n, blocksize)
  View out = {};                        // n elements
};
BNB_API void dequantize_4bit(const Dequantize4bit&);

// `code` holds 256 values in ascending order. The nearest one is taken by t against the fp32 midpoints of neighbours; a tie goes to the
// even code number. 0.0 in a map that contains 0.0 stays 0.0.
struct QuantizeBlockwise {
  int64_t blocksize = 256;
  std::span<const float> code = {};  // 256
  ConstView x = {};                  // n elements
  std::span<uint8_t> codes = {};     // n
  std::span<float> absmax = {};      // blocks_of(n, blocksize)
};
BNB_API void quantize_blockwise(const QuantizeBlockwise&);

// `code` need not be sorted here.
struct DequantizeBlockwise {
  int64_t blocksize = 256;
  std::span<const float> code = {};     // 256
  std::span<const uint8_t> codes = {};  // n
  std::span<const float> absmax = {};   // blocks_of(n, blocksize)
  View out = {};                        // n elements
};
BNB_API void dequantize_blockwise(const DequantizeBlockwise&);

}  // namespace bnb
