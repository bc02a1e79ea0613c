// gemm_4bit with tensor cores for many rows of a: tiles of y, W decoded in registers on the way into mma, a through shared memory.
//
// A block makes `warps * row_tiles * 16` columns by `tiles * 8` rows of y. Each warp has rows of W of its own, so that a block decodes a
// weight once; they are the A operand. Of a row of W and 64 columns of k the lanes t = 0..3 take 16 columns each, 8 bytes: mma step s has
// columns 16 t + 4 s .. + 3 of lane t, and a is read in that order, 16 bytes a lane. Codes are loaded into registers some steps ahead, a by
// asynchronous copies into `kStages` buffers.
//
// Reads W once for `tiles * 8` rows of a, and all of a for each block of columns. Lower bound: 2 m n k operations of the tensor cores.
//
// Two ways to decode. Exact: w = T(value * absmax), as dequantize_4bit has it. Sums are added in order of k, so a row of y depends neither
// on m nor on the tile. Stretched: values rounded to T, absmax multiplied to the fp32 sum of a block (gemm_4bit.cuh has the error), which
// takes less than half the instructions a weight.
#include "cuda/gemm_4bit/gemm_4bit.cuh"

namespace bnb::cuda::gemm4 {
namespace {

constexpr int kDepth = 64, kStages = 3, kPitch = kDepth * 2 + 16;  // columns of a step; bytes of a row of a, so that banks differ

constexpr int table_bytes(int arch) { return arch >= 80 ? kLines * kLine : 0; }

// w of two codes. A line holds both values as floats, 8 bytes a lane; without the shared memory for that (sm_75) a lane holds value
// lane % 16.
template <class T> struct ExactPairs {
  static constexpr bool kShuffle = table_bytes(dev::kArch) == 0;
  const uint8_t* lines;
  uint32_t lane_offset;
  float value;

  BNB_DEVICE ExactPairs(uint8_t* to, QuantType type) : lines(to), lane_offset(dev::lane() * 8) {
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
      first = dev::shuffle(value, codes >> (byte * 8 + 4)), second = dev::shuffle(value, codes >> byte * 8);
    } else {
      const auto both = dev::load_shared<Bits<8>>(lines + line_address(codes, byte, lane_offset));
      first = dev::bits_float(both.word[0]), second = dev::bits_float(both.word[1]);
    }
    return dev::pack<T>(dev::mul(first, scale), dev::mul(second, scale));
  }
};

struct Part {
  int splits, per_split, steps;  // of k; steps of 64 columns of a split, and of all
  float* sums;                   // splits x m x n, if there are more than one
};

template <class T, int warps, int row_tiles, int tiles, bool exact>
BNB_KERNEL(warps * 32, 1)
multiply(Weight w, const T* a, int m, Result result, Part part) {
  if constexpr (dev::kHasMma<T> && (exact || dev::kArch >= 80)) {
    constexpr int kThreads = warps * 32, kColumns = warps * row_tiles * 16, kRows = tiles * 8, kStage = kRows * kPitch;
    constexpr int kAhead = tiles > 4 ? 1 : 3;  // steps that codes are loaded before their use: a step takes longer then
    constexpr int kHalves = exact || tiles > 4 ? 2 : 1, kSteps = 4 / kHalves;  // weights are decoded for so many mma at once
    auto* shared = &dev::shared<uint8_t>();
    auto* stages = shared + table_bytes(dev::kArch);
    const int lane = static_cast<int>(dev::lane()), warp = static_cast<int>(dev::warp()), g = lane / 4, t = lane % 4;
    const int k = static_cast<int>(w.k), n = static_cast<int>(w.n);

    const int split = static_cast<int>(dev::block().z);
    const int first_row = static_cast<int>(dev::block().x) * kRows, first_column = static_cast<int>(dev::block().y) * kColumns;
    const int begin = split * part.per_split, end = begin + part.per_split < part.steps ? begin + part.per_split : part.steps;

    // ---- W
    const Scales scales(w);
    const int first_of_lane = first_column + warp * row_tiles * 16 + g;
    const auto row_begin = [&](int i) {  // the first weight of one of the lane's rows; rows beyond the end are computed and dropped
      const int row = first_of_lane + i * 8;
      return static_cast<uint64_t>(static_cast<uint32_t>(row < n ? row : n - 1)) * static_cast<uint32_t>(k);
    };
    uint32_t codes[kAhead][row_tiles][2][2] = {}, fetched[kAhead][row_tiles][2] = {};
    // Beyond k old codes stay, with some scale of their row: a is 0 there.
    const auto lane_column = [&](int step) {
      const int at = step * kDepth + t * 16;
      return at < k ? at : 0;
    };
    const auto load_codes = [&](int ring, int step) {
      if (step >= end) return;
      const auto at = static_cast<uint32_t>(lane_column(step));
      BNB_UNROLL
      for (int i = 0; i < row_tiles * 2; ++i) {
        const uint64_t from = row_begin(i) + at;
        const auto v = dev::load_once<Bits<8>>(w.codes + from / 2);
        codes[ring][i / 2][i % 2][0] = v.word[0], codes[ring][i / 2][i % 2][1] = v.word[1];
        fetched[ring][i / 2][i % 2] = scales.fetch(static_cast<int64_t>(from >> w.log2_block));
      }
    };

    // ---- a: 16 bytes of a row a copy; nothing is read beyond m and k, zeros are written
    const int copy_row = static_cast<int>(dev::thread() / 8), copy_column = static_cast<int>(dev::thread() % 8 * 8);
    const T* const copy_from = a + static_cast<int64_t>(first_row + copy_row) * k + copy_column;
    const auto copy_rows = [&](int step) {
      uint8_t* to = stages + step % kStages * kStage + copy_row * kPitch + copy_column * 2;
      const T* from = copy_from + step * kDepth;
      const int rows_left = step * kDepth + copy_column < k ? m - first_row - copy_row : 0;
      BNB_UNROLL
      for (int i = 0; i < kRows; i += kThreads / 8, from += static_cast<int64_t>(kThreads / 8) * k)
        if (kRows % (kThreads / 8) == 0 || copy_row + i < kRows) dev::copy_async<16>(to + i * kPitch, from, i < rows_left ? 16 : 0);
    };

    BNB_UNROLL
    for (int i = 0; i < kAhead; ++i) load_codes(i, begin + i);
    BNB_UNROLL
    for (int i = 0; i < kStages - 1; ++i) {
      if (begin + i < end) copy_rows(begin + i);
      dev::copy_commit();
    }
    struct Empty {};
    const auto pairs = [&] {
      if constexpr (exact) {
        return ExactPairs<T>(shared, w.type);
      } else {
        StretchedPairs<T>::fill(shared, w.type);
        return Empty{};
      }
    }();
    const uint32_t lane_offset = StretchedPairs<T>::lane_offset();

    float sums[row_tiles][tiles][4] = {};
    for (int base = begin; base < end; base += kAhead) {
      BNB_UNROLL
      for (int ring = 0; ring < kAhead; ++ring) {
        const int step = base + ring;
        if (step >= end) break;
        dev::copy_wait<kStages - 2>();
        dev::barrier();
        if (step + kStages - 1 < end) copy_rows(step + kStages - 1);
        dev::copy_commit();

        float scale[row_tiles][2];
        BNB_UNROLL
        for (int i = 0; i < row_tiles * 2; ++i)
          scale[i / 2][i % 2] = scales.decode(fetched[ring][i / 2][i % 2], [&] {
            return static_cast<int64_t>((row_begin(i) + static_cast<uint32_t>(lane_column(step))) >> w.log2_block);
          });
        const uint8_t* from = stages + step % kStages * kStage + g * kPitch + t * 32;
        BNB_UNROLL
        for (int half = 0; half < kHalves; ++half) {
          uint32_t left[row_tiles][kSteps][4];
          BNB_UNROLL
          for (int i = 0; i < row_tiles * kSteps * 4; ++i) {
            const int r = i / 4 / kSteps, j = i / 4 % kSteps, at = half * kSteps + j;
            const uint32_t word = codes[ring][r][i % 2][at / 2];
            const int byte = at % 2 * 2 + i / 2 % 2;
            if constexpr (exact)
              left[r][j][i % 4] = pairs(word, byte, scale[r][i % 2]);
            else
              left[r][j][i % 4] = StretchedPairs<T>::pair(shared, word, byte, lane_offset);
          }
          if (half == kHalves - 1) load_codes(ring, step + kAhead);
          BNB_UNROLL
          for (int tile_m = 0; tile_m < tiles; ++tile_m) {
            uint32_t right[kSteps][2];
            BNB_UNROLL
            for (int j = 0; j < kSteps; j += 2) {
              const auto v = dev::load_shared<Bits<16>>(from + tile_m * 8 * kPitch + (half * kSteps + j) * 8);
              right[j][0] = v.word[0], right[j][1] = v.word[1], right[j + 1][0] = v.word[2], right[j + 1][1] = v.word[3];
            }
            BNB_UNROLL
            for (int i = 0; i < row_tiles; ++i)
              if constexpr (exact) {
                BNB_UNROLL
                for (int j = 0; j < kSteps; ++j) dev::mma<T>(sums[i][tile_m], left[i][j], right[j]);
              } else {
                float d[4] = {};
                BNB_UNROLL
                for (int j = 0; j < kSteps; ++j) dev::mma<T>(d, left[i][j], right[j]);
                BNB_UNROLL
                for (int j = 0; j < 4; ++j) sums[i][tile_m][j] = dev::fma(d[j], scale[i][j / 2], sums[i][tile_m][j]);
              }
          }
        }
      }
    }

    // ---- y: rows 2 t and 2 t + 1 of a tile, columns g and g + 8
    const auto column_of = [&](int i, int j) { return (warp * row_tiles + i) * 16 + j / 2 * 8 + g; };
    const auto row_of = [&](int tile_m, int j) { return tile_m * 8 + 2 * t + j % 2; };
    if (part.splits > 1) {
      BNB_UNROLL
      for (int i = 0; i < row_tiles * tiles * 4; ++i) {
        const int r = i / 4 / tiles, tile_m = i / 4 % tiles, row = first_row + row_of(tile_m, i % 4),
                  column = first_column + column_of(r, i % 4);
        if (row < m && column < n) part.sums[(static_cast<int64_t>(split) * m + row) * n + column] = sums[r][tile_m][i % 4];
      }
      return;
    }
    constexpr int kOut = kColumns + 8;  // elements of a row
    auto* out = reinterpret_cast<T*>(shared);
    dev::barrier();
    BNB_UNROLL
    for (int i = 0; i < row_tiles; ++i) BNB_UNROLL
    for (int j = 0; j < 4; j += 2) {
      const int column = first_column + column_of(i, j);
      const float bias = column < n ? bias_at(result, column) : 0;
      BNB_UNROLL
      for (int tile_m = 0; tile_m < tiles; ++tile_m) BNB_UNROLL
      for (int h = 0; h < 2; ++h) {
        const float factor = exact ? 1.0f : kStretched<T>.inverse[static_cast<int>(w.type)];
        const float sum = exact ? sums[i][tile_m][j + h] : dev::mul(sums[i][tile_m][j + h], factor);
        out[row_of(tile_m, h) * kOut + column_of(i, j)] = dev::round_to<T>(dev::add(sum, bias));
      }
    }
    dev::barrier();
    auto* y = static_cast<T*>(result.y);
    const bool whole = n % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0;
    BNB_KEEP_LOOP
    for (int p = static_cast<int>(dev::thread()); p < kRows * kColumns / 8; p += kThreads) {
      const int row = p / (kColumns / 8), column = p % (kColumns / 8) * 8;
      if (first_row + row >= m) break;
      T* to = y + static_cast<int64_t>(first_row + row) * n + first_column + column;
      const T* values = out + row * kOut + column;
      if (whole && first_column + column < n)
        dev::store(to, dev::load_shared<Bits<16>>(values));
      else
        for (int i = 0; i < 8 && first_column + column + i < n; ++i) to[i] = values[i];
    }
  }
}

// y = sums of all splits, in order, + bias
template <class T> BNB_KERNEL(256, 4) add_splits(const float* sums, int splits, int64_t m, int64_t n, float factor, Result result) {
  for (int64_t i = int64_t{dev::block().x} * 256 + dev::thread(); i < m * n; i += int64_t{dev::grid().x} * 256) {
    float sum = 0;
    for (int split = 0; split < splits; ++split) sum = dev::add(sum, sums[split * m * n + i]);
    static_cast<T*>(result.y)[i] = dev::round_to<T>(dev::add(dev::mul(sum, factor), bias_at(result, i % n)));
  }
}

struct Config {
  int warps, row_tiles, tiles;
  bool exact;
  constexpr int columns() const { return warps * row_tiles * 16; }
  constexpr int rows() const { return tiles * 8; }
  uint32_t shared(int arch) const {
    return static_cast<uint32_t>(std::max(table_bytes(arch) + kStages * rows() * kPitch, rows() * (columns() + 8) * 2));
  }
};
constexpr Config kConfigs[] = {{16, 1, 4, false}, {16, 1, 8, false}, {16, 1, 4, true}, {16, 1, 8, true}, {8, 2, 16, true}};

std::string describe_tile(const Plan& p) {
  const Config& c = kConfigs[p.config];
  return std::to_string(c.rows()) + " x " + std::to_string(c.columns()) + " x 64, " + std::to_string(c.warps) + " warps, " +
         std::to_string(kStages) + " stages, " + (c.exact ? "exact" : "stretched") + " weights, k in " + std::to_string(p.splits);
}

void offer_tile(const Gemm4bit& d, const dev::Device& device, std::vector<Plan>& plans) {
  if (!fits_tensor_cores(d, device)) return;
  const Rates rates = rates_of(device.arch);
  for (size_t i = 0; i < std::size(kConfigs); ++i) {
    const Config& c = kConfigs[i];
    if (c.shared(device.arch) > device.shared_bytes || (!c.exact && d.batch_invariant)) continue;
    if (parts(d.n, c.columns()) > 65535) continue;
    if (!c.exact && (d.blocksize % 64 != 0 || d.k % 64 != 0 || device.arch < 80)) continue;
    const int64_t tiles = parts(d.m, c.rows()) * parts(d.n, c.columns()), steps = parts(d.k, kDepth);
    // A step: products, lines of shared memory, bytes from the cache.
    const double weights = c.columns() * kDepth, lines = weights / 64 * (c.exact ? 2 : 1) + c.warps * c.tiles * 8 + c.rows();
    const double step = 1.2 * std::max({weights * c.rows() / rates.mma, lines, (weights / 2 + c.rows() * kDepth * 2) / rates.l2_bytes});
    for (int splits = 1; splits <= 16 && (splits == 1 || (steps >= 4 * splits && !d.batch_invariant)); splits *= 2) {
      if (tiles * splits > INT32_MAX || (splits > 1 && tiles * splits > 2 * device.sms)) break;
      const double rounds = static_cast<double>(parts(tiles * splits, device.sms)), sums = static_cast<double>(d.m * d.n) * 4 * splits;
      const double second = splits == 1 ? 0 : kLaunchClocks + 2 * sums / (device.sms * rates.l2_bytes);
      plans.push_back({.config = static_cast<int>(i),
                       .splits = splits,
                       .workspace = splits == 1 ? 0 : static_cast<int64_t>(sums),
                       .clocks = kLaunchClocks + rounds * (1500 + step * static_cast<double>(parts(steps, splits))) + second,
                       .describe = describe_tile});
    }
  }
}

void run_tile(const Plan& p, const Gemm4bit& d, void* workspace, Stream stream) {
  const auto m = static_cast<int>(d.m);
  const Result result = result_of(d);
  dev::Launch l = {.op = "gemm_4bit", .dtype = d.a.dtype, .shape = {d.m, d.n, d.k}, .stream = stream};
  const auto launch = [&]<class T, int config>(T) {
    constexpr Config c = kConfigs[config];
    const auto steps = static_cast<int>(parts(d.k, kDepth));
    const Part part = {p.splits, static_cast<int>(parts(steps, p.splits)), steps, static_cast<float*>(workspace)};
    l.grid = {static_cast<uint32_t>(parts(d.m, c.rows())), static_cast<uint32_t>(parts(d.n, c.columns())), static_cast<uint32_t>(p.splits)};
    l.threads = c.warps * dev::kWarp;
    l.shared = c.shared(dev::device().arch);
    dev::launch(l, multiply<T, c.warps, c.row_tiles, c.tiles, c.exact>, weight_of(d), static_cast<const T*>(d.a.data), m, result, part);
    if (p.splits == 1) return;
    l.grid = {static_cast<uint32_t>(std::min<int64_t>(parts(d.m * d.n, 256), int64_t{16} * dev::device().sms))};
    l.threads = 256;
    l.shared = 0;
    constexpr Values stretch = stretched<T>();
    const float factor = c.exact ? 1 : stretch.inverse[static_cast<int>(d.type)];
    dev::launch(l, add_splits<T>, static_cast<const float*>(workspace), p.splits, d.m, d.n, factor, result);
  };
  const auto find = [&]<class T, size_t... i>(T t, std::index_sequence<i...>) {
    ((p.config == i ? launch.template operator()<T, i>(t) : void()), ...);
  };
  constexpr auto all = std::make_index_sequence<std::size(kConfigs)>();
  d.a.dtype == DType::f16 ? find(Half{}, all) : find(BFloat16{}, all);
}

}  // namespace

const Family kTile = {"tile", offer_tile, run_tile};

}  // namespace bnb::cuda::gemm4
