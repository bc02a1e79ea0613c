// gemm_4bit for few rows of a: y = a * W^T, W streamed once through registers into tensor cores.
//
// Reads 1/2 byte per weight and 4 bytes per block of W, each once, and a from the cache. Lower bound: those bytes at memory bandwidth, 0.56
// bytes per weight for blocks of 64. About 2 instructions and half a shared-memory access per weight. More than 32 rows take several
// passes.
//
// 16 rows of W are the A operand of mma, 8 rows of a its B operand. A byte of codes is looked up as a pair of prescaled values; the scale
// multiplies the fp32 sum of its block, not the weights (gemm_4bit.cuh has the error).
//
// A granule is 32 or 64 weights of a row with one scale. The four lanes of an A row hold one granule, a quarter each (halves = 1), or two
// granules, half of one each (halves = 2): then column 4 h + m of B is row m of a for the lanes of granule h and 0 for the others, so that
// loads are twice as wide and the sums of two granules come out side by side.
//
// A warp keeps its 256 columns of a in registers and loops over rows of W. k is spread over warps, whose sums are added in shared memory in
// a fixed order; what exceeds the warps of a block is done in slices, one after another.
#include "cuda/gemm_4bit/gemm_4bit.cuh"

namespace bnb::cuda::gemm {
namespace {

constexpr int kDepth = 256;  // columns of a warp
constexpr int kBatch = 16;   // most items of a block whose sums are kept for the next slice

struct Config {
  int granule, halves;  // weights with one scale; granules side by side in the four lanes of a row
  int tiles;            // of 8 rows of a
  int steps;            // units of a warp that are in flight, and steps between two barriers
  // Every thread has 128 registers, or 256 where more than one tile of a is kept.
  constexpr int warps() const { return tiles == 1 ? 16 : 8; }
  constexpr int threads() const { return warps() * static_cast<int>(dev::kWarp); }
  constexpr int rows() const { return tiles * 8 / halves; }  // of a, at most
  constexpr int chunk() const { return granule * halves; }   // columns that the lanes of a row load at once
  constexpr int chunks() const { return kDepth / chunk(); }
};

struct Split {
  int slices;         // of k
  int k_warps;        // warps of one tile of 16 rows, side by side in k
  int groups;         // tiles processed at once: groups * k_warps <= warps
  int slice_columns;  // k_warps * kDepth
  int rows;           // per item: groups * 16
  int items, blocks;  // of all rows; of the grid
};
Split split_of(int64_t n, int64_t k, int warps, int sms) {
  const int64_t units = ceil_div(k, kDepth), slices = ceil_div(units, warps), k_warps = ceil_div(units, slices), groups = warps / k_warps;
  const int64_t items = ceil_div(n, 16 * groups);
  const int64_t blocks = std::max(std::min<int64_t>(items, sms), slices == 1 ? 0 : ceil_div(items, kBatch));
  const auto i = [](int64_t x) { return static_cast<int>(x); };
  return {i(slices), i(k_warps), i(groups), i(k_warps * kDepth), i(groups * 16), i(items), i(blocks)};
}

// The upper half of a line holds sums of a warp, one register of 32 lanes each.
template <Config c> struct Shared {
  static_assert(2 * c.steps * c.warps() * c.tiles * 4 <= kLines);
  uint8_t lines[kLines][kLine];
  float sums[kBatch][c.tiles * 128];  // of earlier slices

  BNB_DEVICE float& partial(int buffer, int step, int warp, int tile, int i, int lane) {
    return reinterpret_cast<float*>(lines[(((buffer * c.steps + step) * c.warps() + warp) * c.tiles + tile) * 4 + i])[dev::kWarp + lane];
  }
};

// ---- the order of work: all items of a slice, then the next slice. An item is `groups` adjacent tiles of 16 rows; a block takes every
// `blocks`-th item.
struct Cursor {
  int left, item, row, column;  // steps, item of the slice, this lane's first row, the warp's first column
};
struct Schedule {
  int count;        // items of the block in a slice
  int row_step;     // rows from one item to the next
  int column_step;  // columns from one slice to the next

