// gemm_4bit on tensor cores for many rows of a: tiles of y, W decoded in registers and fed to mma, a through shared memory.
//
// A block computes `warps * row_tiles * 16` columns by `tiles * 8` rows of y. Each warp has its own rows of W, so that a block decodes each
// weight once; they are the A operand. Of a row of W and 64 columns of k the lanes t = 0..3 take 16 columns each, 8 bytes: mma step s has
// columns 16 t + 4 s .. + 3 of lane t, and a is read in that order, 16 bytes per lane. Codes are loaded into registers some steps ahead, a
// by asynchronous copies into `kStages` buffers.
//
// Reads W once per `tiles * 8` rows of a, and all of a once per block of columns. Lower bound: 2 m n k operations of the tensor cores.
//
// Two ways to decode. Exact: w = T(value * absmax), as dequantize_4bit gives. Sums are added in order of k, so a row of y depends neither
// on m nor on the tile. Prescaled: values rounded to T, absmax multiplies the fp32 sum of a block (gemm_4bit.cuh has the error), which
// takes less than half the instructions per weight.
#include <type_traits>

#include "cuda/gemm_4bit/gemm_4bit.cuh"

namespace bnb::cuda::gemm {
namespace {

constexpr int kDepth = 64, kStages = 3, kPitch = kDepth * 2 + 16;  // columns per step; bytes per row of a, padded so that banks differ

constexpr int table_bytes(int arch) { return arch >= 80 ? kLines * kLine : 0; }

// w of two codes. A line holds both values as floats, 8 bytes per lane; without the shared memory for that (sm_75) a lane holds value
// lane % 16 and a shuffle is the lookup.
template <class T> struct ExactDecoder {
  static constexpr bool kShuffle = table_bytes(dev::kArch) == 0;
  const uint8_t* lines;
  uint32_t lane_offset;
  float value;

  BNB_DEVICE ExactDecoder(uint8_t* to, QuantType type) : lines(to), lane_offset(dev::lane() * 8) {
    const float* values = kCodebooks.values[static_cast<int>(type)];
    value = values[dev::lane() % 16];
    if constexpr (!kShuffle)
      for (unsigned i = dev::thread(); i < kLines * 16; i += dev::threads()) {
        const uint32_t high = dev::float_bits(values[i / 256]), low = dev::float_bits(values[i / 16 % 16]);
        dev::store_shared(to + i / 16 * kLine + i % 16 * 16, Bits<16>{high, low, high, low});
      }
  }
  BNB_DEVICE uint32_t operator()(uint32_t codes, int byte, float scale) const {
    float first, second;
    if constexpr (kShuffle) {
      first = dev::shuffle(value, codes >> (byte * 8 + 4));
      second = dev::shuffle(value, codes >> byte * 8);
    } else {
      const auto both = dev::load_shared<Bits<8>>(lines + line_address(codes, byte, lane_offset));
      first = dev::bits_float(both.word[0]);
      second = dev::bits_float(both.word[1]);
    }
    return dev::pack<T>(dev::mul(first, scale), dev::mul(second, scale));
  }
};

// The prescaled values of two codes.
template <class T> class PrescaledDecoder {
 public:
  BNB_DEVICE PrescaledDecoder(uint8_t* table, QuantType type) : table_(table), lane_offset_(PrescaledPairs<T>::lane_offset()) {
    PrescaledPairs<T>::fill_table(table, type);
  }
  BNB_DEVICE uint32_t operator()(uint32_t codes, int byte, float) const {
    return PrescaledPairs<T>::pair(table_, codes, byte, lane_offset_);
  }

 private:
  const uint8_t* table_;
  uint32_t lane_offset_;
};

template <class T, bool exact> using Decoder = std::conditional_t<exact, ExactDecoder<T>, PrescaledDecoder<T>>;

struct Config {
  int warps;
  int row_tiles;  // of 16 rows of W per warp
  int tiles;      // of 8 rows of a
  bool exact;
  constexpr int threads() const { return warps * static_cast<int>(dev::kWarp); }
  constexpr int columns() const { return warps * row_tiles * 16; }
  constexpr int rows() const { return tiles * 8; }
  constexpr int stage_bytes() const { return rows() * kPitch; }
  constexpr int out_pitch() const { return columns() + 8; }  // elements of a row of the tile of y in shared memory
  // Steps that codes are loaded before their use: with many tiles a step takes longer.
  constexpr int ahead() const { return tiles > 4 ? 1 : 3; }
  // A step is four mma along k. Weights are decoded for several of them at once, as many as registers allow.
  constexpr int passes() const { return exact || tiles > 4 ? 2 : 1; }
  constexpr int mma_per_pass() const { return 4 / passes(); }
  uint32_t shared(int arch) const {
    return static_cast<uint32_t>(std::max(table_bytes(arch) + kStages * stage_bytes(), rows() * out_pitch() * 2));
  }
};

struct KSplit {
  int splits, steps_per_split, steps;  // of k; steps of 64 columns
  float* sums;                         // splits x m x n, if there are more than one
};

// What a block and a thread have of the product.
template <Config c> struct Position {
  int warp, g, t;               // g, t: lane / 4 and lane % 4, as in fragments of mma
  int first_row, first_column;  // of the block's tile of y
  int split, begin, end;        // the block's steps of k

  BNB_DEVICE explicit Position(const KSplit& k) {
    const int lane = static_cast<int>(dev::lane());
    warp = static_cast<int>(dev::warp());
    g = lane / 4;
    t = lane % 4;
    split = static_cast<int>(dev::block().z);
    first_row = static_cast<int>(dev::block().x) * c.rows();
    first_column = static_cast<int>(dev::block().y) * c.columns();
    begin = split * k.steps_per_split;
    end = begin + k.steps_per_split < k.steps ? begin + k.steps_per_split : k.steps;
  }
  // Where sum j of a 16 x 8 tile of mma is in the block's tile of y.
  BNB_DEVICE int column(int row_tile, int j) const { return (warp * c.row_tiles + row_tile) * 16 + j / 2 * 8 + g; }
  BNB_DEVICE int row(int tile, int j) const { return tile * 8 + 2 * t + j % 2; }
};

// ---- operand W: codes and scales of a warp's rows, loaded `ahead` steps before their use
template <Config c> class WeightOperand {
 public:
  BNB_DEVICE WeightOperand(const Weight4bit& w, const Position<c>& at)
      : w_(w), scales_(w), n_(static_cast<int>(w.n)), k_(static_cast<int>(w.k)), t_(at.t), end_(at.end) {
    first_row_ = at.first_column + at.warp * c.row_tiles * 16 + at.g;
  }
  BNB_DEVICE void load(int ring, int step) {
    if (step >= end_) return;
    const auto at = static_cast<uint32_t>(lane_column(step));
    BNB_UNROLL
    for (int i = 0; i < c.row_tiles * 2; ++i) {
      const uint64_t from = row_begin(i) + at;
      const auto v = dev::load_once<Bits<8>>(w_.codes + from / 2);
      codes_[ring][i / 2][i % 2][0] = v.word[0];
      codes_[ring][i / 2][i % 2][1] = v.word[1];
      fetched_[ring][i / 2][i % 2] = scales_.fetch(static_cast<int64_t>(from >> w_.log2_block));
    }
  }
  BNB_DEVICE void decode_scales(int ring, int step, float (&scale)[c.row_tiles][2]) const {
    BNB_UNROLL
    for (int i = 0; i < c.row_tiles * 2; ++i)
      scale[i / 2][i % 2] = scales_.decode(fetched_[ring][i / 2][i % 2], [&] {
        return static_cast<int64_t>((row_begin(i) + static_cast<uint32_t>(lane_column(step))) >> w_.log2_block);
      });
  }
  // Eight codes of the lane's row `half` (0, 1) of a tile.
  BNB_DEVICE uint32_t word(int ring, int row_tile, int half, int i) const { return codes_[ring][row_tile][half][i]; }

 private:
  // The first weight of one of the lane's rows. Rows past the end are computed and dropped.
  BNB_DEVICE uint64_t row_begin(int i) const {
    const int row = first_row_ + i * 8;
    return static_cast<uint64_t>(static_cast<uint32_t>(row < n_ ? row : n_ - 1)) * static_cast<uint32_t>(k_);
  }
  // Past k the codes and the scale of column 0 are used: a is 0 there.
  BNB_DEVICE int lane_column(int step) const {
    const int at = step * kDepth + t_ * 16;
    return at < k_ ? at : 0;
  }

  const Weight4bit& w_;
  Scales scales_;
  int n_, k_, t_, end_, first_row_;
  uint32_t codes_[c.ahead()][c.row_tiles][2][2] = {}, fetched_[c.ahead()][c.row_tiles][2] = {};
};

// ---- operand a: 16 bytes of a row per asynchronous copy into the stages; nothing is read past m and k, zeros are written
template <class T, Config c> class ActivationOperand {
 public:
  BNB_DEVICE ActivationOperand(uint8_t* stages, const T* a, int m, int k, const Position<c>& at)
      : stages_(stages),
        k_(k),
        rows_left_(m - at.first_row - copy_row()),
        from_(a + static_cast<int64_t>(at.first_row + copy_row()) * k + copy_column()),
        lane_offset_(at.g * kPitch + at.t * 32) {}
  BNB_DEVICE void copy(int step) const {
    constexpr int kCopyRows = c.threads() / 8;  // rows at a time
    uint8_t* to = stages_ + step % kStages * c.stage_bytes() + copy_row() * kPitch + copy_column() * 2;
    const T* from = from_ + step * kDepth;
    const int rows_left = step * kDepth + copy_column() < k_ ? rows_left_ : 0;
    BNB_UNROLL
    for (int i = 0; i < c.rows(); i += kCopyRows, from += static_cast<int64_t>(kCopyRows) * k_)
      if (c.rows() % kCopyRows == 0 || copy_row() + i < c.rows()) dev::copy_async<16>(to + i * kPitch, from, i < rows_left ? 16 : 0);
  }
  // This lane's part of a stage, for load().
  BNB_DEVICE const uint8_t* lane_rows(int step) const { return stages_ + step % kStages * c.stage_bytes() + lane_offset_; }
  BNB_DEVICE static void load(const uint8_t* rows, int tile, int pass, uint32_t (&fragments)[c.mma_per_pass()][2]) {
    BNB_UNROLL
    for (int j = 0; j < c.mma_per_pass(); j += 2) {
      const auto v = dev::load_shared<Bits<16>>(rows + tile * 8 * kPitch + (pass * c.mma_per_pass() + j) * 8);
      fragments[j][0] = v.word[0];
      fragments[j][1] = v.word[1];
      fragments[j + 1][0] = v.word[2];
      fragments[j + 1][1] = v.word[3];
    }
  }

 private:
  BNB_DEVICE static int copy_row() { return static_cast<int>(dev::thread() / 8); }
  BNB_DEVICE static int copy_column() { return static_cast<int>(dev::thread() % 8 * 8); }

  uint8_t* stages_;
  int k_, rows_left_;
  const T* from_;
  int lane_offset_;
};

// ---- mathematics: one step of k
template <Config c> using Sums = float[c.row_tiles][c.tiles][4];
template <Config c> using WeightFragments = uint32_t[c.row_tiles][c.mma_per_pass()][4];

template <class T, Config c>
BNB_DEVICE void decode(const Decoder<T, c.exact>& decoder, const WeightOperand<c>& w, int ring, int pass,
                       const float (&scale)[c.row_tiles][2], WeightFragments<c>& fragments) {
  BNB_UNROLL
  for (int i = 0; i < c.row_tiles * c.mma_per_pass() * 4; ++i) {
    const int r = i / 4 / c.mma_per_pass(), j = i / 4 % c.mma_per_pass(), at = pass * c.mma_per_pass() + j;
    fragments[r][j][i % 4] = decoder(w.word(ring, r, i % 2, at / 2), at % 2 * 2 + i / 2 % 2, scale[r][i % 2]);
  }
}

// Exact weights include their scale. Prescaled ones do not: it multiplies the sums of a step, which lie in one block of 64 or more weights.
template <class T, Config c>
BNB_DEVICE void multiply_pass(const uint8_t* a_rows, int pass, const WeightFragments<c>& weights, const float (&scale)[c.row_tiles][2],
                              Sums<c>& sums) {
  BNB_UNROLL
  for (int tile = 0; tile < c.tiles; ++tile) {
    uint32_t a[c.mma_per_pass()][2];
    ActivationOperand<T, c>::load(a_rows, tile, pass, a);
    BNB_UNROLL
    for (int i = 0; i < c.row_tiles; ++i)
      if constexpr (c.exact) {
        BNB_UNROLL
        for (int j = 0; j < c.mma_per_pass(); ++j) dev::mma<T>(sums[i][tile], weights[i][j], a[j]);
      } else {
        float d[4] = {};
        BNB_UNROLL
        for (int j = 0; j < c.mma_per_pass(); ++j) dev::mma<T>(d, weights[i][j], a[j]);
        BNB_UNROLL
        for (int j = 0; j < 4; ++j) sums[i][tile][j] = dev::fma(d[j], scale[i][j / 2], sums[i][tile][j]);
      }
  }
}

// ---- epilogue: raw sums of a split; or y = T(sum * factor + bias), through shared memory so that stores are whole rows
template <Config c> BNB_DEVICE void store_split(const KSplit& k_split, const Position<c>& at, const Sums<c>& sums, int m, int n) {
  BNB_UNROLL
  for (int i = 0; i < c.row_tiles * c.tiles * 4; ++i) {
    const int r = i / 4 / c.tiles, tile = i / 4 % c.tiles, row = at.first_row + at.row(tile, i % 4),
              column = at.first_column + at.column(r, i % 4);
    if (row < m && column < n) k_split.sums[(static_cast<int64_t>(at.split) * m + row) * n + column] = sums[r][tile][i % 4];
  }
}

template <class T, Config c>
BNB_DEVICE void round_sums(const Position<c>& at, const Sums<c>& sums, const Epilogue4bit& epilogue, QuantType type, int n, T* tile_of_y) {
  BNB_UNROLL
  for (int i = 0; i < c.row_tiles; ++i) BNB_UNROLL
  for (int j = 0; j < 4; j += 2) {
    const int column = at.first_column + at.column(i, j);
    const float bias = column < n ? bias_at(epilogue, column) : 0;
    BNB_UNROLL
    for (int tile = 0; tile < c.tiles; ++tile) BNB_UNROLL
    for (int h = 0; h < 2; ++h) {
      const float factor = c.exact ? 1.0f : kPrescaled<T>.inverse[static_cast<int>(type)];
      const float sum = c.exact ? sums[i][tile][j + h] : dev::mul(sums[i][tile][j + h], factor);
      tile_of_y[at.row(tile, h) * c.out_pitch() + at.column(i, j)] = dev::round_to<T>(dev::add(sum, bias));
    }
  }
}

template <class T, Config c> BNB_DEVICE void store_rows(const Position<c>& at, const T* tile_of_y, T* y, int m, int n) {
  constexpr int kVectors = c.columns() / 8;  // of a row
  const bool whole = n % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
  BNB_KEEP_LOOP
  for (int p = static_cast<int>(dev::thread()); p < c.rows() * kVectors; p += c.threads()) {
    const int row = p / kVectors, column = p % kVectors * 8;
    if (at.first_row + row >= m) break;
    T* to = y + static_cast<int64_t>(at.first_row + row) * n + at.first_column + column;
    const T* values = tile_of_y + row * c.out_pitch() + column;
    if (whole && at.first_column + column < n)
      dev::store(to, dev::load_shared<Bits<16>>(values));
    else
      for (int i = 0; i < 8 && at.first_column + column + i < n; ++i) to[i] = values[i];
  }
}

template <class T, Config c> BNB_KERNEL(c.threads(), 1) multiply(Weight4bit w, const T* a, int m, Epilogue4bit epilogue, KSplit k_split) {
  if constexpr (dev::kHasMma<T> && (c.exact || dev::kArch >= 80)) {
    auto* shared = &dev::shared<uint8_t>();  // | table of codes | stages of a |, then the tile of y
    const int n = static_cast<int>(w.n);
    const Position<c> at(k_split);
    WeightOperand<c> weights(w, at);
    const ActivationOperand<T, c> activations(shared + table_bytes(dev::kArch), a, m, static_cast<int>(w.k), at);

    BNB_UNROLL
    for (int i = 0; i < c.ahead(); ++i) weights.load(i, at.begin + i);
    BNB_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      if (at.begin + i < at.end) activations.copy(at.begin + i);
      dev::copy_commit();
    }
    const Decoder<T, c.exact> decoder(shared, w.type);

    Sums<c> sums = {};
    for (int base = at.begin; base < at.end; base += c.ahead()) {
      BNB_UNROLL
      for (int ring = 0; ring < c.ahead(); ++ring) {
        const int step = base + ring;
        if (step >= at.end) break;
        dev::copy_wait<kStages - 2>();
        dev::barrier();
        if (step + kStages - 1 < at.end) activations.copy(step + kStages - 1);
        dev::copy_commit();

        float scale[c.row_tiles][2];
        weights.decode_scales(ring, step, scale);
        const uint8_t* a_rows = activations.lane_rows(step);
        BNB_UNROLL
        for (int pass = 0; pass < c.passes(); ++pass) {
          WeightFragments<c> fragments;
          decode<T, c>(decoder, weights, ring, pass, scale, fragments);
          if (pass == c.passes() - 1) weights.load(ring, step + c.ahead());
          multiply_pass<T, c>(a_rows, pass, fragments, scale, sums);
        }
      }
    }

    if (k_split.splits > 1) return store_split<c>(k_split, at, sums, m, n);
    auto* tile_of_y = reinterpret_cast<T*>(shared);
    dev::barrier();
    round_sums<T, c>(at, sums, epilogue, w.type, n, tile_of_y);
    dev::barrier();
    store_rows<T, c>(at, tile_of_y, static_cast<T*>(epilogue.y), m, n);
  }
}

// y = T((sum over splits, in order) * factor + bias)
template <class T> BNB_KERNEL(256, 4) add_splits(const float* sums, int splits, int64_t m, int64_t n, float factor, Epilogue4bit epilogue) {
  for (int64_t i = int64_t{dev::block().x} * 256 + dev::thread(); i < m * n; i += int64_t{dev::grid().x} * 256) {
    float sum = 0;
    for (int split = 0; split < splits; ++split) sum = dev::add(sum, sums[split * m * n + i]);
    static_cast<T*>(epilogue.y)[i] = dev::round_to<T>(dev::add(dev::mul(sum, factor), bias_at(epilogue, i % n)));
  }
}

constexpr Config kConfigs[] = {{16, 1, 4, false}, {16, 1, 8, false}, {16, 1, 4, true}, {16, 1, 8, true}, {8, 2, 16, true}};

std::string describe_config(const Plan& p) {
  const Config& c = kConfigs[p.config];
  return std::to_string(c.rows()) + " x " + std::to_string(c.columns()) + " x 64, " + std::to_string(c.warps) + " warps, " +
         std::to_string(kStages) + " stages, " + (c.exact ? "exact" : "prescaled") + " weights, k in " + std::to_string(p.splits);
}

void offer(const Gemm4bit& d, const dev::Device& device, std::vector<Plan>& plans) {
  if (!fits_tensor_cores(d, device)) return;
  const Rates rates = rates_of(device.arch);
  for (size_t i = 0; i < std::size(kConfigs); ++i) {
    const Config& c = kConfigs[i];
    if (c.shared(device.arch) > device.shared_bytes || (!c.exact && d.batch_invariant)) continue;
    if (ceil_div(d.n, c.columns()) > 65535) continue;
    if (!c.exact && (d.blocksize % 64 != 0 || d.k % 64 != 0 || device.arch < 80)) continue;
    const int64_t tiles = ceil_div(d.m, c.rows()) * ceil_div(d.n, c.columns()), steps = ceil_div(d.k, kDepth);
    // A step: products, lines of shared memory, bytes from L2.
    const double weights = c.columns() * kDepth, lines = weights / 64 * (c.exact ? 2 : 1) + c.warps * c.tiles * 8 + c.rows();
    const double step =
        kTileOverhead * std::max({weights * c.rows() / rates.mma, lines, (weights / 2 + c.rows() * kDepth * 2) / rates.l2_bytes});
    for (int splits = 1; splits <= 16 && (splits == 1 || (steps >= 4 * splits && !d.batch_invariant)); splits *= 2) {
      if (tiles * splits > INT32_MAX || (splits > 1 && tiles * splits > 2 * device.sms)) break;
      const double rounds = static_cast<double>(ceil_div(tiles * splits, device.sms)), sums = static_cast<double>(d.m * d.n) * 4 * splits;
      const double second = splits == 1 ? 0 : kLaunchClocks + 2 * sums / (device.sms * rates.l2_bytes);
      plans.push_back({.config = static_cast<int>(i),
                       .splits = splits,
                       .workspace = splits == 1 ? 0 : static_cast<int64_t>(sums),
                       .clocks = kLaunchClocks + rounds * (kTileClocks + step * static_cast<double>(ceil_div(steps, splits))) + second,
                       .describe = describe_config});
    }
  }
}

void run_config(const Plan& p, const Gemm4bit& d, void* workspace, Stream stream) {
  const auto m = static_cast<int>(d.m);
  const Epilogue4bit epilogue = epilogue_of(d);
  dev::Launch l = {.op = "gemm_4bit", .dtype = d.a.dtype, .shape = {d.m, d.n, d.k}, .stream = stream};
  const auto launch = [&]<class T, Config c> {
    const auto steps = static_cast<int>(ceil_div(d.k, kDepth));
    const KSplit k_split = {p.splits, static_cast<int>(ceil_div(steps, p.splits)), steps, static_cast<float*>(workspace)};
    l.grid = {static_cast<uint32_t>(ceil_div(d.m, c.rows())), static_cast<uint32_t>(ceil_div(d.n, c.columns())),
              static_cast<uint32_t>(p.splits)};
    l.threads = static_cast<uint32_t>(c.threads());
    l.shared = c.shared(dev::device().arch);
    dev::launch(l, multiply<T, c>, weight_of(d), static_cast<const T*>(d.a.data), m, epilogue, k_split);
    if (p.splits == 1) return;
    l.grid = {static_cast<uint32_t>(std::min<int64_t>(ceil_div(d.m * d.n, 256), int64_t{16} * dev::device().sms))};
    l.threads = 256;
    l.shared = 0;
    constexpr Values prescale = prescaled<T>();
    const float factor = c.exact ? 1 : prescale.inverse[static_cast<int>(d.type)];
    dev::launch(l, add_splits<T>, static_cast<const float*>(workspace), p.splits, d.m, d.n, factor, epilogue);
  };
  const auto launch_type = [&]<class T>(T) { with_config<kConfigs>(p.config, [&]<Config c> { launch.template operator()<T, c>(); }); };
  d.a.dtype == DType::f16 ? launch_type(Half{}) : launch_type(BFloat16{});
}

}  // namespace

const Family<Gemm4bit> kTile4bit = {"tile", offer, run_config};

}  // namespace bnb::cuda::gemm
