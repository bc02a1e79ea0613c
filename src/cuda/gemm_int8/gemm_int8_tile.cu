// gemm_int8 in tiles: both operands through shared memory into tensor cores.
//
// A block computes warps_m * m_tiles * 16 rows by warps_n * n_tiles * 8 columns of y, 64 columns of k per step. Asynchronous copies fill
// `stages` buffers, whose rows are padded to 80 bytes so that the eight rows of a matrix are in different banks. Rows of any length and
// address (vectors = false) are copied byte by byte.
//
// Reads a once per block of columns and W once per block of rows. Lower bound: 2 m n k operations of the tensor cores.
#include <algorithm>

#include "cuda/device/cost.h"
#include "cuda/gemm_int8/gemm_int8.cuh"

namespace bnb::cuda::gemm {
namespace {

constexpr int kDepth = 64, kPitch = kDepth + 16;

struct Config {
  int warps_m, warps_n, m_tiles, n_tiles, stages, per_sm;
  bool vectors;
  constexpr int rows() const { return warps_m * m_tiles * 16; }
  constexpr int columns() const { return warps_n * n_tiles * 8; }
  constexpr int threads() const { return warps_m * warps_n * static_cast<int>(dev::kWarp); }
  constexpr int stage_bytes() const { return (rows() + columns()) * kPitch; }
  constexpr int sum_pitch() const { return columns() + 8; }
  constexpr int tile_bytes() const { return std::max(stages * stage_bytes(), rows() * sum_pitch() * 4); }  // stages, then sums
  constexpr int staged_bytes() const { return (rows() + columns()) * kChunk * 4 + (kChunk + 4) * 4; }
  constexpr uint32_t shared(bool outliers) const { return static_cast<uint32_t>(tile_bytes() + (outliers ? staged_bytes() : 0)); }
};
constexpr Config kConfigs[] = {
    {2, 2, 2, 2, 4, 4, true}, {2, 2, 2, 4, 4, 4, true}, {2, 4, 4, 4, 4, 2, true}, {2, 4, 4, 8, 4, 1, true}, {2, 2, 2, 4, 3, 4, false}};

template <Config c> BNB_KERNEL(c.threads(), c.per_sm) multiply_tile(const int8_t* a, const int8_t* b, EpilogueInt8 e, int64_t row_blocks) {
  constexpr int kRows = c.rows(), kColumns = c.columns(), kThreads = c.threads(), kStages = c.stages, kStep = kThreads / 4;
  constexpr int kMTiles = c.m_tiles, kNTiles = c.n_tiles;
  constexpr bool kVectors = c.vectors;
  auto* shared = &dev::shared<uint8_t>();
  const int lane = static_cast<int>(dev::lane()), warp = static_cast<int>(dev::warp());
  const int warp_row = warp % c.warps_m * kMTiles * 16, warp_column = warp / c.warps_m * kNTiles * 8;
  const int64_t first_row = dev::block().x % row_blocks * kRows, first_column = dev::block().x / row_blocks * kColumns;
  const int k = static_cast<int>(e.k), steps = (k + kDepth - 1) / kDepth;

  // 16 bytes of a row per copy; zeros past the ends.
  const int copy_row = static_cast<int>(dev::thread()) / 4, copy_column = static_cast<int>(dev::thread()) % 4 * 16;
  const auto copy_rows = [&](const int8_t* from, int count, int64_t rows_left, int step, uint8_t* to) {
    const int column = step * kDepth + copy_column;
    from += copy_row * e.k + column;
    to += copy_row * kPitch + copy_column;
    if (column >= k) rows_left = 0;
    BNB_UNROLL
    for (int i = 0; i < count; i += kStep) {
      const bool in = copy_row + i < rows_left;
      if constexpr (kVectors)
        dev::copy_async<16>(to + i * kPitch, from + i * e.k, in ? 16 : 0);
      else
        dev::store_shared(to + i * kPitch, load_bytes<Bits<16>>(reinterpret_cast<const uint8_t*>(from + i * e.k), 0, in ? k - column : 0));
    }
  };
  const auto copy = [&](int step) {
    uint8_t* to = shared + step % kStages * c.stage_bytes();
    copy_rows(a + first_row * e.k, kRows, e.m - first_row, step, to);
    copy_rows(b + first_column * e.k, kColumns, e.n - first_column, step, to + kRows * kPitch);
  };
  BNB_UNROLL
  for (int i = 0; i < kStages - 1; ++i) {
    if (i < steps) copy(i);
    dev::copy_commit();
  }
  OutlierStage<kRows, kColumns>* staged = nullptr;
  if (e.may_have_outliers) {
    static_assert(sizeof(OutlierStage<kRows, kColumns>) <= c.staged_bytes());
    staged = reinterpret_cast<OutlierStage<kRows, kColumns>*>(shared + c.tile_bytes());
    staged->fill(e, first_row, first_column, 0);
  }

  const uint8_t* a_at = shared + (warp_row + lane % 16) * kPitch + lane / 16 * 16;
  const uint8_t* b_at = shared + (kRows + warp_column + lane / 16 * 8 + lane % 8) * kPitch + lane / 8 % 2 * 16;
  int32_t sums[kMTiles][kNTiles][4] = {};
  BNB_KEEP_LOOP
  for (int step = 0; step < steps; ++step) {
    dev::copy_wait<kStages - 2>();
    dev::barrier();
    if (step + kStages - 1 < steps) copy(step + kStages - 1);
    dev::copy_commit();
    const int offset = step % kStages * c.stage_bytes();
    BNB_UNROLL
    for (int at = 0; at < kDepth; at += 32) {
      uint32_t left[kMTiles][4], right[kNTiles / 2][4];
      BNB_UNROLL
      for (int i = 0; i < kMTiles; ++i) dev::load_matrices(left[i], a_at + offset + i * 16 * kPitch + at);
      BNB_UNROLL
      for (int j = 0; j < kNTiles / 2; ++j) dev::load_matrices(right[j], b_at + offset + j * 16 * kPitch + at);
      BNB_UNROLL
      for (int i = 0; i < kMTiles; ++i) BNB_UNROLL
      for (int j = 0; j < kNTiles; ++j) {
        const uint32_t fragment[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
        dev::mma_s8(sums[i][j], left[i], fragment);
      }
    }
  }

  dev::copy_wait<0>();
  dev::barrier();
  const int g = lane / 4, t = lane % 4;
  auto* tile = reinterpret_cast<int32_t*>(shared);
  BNB_UNROLL
  for (int i = 0; i < kMTiles * kNTiles * 2; ++i) {
    const int row = warp_row + i / 2 / kNTiles * 16 + i % 2 * 8 + g, column = warp_column + i / 2 % kNTiles * 8 + 2 * t;
    const auto& from = sums[i / 2 / kNTiles][i / 2 % kNTiles];
    dev::store_shared(tile + row * c.sum_pitch() + column,
                      Bits<8>{static_cast<uint32_t>(from[i % 2 * 2]), static_cast<uint32_t>(from[i % 2 * 2 + 1])});
  }
  dev::barrier();
  const auto sum = [&](int row, int column, int32_t (&to)[8]) {
    BNB_UNROLL
    for (int i = 0; i < 8; i += 4) {
      const auto v = dev::load_shared<Bits<16>>(tile + row * c.sum_pitch() + column + i);
      BNB_UNROLL
      for (int j = 0; j < 4; ++j) to[i + j] = static_cast<int32_t>(v.word[j]);
    }
  };
  constexpr int kTall = std::min(4, kRows / (kThreads / (kColumns / 8)));
  apply_epilogue<kRows, kColumns, kThreads, kTall, 8>(e, staged, first_row, first_column, sum);
}

std::string describe_config(const Plan& plan) {
  const Config& c = kConfigs[plan.config];
  return std::to_string(c.rows()) + " x " + std::to_string(c.columns()) + " x 64, " + std::to_string(c.threads() / 32) + " warps, " +
         std::to_string(c.stages) + " stages" + (c.vectors ? "" : ", any alignment");
}

void offer(const ProductInt8& p, const dev::Device& device, std::vector<Plan>& plans) {
  const bool vectors = rows_aligned(p);
  const Rates rates = rates_of(device.arch);
  for (size_t i = 0; i < std::size(kConfigs); ++i) {
    const Config& c = kConfigs[i];
    if (c.vectors != vectors || c.shared(p.to.may_have_outliers) > device.shared_bytes) continue;
    // A step: products, twice as fast as those of 16 bits, and bytes from L2.
    const double tiles = static_cast<double>(ceil_div(ceil_div(p.to.m, c.rows()) * ceil_div(p.to.n, c.columns()), device.sms));
    const double products = c.rows() * c.columns() * kDepth / (2 * rates.mma), bytes = (c.rows() + c.columns()) * kDepth / rates.l2_bytes;
    const double step = std::max(kShortestStepClocks, tiles * kTileOverhead * std::max(products, bytes));
    plans.push_back({.config = static_cast<int>(i),
                     .clocks = kLaunchClocks + static_cast<double>(ceil_div(p.to.k, kDepth)) * step +
                               tiles * c.rows() * c.columns() / kTileStoreElements,
                     .describe = describe_config});
  }
}

void run_config(const Plan& plan, const ProductInt8& p, void*, Stream stream) {
  with_config<kConfigs>(plan.config, [&]<Config c> {
    const int64_t row_blocks = ceil_div(p.to.m, c.rows());
    dev::launch({.op = p.op,
                 .dtype = p.to.out_type,
                 .shape = {p.to.m, p.to.n, p.to.k},
                 .grid = {static_cast<uint32_t>(std::min<int64_t>(row_blocks * ceil_div(p.to.n, c.columns()), UINT32_MAX))},
                 .threads = static_cast<uint32_t>(c.threads()),
                 .shared = c.shared(p.to.may_have_outliers),
                 .stream = stream},
                multiply_tile<c>, p.a, p.b, p.to, row_blocks);
  });
}

}  // namespace

const Family<ProductInt8> kTileInt8 = {"tile", offer, run_config};

}  // namespace bnb::cuda::gemm