  BNB_DEVICE explicit Schedule(const Split& split)
      : count((split.items - static_cast<int>(dev::block().x) + split.blocks - 1) / split.blocks),
        row_step(split.blocks * split.rows),
        column_step(split.slice_columns) {}
  BNB_DEVICE void advance(Cursor& at) const {
    at.left -= 1;
    at.item += 1;
    at.row += row_step;
    if (at.item == count) {
      at.item = 0;
      at.row -= count * row_step;
      at.column += column_step;
    }
  }
  BNB_DEVICE Cursor ahead(Cursor at, int by) const {
    BNB_UNROLL
    for (int i = 0; i < by; ++i) advance(at);
    return at;
  }
};

// ---- operand W: a lane's codes and scales of a warp's 256 columns of 16 rows
template <Config c> struct Unit {
  static constexpr int kWords = c.chunk() / 32;          // per lane and row
  static constexpr int kSlots = kDepth / c.granule / 4;  // scales per lane and row
  uint32_t codes[2][c.chunks()][kWords] = {}, scale[2][kSlots];

  // The first weight of a lane's row, and the block of a scale. Rows past the end are computed and dropped.
  BNB_DEVICE static uint64_t begin_of(const Weight4bit& w, int row, int half) {
    const auto r = static_cast<uint32_t>(row) + half * 8, last = static_cast<uint32_t>(w.n) - 1;
    return static_cast<uint64_t>(r < last ? r : last) * static_cast<uint32_t>(w.k);
  }
  BNB_DEVICE static int64_t block_of(const Weight4bit& w, uint64_t begin, int column, int slot) {
    const uint32_t at = static_cast<uint32_t>(column) + (slot * 4 + dev::lane() % 4) * c.granule;
    return static_cast<int64_t>((begin + (at < static_cast<uint32_t>(w.k) ? at : 0)) >> w.log2_block);
  }

  struct Source {
    const uint8_t* codes[2];
    int left;  // columns from the lane's first on
  };
  BNB_DEVICE Source begin(const Weight4bit& w, const Scales& scales, const Cursor& at) {
    const int lane_column = at.column + static_cast<int>(dev::lane()) % 4 * (c.chunk() / 4);
    Source from;
    BNB_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint64_t first = begin_of(w, at.row, half);
      from.codes[half] = w.codes + (first + static_cast<uint32_t>(lane_column)) / 2;
      BNB_UNROLL
      for (int i = 0; i < kSlots; ++i) scale[half][i] = scales.fetch(block_of(w, first, at.column, i));
    }
    from.left = at.left > 0 ? static_cast<int>(w.k) - lane_column : 0;
    return from;
  }
  // Past k a lane keeps old codes and any scale of the row: a is 0 there.
  BNB_DEVICE void load(const Source& from, int half, int chunk) {
    if (chunk * c.chunk() >= from.left) return;
    using Wide = Bits<kWords * 4>;
    const void* at = from.codes[half] + chunk * (c.chunk() / 2);
    const Wide v = kWords == 1 ? dev::load_const<Wide>(at) : dev::load_once<Wide>(at);
    BNB_UNROLL
    for (int i = 0; i < kWords; ++i) codes[half][chunk][i] = v.word[i];
  }
  BNB_DEVICE void load_all(const Source& from) {
    BNB_UNROLL
    for (int i = 0; i < 2 * c.chunks(); ++i) load(from, i % 2, i / 2);
  }
  // `cursor()` is asked for only where scales are nested.
  template <class F> BNB_DEVICE void decode_scales(const Weight4bit& w, const Scales& scales, F&& cursor, float (&to)[2][kSlots]) const {
    BNB_UNROLL
    for (int i = 0; i < 2 * kSlots; ++i)
      to[i % 2][i / 2] = scales.decode(scale[i % 2][i / 2], [&] {
        const Cursor at = cursor();
        return block_of(w, begin_of(w, at.row, i % 2), at.column, i / 2);
      });
  }
};

// ---- operand a: the warp's 256 columns of all rows, in W's order of columns; zeros past m and k
template <Config c> using Activations = uint32_t[c.tiles][kDepth / 16][2];

template <class T, Config c> BNB_DEVICE void load_activations(const T* a, int m, int k, int column, Activations<c>& x) {
  const int lane = static_cast<int>(dev::lane()), g = lane / 4, t = lane % 4;
  BNB_UNROLL
  for (int tile = 0; tile < c.tiles; ++tile) {
    const int row = c.halves == 1 ? tile * 8 + g : tile * 4 + g % 4, at = column + t * (c.chunk() / 4);
    const int left = row < m && (c.halves == 1 || g / 4 == t / 2) ? k - at : 0;
    const T* from = a + static_cast<int64_t>(row) * k + at;
    BNB_UNROLL
    for (int i = 0; i < kDepth / 32; ++i) {
      const int chunk = i * 32 / c.chunk() * c.chunk();
      Bits<16> v = {};
      if (chunk < left) v = dev::load_const<Bits<16>>(from + chunk + i % (c.chunk() / 32) * 8);
      x[tile][2 * i][0] = v.word[0];
      x[tile][2 * i][1] = v.word[1];
      x[tile][2 * i + 1][0] = v.word[2];
      x[tile][2 * i + 1][1] = v.word[3];
    }
  }
}

// ---- mathematics of a step: sums of each granule by mma, times its scale. Codes already used are replaced by those of `next`.
template <class T, Config c>
BNB_DEVICE void multiply_unit(Unit<c>& u, const typename Unit<c>::Source& next, const uint8_t* lines, const Activations<c>& x,
                              const float (&scale)[2][Unit<c>::kSlots], float (&total)[c.tiles][4]) {
  const int lane = static_cast<int>(dev::lane()), t = lane % 4;
  const uint32_t lane_offset = PrescaledPairs<T>::lane_offset();
  BNB_UNROLL
  for (int chunk = 0; chunk < c.chunks(); ++chunk) {
    float d[c.tiles][4] = {};
    BNB_UNROLL
    for (int i = 0; i < c.chunk() / 16; ++i) {
      uint32_t pairs[4];
      BNB_UNROLL
      for (int j = 0; j < 4; ++j) pairs[j] = PrescaledPairs<T>::pair(lines, u.codes[j % 2][chunk][i / 2], i % 2 * 2 + j / 2, lane_offset);
      BNB_UNROLL
      for (int tile = 0; tile < c.tiles; ++tile) dev::mma<T>(d[tile], pairs, x[tile][chunk * (c.chunk() / 16) + i]);
    }
    const int first_granule = chunk * c.halves;
    const unsigned owner = static_cast<unsigned>(lane - t + first_granule % 4 + (c.halves == 2 ? t / 2 : 0));
    BNB_UNROLL
    for (int half = 0; half < 2; ++half) {
      const float by = dev::shuffle(scale[half][first_granule / 4], owner);
      BNB_UNROLL
      for (int tile = 0; tile < c.tiles; ++tile) BNB_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; ++i) total[tile][i] = dev::fma(d[tile][i], by, total[tile][i]);
      u.load(next, half, chunk);
    }
  }
}

