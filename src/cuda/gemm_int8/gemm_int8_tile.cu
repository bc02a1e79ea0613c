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
  int warps_m, warps_n;  // of the block
  int m_tiles, n_tiles;  // of 16 rows and of 8 columns per warp
  int stages, per_sm;
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

// ---- operands: rows of a and of b, 16 bytes of a row per copy; zeros past the ends
template <Config c> class Operands {
 public:
  BNB_DEVICE Operands(uint8_t* stages, const int8_t* a, const int8_t* b, const EpilogueInt8& e, int64_t first_row, int64_t first_column)
      : stages_(stages),
        a_(a + first_row * e.k),
        b_(b + first_column * e.k),
        k_(e.k),
        a_rows_left_(e.m - first_row),
        b_rows_left_(e.n - first_column) {}
  BNB_DEVICE void copy(int step) const {
    uint8_t* to = stages_ + step % c.stages * c.stage_bytes();
    copy_rows(a_, c.rows(), a_rows_left_, step, to);
    copy_rows(b_, c.columns(), b_rows_left_, step, to + c.rows() * kPitch);
  }

 private:
  BNB_DEVICE void copy_rows(const int8_t* from, int count, int64_t rows_left, int step, uint8_t* to) const {
    const int copy_row = static_cast<int>(dev::thread()) / 4, copy_column = static_cast<int>(dev::thread()) % 4 * 16;
    const int column = step * kDepth + copy_column, k = static_cast<int>(k_);
    from += copy_row * k_ + column;
    to += copy_row * kPitch + copy_column;
    if (column >= k) rows_left = 0;
    BNB_UNROLL
    for (int i = 0; i < count; i += c.threads() / 4) {
      const bool in = copy_row + i < rows_left;
      if constexpr (c.vectors)
        dev::copy_async<16>(to + i * kPitch, from + i * k_, in ? 16 : 0);
      else
        dev::store_shared(to + i * kPitch, load_bytes<Bits<16>>(reinterpret_cast<const uint8_t*>(from + i * k_), 0, in ? k - column : 0));
    }
  }

  uint8_t* stages_;
  const int8_t *a_, *b_;
  int64_t k_, a_rows_left_, b_rows_left_;
};

// ---- mathematics: a step of k. `a`, `b`: this lane's rows of matrices in the stage.
template <Config c> using Sums = int32_t[c.m_tiles][c.n_tiles][4];

template <Config c> BNB_DEVICE void multiply_step(const uint8_t* a, const uint8_t* b, Sums<c>& sums) {
  BNB_UNROLL
  for (int at = 0; at < kDepth; at += 32) {
    uint32_t left[c.m_tiles][4], right[c.n_tiles / 2][4];
    BNB_UNROLL
    for (int i = 0; i < c.m_tiles; ++i) dev::load_matrices(left[i], a + i * 16 * kPitch + at);
    BNB_UNROLL
    for (int j = 0; j < c.n_tiles / 2; ++j) dev::load_matrices(right[j], b + j * 16 * kPitch + at);
    BNB_UNROLL
    for (int i = 0; i < c.m_tiles; ++i) BNB_UNROLL
    for (int j = 0; j < c.n_tiles; ++j) {
      const uint32_t fragment[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
      dev::mma_s8(sums[i][j], left[i], fragment);
    }
  }
}

// ---- epilogue: sums to shared memory, from where apply_epilogue takes them
template <Config c> BNB_DEVICE void keep_sums(const Sums<c>& sums, int warp_row, int warp_column, int32_t* tile) {
  const int lane = static_cast<int>(dev::lane()), g = lane / 4, t = lane % 4;
  BNB_UNROLL
  for (int i = 0; i < c.m_tiles * c.n_tiles * 2; ++i) {
    const int row = warp_row + i / 2 / c.n_tiles * 16 + i % 2 * 8 + g, column = warp_column + i / 2 % c.n_tiles * 8 + 2 * t;
    const auto& from = sums[i / 2 / c.n_tiles][i / 2 % c.n_tiles];
    dev::store_shared(tile + row * c.sum_pitch() + column,
                      Bits<8>{static_cast<uint32_t>(from[i % 2 * 2]), static_cast<uint32_t>(from[i % 2 * 2 + 1])});
  }
}

template <Config c> BNB_KERNEL(c.threads(), c.per_sm) multiply_tile(const int8_t* a, const int8_t* b, EpilogueInt8 e, int64_t row_blocks) {
  constexpr int kRows = c.rows(), kColumns = c.columns(), kVector = 8;  // columns of y that a thread stores at once
  auto* shared = &dev::shared<uint8_t>();                               // | stages, then the sums of the tile | outliers |
  const int lane = static_cast<int>(dev::lane()), warp = static_cast<int>(dev::warp());
  const int warp_row = warp % c.warps_m * c.m_tiles * 16, warp_column = warp / c.warps_m * c.n_tiles * 8;
  const int64_t first_row = dev::block().x % row_blocks * kRows, first_column = dev::block().x / row_blocks * kColumns;
  const int steps = (static_cast<int>(e.k) + kDepth - 1) / kDepth;

  const Operands<c> operands(shared, a, b, e, first_row, first_column);
  BNB_UNROLL
  for (int i = 0; i < c.stages - 1; ++i) {
    if (i < steps) operands.copy(i);
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
  Sums<c> sums = {};
  BNB_KEEP_LOOP
  for (int step = 0; step < steps; ++step) {
    dev::copy_wait<c.stages - 2>();
    dev::barrier();
    if (step + c.stages - 1 < steps) operands.copy(step + c.stages - 1);
    dev::copy_commit();
    const int offset = step % c.stages * c.stage_bytes();
    multiply_step<c>(a_at + offset, b_at + offset, sums);
  }

  dev::copy_wait<0>();
  dev::barrier();
  auto* tile = reinterpret_cast<int32_t*>(shared);
  keep_sums<c>(sums, warp_row, warp_column, tile);
  dev::barrier();
  const auto sum = [&](int row, int column, int32_t (&to)[kVector]) {
    BNB_UNROLL
    for (int i = 0; i < kVector; i += 4) {
      const auto v = dev::load_shared<Bits<16>>(tile + row * c.sum_pitch() + column + i);
      BNB_UNROLL
      for (int j = 0; j < 4; ++j) to[i + j] = static_cast<int32_t>(v.word[j]);
    }
  };
  constexpr int kTall = std::min(4, kRows / (c.threads() / (kColumns / kVector)));
  apply_epilogue<kRows, kColumns, c.threads(), kTall, kVector>(e, staged, first_row, first_column, sum);
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
