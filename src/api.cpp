// The public operations: arguments are checked here, once, then the kernel in use runs over parallel ranges.
#include <bnb/bnb.h>

#include "check.h"
#include "cpu/codebook8.h"
#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/scratch.h"
#include "parallel.h"

namespace bnb {
namespace {

// Elements a task should hold, so that handing it to a thread (some microseconds) stays a small part of its time.
constexpr int64_t kGrainElements = 1 << 15;

// f on ranges of the blocks of n elements, which become `bytes` at `out`.
template <class F> void for_blocks(int64_t n, int64_t blocksize, void* out, int64_t bytes, F&& f) {
  const cpu::OutputPages pages(out, bytes);
  const int64_t blocks = blocks_of(n, blocksize), block_bytes = blocksize * bytes / std::max<int64_t>(1, n);
  parallel_for(blocks, std::max<int64_t>(1, kGrainElements / blocksize), [&](int64_t begin, int64_t end) {
    pages.map(begin * block_bytes, end * block_bytes);
    f(cpu::Range{begin, end});
  });
}

}  // namespace

void quantize_4bit(const Quantize4bit& d) {
  const Checker check("quantize_4bit");
  check.type(d.type);
  check.blocksize(d.blocksize);
  check.view("x", d.x);
  check.size("codes", d.codes, packed_size(d.x.size));
  check.size("absmax", d.absmax, blocks_of(d.x.size, d.blocksize));
  const auto& kernels = cpu::active();
  for_blocks(d.x.size, d.blocksize, d.codes.data(), packed_size(d.x.size), [&](cpu::Range blocks) { kernels.quantize_4bit(d, blocks); });
}

void dequantize_4bit(const Dequantize4bit& d) {
  const Checker check("dequantize_4bit");
  check.type(d.type);
  check.blocksize(d.blocksize);
  check.view("out", d.out);
  check.size("codes", d.codes, packed_size(d.out.size));
  check.size("absmax", d.absmax, blocks_of(d.out.size, d.blocksize));
  const auto& kernels = cpu::active();
  for_blocks(d.out.size, d.blocksize, d.out.data, d.out.size * size_of(d.out.dtype),
             [&](cpu::Range blocks) { kernels.dequantize_4bit(d, blocks); });
}

void quantize_blockwise(const QuantizeBlockwise& d) {
  const Checker check("quantize_blockwise");
  check.blocksize(d.blocksize);
  check.view("x", d.x);
  check.size("code", d.code, 256);
  check.ascending("code", d.code);
  check.size("codes", d.codes, d.x.size);
  check.size("absmax", d.absmax, blocks_of(d.x.size, d.blocksize));
  if (d.x.size == 0) return;
  const auto& kernels = cpu::active();
  const auto encoder = cpu::encoder_for(d.code, d.x.size);
  for_blocks(d.x.size, d.blocksize, d.codes.data(), d.x.size, [&](cpu::Range blocks) { kernels.quantize_blockwise(d, *encoder, blocks); });
}

void dequantize_blockwise(const DequantizeBlockwise& d) {
  const Checker check("dequantize_blockwise");
  check.blocksize(d.blocksize);
  check.view("out", d.out);
  check.size("code", d.code, 256);
  check.size("codes", d.codes, d.out.size);
  check.size("absmax", d.absmax, blocks_of(d.out.size, d.blocksize));
  const auto& kernels = cpu::active();
  for_blocks(d.out.size, d.blocksize, d.out.data, d.out.size * size_of(d.out.dtype),
             [&](cpu::Range blocks) { kernels.dequantize_blockwise(d, blocks); });
}

void gemm_4bit(const Gemm4bit& d) {
  const Checker check("gemm_4bit");
  check.type(d.type);
  check.blocksize(d.blocksize);
  const int64_t weights = check.product("n * k", d.n, d.k);
  check.view("a", d.a);
  check.equal("a", d.a.size, check.product("m * k", d.m, d.k), "m * k elements");
  check.view("out", d.out);
  check.equal("out", d.out.size, check.product("m * n", d.m, d.n), "m * n elements");
  check.that(d.out.dtype == d.a.dtype, "out", name(d.out.dtype), "the type of a");
  check.size("codes", d.codes, packed_size(weights));
  const int64_t blocks = blocks_of(weights, d.blocksize);
  if (d.absmax.is_nested()) {
    check.size("absmax.codes", d.absmax.codes, blocks);
    check.size("absmax.code", d.absmax.code, 256);
    check.blocksize(d.absmax.nested_blocksize, "absmax.nested_blocksize");
    check.size("absmax.nested", d.absmax.nested, blocks_of(blocks, d.absmax.nested_blocksize));
  } else {
    check.size("absmax.values", d.absmax.values, blocks);
  }
  check.view("bias", d.bias);
  if (d.bias.size != 0) check.equal("bias", d.bias.size, d.n, "n elements");
  if (d.m == 0 || d.n == 0) return;

  const auto& gemm = cpu::active().gemm_4bit;
  cpu::Scratch packed(gemm.pack_bytes(d));
  const int64_t units = gemm.pack_units(d);
  parallel_for(units, std::max<int64_t>(1, kGrainElements * units / std::max<int64_t>(1, d.m * d.k)),
               [&](int64_t begin, int64_t end) { gemm.pack(d, packed.data(), {begin, end}); });
  const int64_t steps = blocks_of(d.n, gemm.column_step);
  // A step decodes column_step rows of W and multiplies them with all of a.
  const int64_t work = gemm.column_step * d.k * (4 + d.m);
  parallel_for(steps, std::max<int64_t>(1, 4 * kGrainElements / std::max<int64_t>(1, work)), [&](int64_t begin, int64_t end) {
    gemm.run(d, packed.data(), {begin * gemm.column_step, std::min(end * gemm.column_step, d.n)});
  });
}

}  // namespace bnb