// ---- epilogue: sums of warps to shared memory, added there in a fixed order, over slices too; then y = T(sum / prescale + bias)
template <Config c> BNB_DEVICE void keep_sums(Shared<c>& s, int buffer, int step, int m, const float (&total)[c.tiles][4]) {
  const int lane = static_cast<int>(dev::lane()), warp = static_cast<int>(dev::warp()), t = lane % 4;
  BNB_UNROLL
  for (int i = 0; i < c.tiles * 4; ++i)
    if ((c.halves == 1 ? i / 4 * 8 + 2 * t : 2 * t % 4) + i % 2 < m)
      s.partial(buffer, step, warp, i / 4, i % 4, lane) = total[i / 4][i % 4];
}

template <class T, Config c>
BNB_DEVICE void store_sums(Shared<c>& s, int buffer, const Schedule& schedule, const Cursor& now, const Split& split, const Weight4bit& w,
                           int m, const Epilogue4bit& epilogue) {
  const int first = static_cast<int>(dev::block().x), n = static_cast<int>(w.n);
  BNB_KEEP_LOOP
  for (int p = static_cast<int>(dev::thread()); p < split.groups * c.tiles * 128; p += c.threads()) {
    const int at = p % 32, i = p / 32 % 4, tile = p / 128 % c.tiles, group = p / (128 * c.tiles);
    const int row_of_a = tile * 8 + at % 4 * 2 + i % 2;
    if (row_of_a >= m || (c.halves == 2 && at % 4 >= 2)) continue;
    Cursor cursor = now;
    BNB_KEEP_LOOP
    for (int step = 0; step < c.steps && cursor.left > 0; ++step, schedule.advance(cursor)) {
      float sum = 0;
      BNB_KEEP_LOOP
      for (int j = group * split.k_warps; j < (group + 1) * split.k_warps; ++j) {
        sum = dev::add(sum, s.partial(buffer, step, j, tile, i, at));
        if constexpr (c.halves == 2) sum = dev::add(sum, s.partial(buffer, step, j, tile, i, at + 2));
      }
      if (split.slices > 1) {  // one group: p counts within the item
        if (cursor.left <= schedule.count * (split.slices - 1)) sum = dev::add(s.sums[cursor.item][p], sum);
        s.sums[cursor.item][p] = sum;
        if (cursor.left > schedule.count) continue;
      }
      const int row = (first + cursor.item * split.blocks) * split.rows + group * 16 + i / 2 * 8 + at / 4;
      if (row < n)
        static_cast<T*>(epilogue.y)[row_of_a * w.n + row] =
            dev::round_to<T>(dev::add(dev::mul(sum, kPrescaled<T>.inverse[static_cast<int>(w.type)]), bias_at(epilogue, row)));
    }
  }
}

