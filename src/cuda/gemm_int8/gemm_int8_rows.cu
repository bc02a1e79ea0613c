// gemm_int8 for few rows of a: W streams once through registers into tensor cores.
//
// A block computes 16 columns of y. Its warps share k, four times 64 columns at a time: rows of W are the A operand of mma, rows of a the B
// operand. Lane t of the four that share a row takes columns 16 t .. 16 t + 15, two mma steps, of both operands alike, so that loads are 16
// bytes. Sums of warps are added in shared memory; as integers they need no order.
//
// Reads the n k bytes of W once and the m k bytes of a once per block, from the caches. Lower bound: n k bytes at memory bandwidth.
#include "cuda/device/cost.h"
#include "cuda/gemm_int8/gemm_int8.cuh"

namespace bnb::cuda::gemm {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * static_cast<int>(dev::kWarp), kColumns = 16, kDepth = 64;
constexpr int kAhead = 4;  // loads in flight per row

struct Config {
  int tiles;  // of 8 rows of a
  constexpr int rows() const { return tiles * 8; }
};
constexpr Config kConfigs[] = {{1}, {2}};

template <int tiles> struct Shared {
  int32_t sums[kWarps][tiles * 8][kColumns];
  OutlierStage<tiles * 8, kColumns> staged;
};

template <int tiles> BNB_KERNEL(kThreads, tiles == 1 ? 3 : 2) multiply_rows(const int8_t* a, const int8_t* b, EpilogueInt8 e) {
  auto& s = dev::shared<Shared<tiles>>();
  const int lane = static_cast<int>(dev::lane()), warp = static_cast<int>(dev::warp()), g = lane / 4, t = lane % 4;
  const int64_t first = int64_t{dev::block().x} * kColumns;
  const int left = static_cast<int>(e.k) - t * 16;  // columns from the lane's first on
  const int8_t* w[2];                               // rows past the end are computed and dropped
  BNB_UNROLL
  for (int h = 0; h < 2; ++h) w[h] = b + (first + g + h * 8 < e.n ? first + g + h * 8 : e.n - 1) * e.k + (left > 0 ? t * 16 : 0);
  const int8_t* x[tiles];
  int x_left[tiles];
  BNB_UNROLL
  for (int tile = 0; tile < tiles; ++tile) {
    x[tile] = a + (tile * 8 + g) * e.k + t * 16;
    x_left[tile] = tile * 8 + g < e.m ? left : 0;
  }

  int32_t sums[tiles][4] = {};
  BNB_KEEP_LOOP
  for (int base = warp * kAhead * kDepth; base < static_cast<int>(e.k); base += kWarps * kAhead * kDepth) {
    Bits<16> left_words[kAhead][2], right_words[kAhead][tiles];
    BNB_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int at = base + i * kDepth, inside = at < left ? at : 0;  // past k any weight of the row: x is 0 there
      BNB_UNROLL
      for (int h = 0; h < 2; ++h) left_words[i][h] = dev::load_once<Bits<16>>(w[h] + inside);
      BNB_UNROLL
      for (int tile = 0; tile < tiles; ++tile)
        right_words[i][tile] = at < x_left[tile] ? dev::load_const<Bits<16>>(x[tile] + at) : Bits<16>{};
    }
    BNB_UNROLL
    for (int i = 0; i < kAhead; ++i) BNB_UNROLL
    for (int j = 0; j < 4; j += 2) {
      const auto &low = left_words[i][0].word, &high = left_words[i][1].word;
      const uint32_t fragment[4] = {low[j], high[j], low[j + 1], high[j + 1]};
      BNB_UNROLL
      for (int tile = 0; tile < tiles; ++tile) {
        const uint32_t other[2] = {right_words[i][tile].word[j], right_words[i][tile].word[j + 1]};
        dev::mma_s8(sums[tile], fragment, other);
      }
    }
  }
  if (e.may_have_outliers) s.staged.fill(e, 0, first, 0);
  BNB_UNROLL
  for (int i = 0; i < tiles * 4; ++i) s.sums[warp][i / 4 * 8 + 2 * t + i % 2][i % 4 / 2 * 8 + g] = sums[i / 4][i % 4];
  dev::barrier();
  const auto sum = [&](int row, int column, int32_t (&to)[1]) {
    to[0] = 0;
    BNB_UNROLL
    for (int i = 0; i < kWarps; ++i) to[0] += s.sums[i][row][column];
  };
  apply_epilogue<tiles * 8, kColumns, kThreads, 1, 1>(e, e.may_have_outliers ? &s.staged : nullptr, 0, first, sum);
}

std::string describe_config(const Plan& plan) {
  return std::to_string(kConfigs[plan.config].rows()) + " rows, " + std::to_string(kColumns) + " columns per block";
}

void offer(const ProductInt8& p, const dev::Device& device, std::vector<Plan>& plans) {
  constexpr int kMostRows = kConfigs[std::size(kConfigs) - 1].rows();
  if (!rows_aligned(p) || p.to.m > kMostRows) return;
  // W comes from memory, rows of a from the caches.
  const double blocks = static_cast<double>(ceil_div(ceil_div(p.to.n, kColumns), device.sms));
  const double bytes = static_cast<double>(p.to.k) * (kColumns + 0.25 * static_cast<double>(p.to.m));
  plans.push_back({.config = p.to.m > kConfigs[0].rows() ? 1 : 0,
                   .clocks = kPlainLaunchClocks + blocks * bytes / kMemoryBytes,
                   .describe = describe_config});
}

void run_config(const Plan& plan, const ProductInt8& p, void*, Stream stream) {
  with_config<kConfigs>(plan.config, [&]<Config c> {
    dev::launch({.op = p.op,
                 .dtype = p.to.out_type,
                 .shape = {p.to.m, p.to.n, p.to.k},
                 .grid = {static_cast<uint32_t>(ceil_div(p.to.n, kColumns))},
                 .threads = kThreads,
                 .shared = sizeof(Shared<c.tiles>),
                 .stream = stream},
                multiply_rows<c.tiles>, p.a, p.b, p.to);
  });
}

}  // namespace

const Family<ProductInt8> kRowsInt8 = {"rows", offer, run_config};

}  // namespace bnb::cuda::gemm
