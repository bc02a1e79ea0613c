// The public operations: arguments are checked here, once, then the kernel in use runs over parallel ranges.
#include <bnb/bnb.h>

#include "common/arguments.h"
#include "cpu/gemm/driver.h"
#include "cpu/kernels/codebook8.h"
#include "cpu/kernels/kernels.h"
#include "cpu/runtime/pages.h"

namespace bnb {
namespace {

// f on ranges of the blocks of n elements, which become `bytes` at `out`.
template <class F> void for_blocks(int64_t n, int64_t blocksize, void* out, int64_t bytes, F&& f) {
  if (n == 0) return;
  blocksize = std::min(blocksize, n);
  const cpu::OutputPages pages(out, bytes);
  const auto stores = pages.streams() ? cpu::Stores::streaming : cpu::Stores::cached;
  const int64_t blocks = blocks_of(n, blocksize), block_bytes = blocksize * bytes / n;
  parallel_for(blocks, grain_of(kGrainElements, blocksize), [&](int64_t begin, int64_t end) {
    pages.map(begin * block_bytes, end * block_bytes);
    f(cpu::Range{begin, end}, stores);
  });
}

}  // namespace

void quantize_4bit(const Quantize4bit& d) {
  check_arguments(d).within_memory([&] {
    const auto& kernels = cpu::active();
    for_blocks(d.x.size, d.blocksize, d.codes.data(), packed_size(d.x.size),
               [&](cpu::Range blocks, cpu::Stores) { kernels.quantize_4bit(d, blocks); });
  });
}

void dequantize_4bit(const Dequantize4bit& d) {
  check_arguments(d).within_memory([&] {
    const auto& kernels = cpu::active();
    for_blocks(d.out.size, d.blocksize, d.out.data, d.out.size * size_of(d.out.dtype),
               [&](cpu::Range blocks, cpu::Stores stores) { kernels.dequantize_4bit(d, stores, blocks); });
  });
}

void quantize_blockwise(const QuantizeBlockwise& d) {
  const Checker check = check_arguments(d);
  check.ascending("code", d.code);
  if (d.x.size == 0) return;
  check.within_memory([&] {
    const auto& kernels = cpu::active();
    const auto encoder = cpu::encoder_for(d.code, d.x.size);
    for_blocks(d.x.size, d.blocksize, d.codes.data(), d.x.size,
               [&](cpu::Range blocks, cpu::Stores) { kernels.quantize_blockwise(d, *encoder, blocks); });
  });
}

void dequantize_blockwise(const DequantizeBlockwise& d) {
  check_arguments(d).within_memory([&] {
    const auto& kernels = cpu::active();
    for_blocks(d.out.size, d.blocksize, d.out.data, d.out.size * size_of(d.out.dtype),
               [&](cpu::Range blocks, cpu::Stores stores) { kernels.dequantize_blockwise(d, stores, blocks); });
  });
}

void gemm_4bit(const Gemm4bit& d) {
  check_arguments(d).within_memory([&] { multiply(cpu::active().gemm_4bit, d); });
}

}  // namespace bnb
