// gemm_4bit without tensor cores: fp32 input, and everything that other kernels do not support: any k, rows that begin in mid-byte or
// mid-block, any alignment, any type on any architecture.
//
// A warp computes two columns of y for up to four rows of a. Its lanes take 8 columns of k each, 256 at a time; sums per lane in fp32, then
// over lanes in a fixed order. Reads W once per four rows of a; w is what dequantize_4bit gives. About 5 instructions per weight and 1 per
// product.
#include "cuda/device/span.cuh"
#include "cuda/gemm_4bit/gemm_4bit.cuh"

namespace bnb::cuda::gemm {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / static_cast<int>(dev::kWarp), kColumns = 2, kPer = 8;

struct Shared {
  float value[16][dev::kWarp];  // one copy per lane, in its own bank
};

template <class T, bool aligned> BNB_DEVICE float element(const T* from, int64_t i) {
  if constexpr (aligned) return dev::to_float(from[i]);
  return value_at<T>(from, i);
}
template <class T, bool aligned> BNB_DEVICE void write(T* to, int64_t i, T x) {
  if constexpr (aligned) {
    to[i] = x;
  } else {
    uint32_t bits;
    if constexpr (sizeof(T) == 4)
      bits = dev::float_bits(x);
    else
      bits = x.bits;
    auto* bytes = reinterpret_cast<uint8_t*>(to + i);
    BNB_UNROLL
    for (unsigned b = 0; b < sizeof(T); ++b) bytes[b] = static_cast<uint8_t>(bits >> 8 * b);
  }
}
template <bool aligned> BNB_DEVICE float bias_of(const Epilogue4bit& r, int64_t column) {
  return aligned || !r.bias ? bias_at(r, column) : value_at(r.bias, r.bias_type, column);
}

// `words`: k is a multiple of 8 and codes are aligned to 4 bytes, so that 8 codes are a word.
template <class T, bool aligned, int rows>
BNB_KERNEL(kThreads, 2)
multiply(Weight4bit w, const T* a, int64_t m, Epilogue4bit epilogue, bool words) {
  auto& s = dev::shared<Shared>();
  for (unsigned i = dev::thread(); i < 16 * dev::kWarp; i += kThreads)
    s.value[i / dev::kWarp][i % dev::kWarp] = kCodebooks.values[static_cast<int>(w.type)][i / dev::kWarp];
  dev::barrier();
  const Scales scales(w);
  const int lane = static_cast<int>(dev::lane());
  const int64_t row_tiles = (m + rows - 1) / rows, column_tiles = (w.n + kWarps * kColumns - 1) / (kWarps * kColumns);
  for (int64_t tile = dev::block().x; tile < row_tiles * column_tiles; tile += dev::grid().x) {
    const int64_t first_row = tile % row_tiles * rows, first_column = (tile / row_tiles * kWarps + dev::warp()) * kColumns;
    float sums[kColumns][rows] = {};
    for (int64_t begin = lane * kPer; begin < w.k; begin += kPer * static_cast<int>(dev::kWarp)) {
      const int here = w.k - begin < kPer ? static_cast<int>(w.k - begin) : kPer;
      float x[rows][kPer];
      BNB_UNROLL
      for (int i = 0; i < rows; ++i) {
        const int64_t row = first_row + i < m ? first_row + i : m - 1;
        BNB_UNROLL
        for (int j = 0; j < kPer; ++j) x[i][j] = j < here ? element<T, aligned>(a, row * w.k + begin + j) : 0;
      }
      BNB_UNROLL
      for (int c = 0; c < kColumns; ++c) {
        const int64_t column = first_column + c;
        if (column >= w.n) break;
        const int64_t at = column * w.k + begin;
        const auto code = [&](int j) { return w.codes[(at + j) / 2] >> ((at + j) % 2 ? 0 : 4) & 15u; };
        uint32_t codes = 0;  // the first in the lowest nibble
        if (words) {
          const uint32_t word = dev::load_const<Bits<4>>(w.codes + at / 2).word[0];
          codes = (word & 0x0f0f0f0f) << 4 | (word >> 4 & 0x0f0f0f0f);
        } else {
          BNB_UNROLL
          for (int j = 0; j < kPer; ++j)
            if (j < here) codes |= code(j) << 4 * j;
        }
        // Blocks have at least 32 weights, so 8 codes span at most two.
        const int64_t block = at >> w.log2_block, last_block = (at + here - 1) >> w.log2_block;
        const float scale = scales[block];
        const float other = last_block == block ? scale : scales[last_block];
        BNB_UNROLL
        for (int j = 0; j < kPer; ++j) {
          if (j >= here) break;
          const float by = (at + j) >> w.log2_block == block ? scale : other;
          const float weight = dev::to_float(dev::round_to<T>(dev::mul(s.value[codes >> 4 * j & 15][lane], by)));
          BNB_UNROLL
          for (int i = 0; i < rows; ++i) sums[c][i] = dev::fma(x[i][j], weight, sums[c][i]);
        }
      }
    }
    BNB_UNROLL
    for (int c = 0; c < kColumns; ++c) BNB_UNROLL
    for (int i = 0; i < rows; ++i) {
      float sum = sums[c][i];
      BNB_UNROLL
      for (unsigned by = 16; by; by /= 2) sum = dev::add(sum, dev::shuffle_xor(sum, by));
      const int64_t column = first_column + c, row = first_row + i;
      if (lane == (c * rows + i) % static_cast<int>(dev::kWarp) && column < w.n && row < m)
        write<T, aligned>(static_cast<T*>(epilogue.y), row * w.n + column,
                          dev::round_to<T>(dev::add(sum, bias_of<aligned>(epilogue, column))));
    }
  }
}

constexpr int kRowsOf[] = {1, 4};  // rows of a at once
std::string describe_config(const Plan& p) {
  return std::to_string(kRowsOf[p.config]) + " rows by " + std::to_string(kColumns) + " columns per warp";
}

void offer(const Gemm4bit& d, const dev::Device& device, std::vector<Plan>& plans) {
  const int config = d.m == 1 ? 0 : 1;
  // Per weight and tile of rows: decoding; per row: a product and a load of a.
  const double rows = kRowsOf[config], tiles = std::ceil(static_cast<double>(d.m) / rows);
  const double weights = static_cast<double>(d.n) * static_cast<double>(d.k) / device.sms;
  plans.push_back({.config = config, .clocks = kLaunchClocks + weights * tiles * (8 + 2 * rows) / kLanes, .describe = describe_config});
}

void run_config(const Plan& p, const Gemm4bit& d, void*, Stream stream) {
  const bool words = d.k % kPer == 0 && reinterpret_cast<uintptr_t>(d.codes.data()) % 4 == 0;
  const auto launch = [&]<class T, bool aligned, int rows>() {
    const int64_t tiles = ceil_div(d.m, rows) * ceil_div(d.n, kWarps * kColumns);
    dev::launch({.op = "gemm_4bit",
                 .dtype = d.a.dtype,
                 .shape = {d.m, d.n, d.k},
                 .grid = {static_cast<uint32_t>(std::min<int64_t>(tiles, int64_t{32} * dev::device().sms))},
                 .threads = kThreads,
                 .shared = sizeof(Shared),
                 .stream = stream},
                multiply<T, aligned, rows>, weight_of(d), static_cast<const T*>(d.a.data), d.m, epilogue_of(d), words);
  };
  visit(d.a.dtype, [&]<class T>(T) {
    if (!elements_aligned(d))
      p.config == 0 ? launch.template operator()<T, false, 1>() : launch.template operator()<T, false, 4>();
    else
      p.config == 0 ? launch.template operator()<T, true, 1>() : launch.template operator()<T, true, 4>();
  });
}

}  // namespace

const Family<Gemm4bit> kFma4bit = {"fma", offer, run_config};

}  // namespace bnb::cuda::gemm