template <class T, Config c> BNB_KERNEL(c.threads(), 1) multiply(Weight4bit w, const T* a, int m, Epilogue4bit epilogue, Split split) {
  if constexpr (dev::kArch >= 80) {
    auto& s = dev::shared<Shared<c>>();
    const int warp = static_cast<int>(dev::warp()), group = warp / split.k_warps, part = warp % split.k_warps;
    const int k = static_cast<int>(w.k);
    const Scales scales(w);
    const Schedule schedule(split);
    const Cursor start = {.left = schedule.count * split.slices,
                          .item = 0,
                          .row = static_cast<int>(dev::block().x) * split.rows + group * 16 + static_cast<int>(dev::lane()) / 4,
                          .column = group < split.groups ? part * kDepth : k};

    Unit<c> unit[c.steps];
    BNB_UNROLL
    for (int step = 0; step < c.steps; ++step) unit[step].load_all(unit[step].begin(w, scales, schedule.ahead(start, step)));
    Activations<c> x;
    load_activations<T, c>(a, m, k, start.column, x);
    PrescaledPairs<T>::fill_table(s.lines[0], w.type);
    dev::barrier();

    int buffer = 0;
    for (Cursor now = start; now.left > 0; now = schedule.ahead(now, c.steps), buffer ^= 1) {
      BNB_UNROLL
      for (int step = 0; step < c.steps; ++step) {
        if (step >= now.left) break;
        Unit<c>& u = unit[step];
        float scale[2][Unit<c>::kSlots];
        u.decode_scales(w, scales, [&] { return schedule.ahead(now, step); }, scale);
        const auto next = u.begin(w, scales, schedule.ahead(now, step + c.steps));
        float total[c.tiles][4] = {};
        multiply_unit<T, c>(u, next, s.lines[0], x, scale, total);
        keep_sums<c>(s, buffer, step, m, total);
        const Cursor follows = schedule.ahead(now, step + 1);
        if (follows.item == 0 && follows.left > 0) load_activations<T, c>(a, m, k, follows.column, x);
      }
      dev::barrier();  // none is needed after the sums are read: the next ones go to the other buffer
      store_sums<T, c>(s, buffer, schedule, now, split, w, m, epilogue);
    }
  }
}

