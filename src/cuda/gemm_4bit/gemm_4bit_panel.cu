// gemm_4bit for many rows of a: rows of W are decoded into a panel that stays in L2 and that cuBLASLt multiplies with a; then the next
// rows. Exact weights, as dequantize_4bit gives them.
//
// Reads 1/2 byte per weight, writes and reads each weight of the panel once, reads a once per panel. Lower bound: 2 m n k operations of the
// tensor cores. Pays from a few hundred rows on, where decoding is a small part.
#include <bnb/cuda.h>

#include "cuda/device/cublaslt.h"
#include "cuda/gemm_4bit/gemm_4bit.cuh"

namespace bnb::cuda::gemm {
namespace {

constexpr int64_t kRowStep = 512, kAlign = 256;  // 512 rows of k >= 8 weights are whole blocks of any size

// Decodes the nested absmax of all blocks.
BNB_KERNEL(256, 8) decode_scales(Weight4bit w, int64_t blocks, float* to) {
  const Scales scales(w);
  for (int64_t i = int64_t{dev::block().x} * 256 + dev::thread(); i < blocks; i += int64_t{dev::grid().x} * 256) to[i] = scales[i];
}

constexpr int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }

// | library's workspace | panel | scales |
struct Layout {
  int64_t panel, scales, bytes;
};
Layout layout_of(const Plan& p, const Gemm4bit& d) {
  const int64_t panel = library::kWorkspace, scales = panel + round_up(p.panel * d.k * size_of(d.a.dtype), kAlign);
  return {panel, scales, scales + (d.absmax.is_nested() ? blocks_of(d.n * d.k, d.blocksize) * 4 : 0)};
}

std::string describe_config(const Plan& p) { return "panels of " + std::to_string(p.panel) + " rows of W"; }

void offer(const Gemm4bit& d, const dev::Device& device, std::vector<Plan>& plans) {
  const int64_t size = size_of(d.a.dtype), per_16_bytes = 16 / size;
  const auto aligned = [](const void* p) { return dev::aligned(p, 16); };
  // Opened by the first call of any m, so that a graph of many rows captured later finds the library ready.
  const bool there = library::available(device.index);
  if (!there || d.batch_invariant || d.m < 32 || d.k < 8 || d.k % 8 != 0 || d.n % per_16_bytes != 0 || d.m > INT32_MAX || d.n > INT32_MAX)
    return;
  if (!aligned(d.a.data) || !aligned(d.out.data) || (d.bias.size && (d.bias.dtype != d.out.dtype || !aligned(d.bias.data)))) return;
  const Rates rates = rates_of(device.arch);
  Plan p = {.describe = describe_config};
  // Panels of at most half of L2, but enough rows to fill the device.
  const int64_t most = std::max<int64_t>(4 * kRowStep, device.l2_bytes / 2 / (d.k * size) / kRowStep * kRowStep);
  p.panel = std::min(d.n, round_up(ceil_div(d.n, ceil_div(d.n, most)), kRowStep));
  p.workspace = layout_of(p, d).bytes;
  const double weights = static_cast<double>(d.n) * static_cast<double>(d.k) / device.sms, rows = static_cast<double>(d.m);
  const double speed = d.a.dtype == DType::f32 ? kLibraryFp32 : rates.library;
  p.clocks = kLaunchClocks * (2.0 * static_cast<double>(ceil_div(d.n, p.panel)) + 1) +
             weights * (rows / speed + (0.5 + static_cast<double>(size)) / (rates.l2_bytes / 2));
  plans.push_back(p);
}

void run_config(const Plan& p, const Gemm4bit& d, void* workspace, Stream stream) {
  const Layout at = layout_of(p, d);
  auto* bytes = static_cast<uint8_t*>(workspace);
  const int64_t size = size_of(d.a.dtype);
  std::span<const float> absmax = d.absmax.values;
  if (d.absmax.is_nested()) {
    const int64_t blocks = blocks_of(d.n * d.k, d.blocksize);
    auto* scales = reinterpret_cast<float*>(bytes + at.scales);
    dev::launch({.op = "gemm_4bit",
                 .dtype = d.a.dtype,
                 .shape = {d.m, d.n, d.k},
                 .grid = {static_cast<uint32_t>(std::min<int64_t>(ceil_div(blocks, 256), int64_t{8} * dev::device().sms))},
                 .threads = 256,
                 .stream = stream},
                decode_scales, weight_of(d), blocks, scales);
    absmax = {scales, static_cast<size_t>(blocks)};
  }
  for (int64_t row = 0; row < d.n; row += p.panel) {
    const int64_t rows = std::min(p.panel, d.n - row), first = row * d.k;
    dequantize_4bit({.type = d.type,
                     .blocksize = d.blocksize,
                     .codes = d.codes.subspan(static_cast<size_t>(first / 2)),
                     .absmax = absmax.subspan(static_cast<size_t>(first / d.blocksize)),
                     .out = {bytes + at.panel, d.a.dtype, rows * d.k}},
                    stream);
    library::multiply({.type = d.a.dtype,
                       .m = d.m,
                       .n = rows,
                       .k = d.k,
                       .pitch = d.n,
                       .a = d.a.data,
                       .w = bytes + at.panel,
                       .bias = d.bias.size ? static_cast<const uint8_t*>(d.bias.data) + row * size : nullptr,
                       .y = static_cast<uint8_t*>(d.out.data) + row * size,
                       .workspace = bytes},
                      dev::device().index, stream);
  }
}

}  // namespace

const Family<Gemm4bit> kPanel4bit = {"panel", offer, run_config};

}  // namespace bnb::cuda::gemm