// Up to four rows of a with loads of twice the width; then one, two or four tiles of eight.
constexpr Config kConfigs[] = {{64, 2, 1, 2}, {64, 1, 1, 2}, {64, 1, 2, 2}, {64, 1, 4, 1},
                               {32, 2, 1, 1}, {32, 1, 1, 1}, {32, 1, 2, 2}, {32, 1, 4, 1}};
constexpr int64_t kMostRows = 128;  // in passes of 32;

std::string describe_config(const Plan& p) {
  const Config& c = kConfigs[p.config];
  return std::to_string(c.rows()) + " rows per pass, scales of " + std::to_string(c.granule) + ", loads of " +
         std::to_string(c.granule * c.halves / 8) + " bytes";
}

void offer(const Gemm4bit& d, const dev::Device& device, std::vector<Plan>& plans) {
  if (device.arch < 80 || d.batch_invariant || d.m > kMostRows || !fits_tensor_cores(d, device)) return;
  const Rates rates = rates_of(device.arch);
  for (size_t i = 0; i < std::size(kConfigs); ++i) {
    const Config& c = kConfigs[i];
    const Split split = split_of(d.n, d.k, c.warps(), device.sms);
    if ((d.m > c.rows() && c.tiles < 4) || d.blocksize % c.granule != 0 || d.k % c.granule != 0) continue;
    const int64_t steps = ceil_div(split.items, split.blocks) * split.slices * ceil_div(split.blocks, device.sms);
    // A step of a warp: 64 lines of shared memory, one per clock, and its sums; 2 KiB of W, slower with narrow loads.
    const int warps = split.k_warps * split.groups, bytes = c.granule * c.halves / 8;
    const double lines = warps * (64.0 + 8 * c.tiles), products = warps * 16.0 * kDepth * 8 * c.tiles / rates.mma;
    const double loads = warps * 2048 / rates.l2_bytes * load_factor(bytes);
    const auto passes = static_cast<double>(ceil_div(d.m, c.rows()));
    plans.push_back({.config = static_cast<int>(i),
                     .clocks = passes * (kLaunchClocks + static_cast<double>(steps) * std::max({lines, loads, products})) + 16.0 / bytes,
                     .describe = describe_config});
  }
}

void run_config(const Plan& p, const Gemm4bit& d, void*, Stream stream) {
  const auto launch = [&]<class T, Config c> {
    const Split split = split_of(d.n, d.k, c.warps(), dev::device().sms);
    for (int64_t row = 0; row < d.m; row += c.rows()) {
      Epilogue4bit epilogue = epilogue_of(d);
      epilogue.y = static_cast<T*>(epilogue.y) + row * d.n;
      dev::launch({.op = "gemm_4bit",
                   .dtype = d.a.dtype,
                   .shape = {d.m, d.n, d.k},
                   .grid = {static_cast<uint32_t>(split.blocks)},
                   .threads = static_cast<uint32_t>(c.threads()),
                   .shared = sizeof(Shared<c>),
                   .stream = stream},
                  multiply<T, c>, weight_of(d), static_cast<const T*>(d.a.data) + row * d.k,
                  static_cast<int>(std::min<int64_t>(d.m - row, c.rows())), epilogue, split);
    }
  };
  const auto launch_type = [&]<class T>(T) { with_config<kConfigs>(p.config, [&]<Config c> { launch.template operator()<T, c>(); }); };
  d.a.dtype == DType::f16 ? launch_type(Half{}) : launch_type(BFloat16{});
}

}  // namespace

const Family<Gemm4bit> kRows4bit = {"rows", offer, run_config};

}  // namespace bnb::cuda::gemm
