// What the optimizers' kernels share: tensors, and blocks of 256 elements in the registers of a warp.
#pragma once

#include "common/optim_rules.h"
#include "common/stochastic.h"
#include "cuda/blockwise/encode8.cuh"

namespace bnb::cuda::optim {

using dev::Bits;

inline constexpr int kBlock = static_cast<int>(kOptimizerBlock), kPer = 4, kRows = kBlock / kPer / static_cast<int>(dev::kWarp),
                     kPerLane =
                         kRows * kPer;  // elements of a block in a lane: number u * kPer + i is (u * 32 + lane) * kPer + i of the block
inline constexpr int64_t kChunk = 32;   // blocks that thread blocks take at once in a step
inline constexpr int64_t kMostPieces = 128, kLeastPiece = 64;  // of sums of squares, as on the CPU (src/cpu/optim.cpp)

// A tensor, from the host.
struct TensorArgs {
  uint8_t* p;
  const uint8_t* g;
  uint8_t *state1, *state2;  // fp32 or codes
  float *absmax1, *absmax2, *u_norm;
  int64_t n, step, offset;
  int64_t first_chunk, first_piece;  // this tensor's first in the sequence over all tensors
  float gnorm_scale, p_norm;         // p_norm < 0: computed from p
  DType p_type, g_type;
  bool vectors;  // all pointers are aligned for vector accesses

  BNB_HD int64_t blocks() const { return ceil_div(n, kBlock); }
  BNB_HD int64_t piece() const {  // blocks per piece
    const int64_t even = ceil_div(blocks(), kMostPieces);
    return even > kLeastPiece ? even : kLeastPiece;
  }
  BNB_HD int64_t pieces() const { return ceil_div(blocks(), piece()); }
};

struct alignas(8) TensorState : TensorArgs {
  Hyper hyper;
  float step_size;  // -lr * trust
};

struct alignas(16) CodeMap {
  float value[256], threshold[256];
  uint8_t first[Lane8::kBuckets];
  int32_t by_bucket;
  // Numbers below and above 0 must not round to 0 (Encoder8). Codes that they do not get: the first whose value is not below 0, if there
  // are values below; the last whose value is not above 0, if there are values above. Else -1.
  int32_t not_negative, not_positive;
};

struct Sums {
  double squares[2];  // of p, of u
};

// One launch over chunks or pieces [begin, end) of tensors whose states are all of 32 or all of 8 bits.
struct LaunchArgs {
  TensorState* tensor_states;
  const int64_t* first;  // first chunk or piece of each tensor
  int64_t count, begin, end;
  const CodeMap* maps;
  Sums* sums;
  uint64_t seed;
  bool stochastic;
  int copies;  // log2 of the copies of thresholds in shared memory
};
void launch_step(Optimizer, bool coded, LaunchArgs, dev::Launch);
void launch_norms(Optimizer, bool coded, const LaunchArgs&, dev::Launch);

// ---- on the device

// The arithmetic of the rules.
struct Math {
  using F32 = float;
  BNB_DEVICE static float set1(float x) { return x; }
  BNB_DEVICE static float mul(float a, float b) { return dev::mul(a, b); }
  BNB_DEVICE static float add(float a, float b) { return dev::add(a, b); }
  BNB_DEVICE static float fma(float a, float b, float c) { return dev::fma(a, b, c); }
  BNB_DEVICE static float div(float a, float b) { return dev::div(a, b); }
  BNB_DEVICE static float sqrt(float x) { return dev::sqrt(x); }
  BNB_DEVICE static float min(float a, float b) { return a < b ? a : b; }
  BNB_DEVICE static float max(float a, float b) { return a > b ? a : b; }
  BNB_DEVICE static float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
};

// The tensor of chunk or piece `at`: the last one whose first is not above it. All lanes of a warp search together.
BNB_DEVICE int64_t find_tensor(const int64_t* first, int64_t count, int64_t at) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t stride = (high - low + dev::kWarp - 1) / dev::kWarp, i = low + dev::lane() * stride;
    const int64_t begun = dev::popcount(dev::ballot(i < high && first[i] <= at));
    low += (begun - 1) * stride;
    high = low + stride < high ? low + stride : high;
  }
  return low;
}

// Elements [at, at + 4) as stored: 16 bytes, or 8 for 16-bit types.
BNB_DEVICE Bits<16> load_four(const uint8_t* from, DType type, int64_t at) {
  if (type == DType::f32) return dev::load<Bits<16>>(from + at * 4);
  const auto half = dev::load<Bits<8>>(from + at * 2);
  return {{half.word[0], half.word[1], 0, 0}};
}
BNB_DEVICE void widen(const Bits<16>& raw, DType type, float* x) {
  if (type == DType::f32) {
    BNB_UNROLL
    for (int i = 0; i < kPer; ++i) x[i] = dev::bits_float(raw.word[i]);
  } else if (type == DType::f16) {
    dev::unpack<Half>(raw.word[0], x[0], x[1]);
    dev::unpack<Half>(raw.word[1], x[2], x[3]);
  } else {
    dev::unpack<BFloat16>(raw.word[0], x[0], x[1]);
    dev::unpack<BFloat16>(raw.word[1], x[2], x[3]);
  }
}

// Where a tensor's states are, and the rule applied to an element.
template <class Rule, bool coded> struct States {
  static constexpr int kMaps = Rule::second_moment < 0 ? 1 : 2;
  BNB_DEVICE static constexpr int map_of(int k) { return k == Rule::second_moment ? 1 : 0; }
  BNB_DEVICE static uint8_t* at(const TensorState& e, int k) {
    return k == Rule::second_moment ? e.state2 : e.state1 + k * e.n * (coded ? 1 : 4);
  }
  BNB_DEVICE static float* absmax(const TensorState& e, int k, int64_t block) {
    return (k == Rule::second_moment ? e.absmax2 : e.absmax1 + k * e.blocks()) + block;
  }

  // Updates the states and gives u; false if the element is skipped.
  BNB_DEVICE static bool update(const Hyper& h, float p, float g, float (&s)[Rule::states], float& u) {
    const float raw = dev::mul(g, h.gnorm_scale), gradient = dev::fma(p, h.coupled, raw);
    if (!finite(Rule::squares ? dev::mul(gradient, gradient) : gradient) || (h.skip_zeros && raw == 0)) return false;
    u = Rule::template direction<Math>(gradient, s, h);
    return true;
  }
  BNB_DEVICE static float apply_update(const TensorState& e, float p, float u) {
    return dev::fma(u, e.step_size, dev::mul(p, e.hyper.keep));
  }
};

// One element at any address. `value`: the maps' values in shared memory, [map][code]; `scale`: the block's absmax.
template <class Rule, bool coded> struct ElementStep {
  using S = States<Rule, coded>;
  float p, u = 0, s[Rule::states];
  bool updated;

  BNB_DEVICE ElementStep(const TensorState& e, int64_t i, const float (*value)[256], const float (&scale)[Rule::states])
      : p(value_at(e.p, e.p_type, i)) {
    BNB_UNROLL
    for (int k = 0; k < Rule::states; ++k)
      if constexpr (coded)
        s[k] = dev::mul(value[S::map_of(k)][S::at(e, k)[i]], scale[k]);
      else
        s[k] = value_at<float>(S::at(e, k), i);
    updated = S::update(e.hyper, p, value_at(e.g, e.g_type, i), s, u);
  }
};
// Calls f(element) for a lane's elements of a block.
template <class F> BNB_DEVICE void for_lane(const TensorState& e, int64_t block, F&& f) {
  const int64_t end = (block + 1) * kBlock < e.n ? (block + 1) * kBlock : e.n;
  BNB_KEEP_LOOP
  for (int64_t i = block * kBlock + dev::lane(); i < end; i += dev::kWarp) f(i);
}

// A whole, aligned block: a lane's elements of p, g and the states, in fp32.
template <class Rule, bool coded> struct BlockRegisters {
  using S = States<Rule, coded>;
  float p[kPerLane], g[kPerLane], s[Rule::states][kPerLane];

  BNB_DEVICE static int64_t element(int64_t block, int row) {
    return block * kBlock + (row * static_cast<int>(dev::kWarp) + static_cast<int>(dev::lane())) * kPer;
  }

  BNB_DEVICE BlockRegisters(const TensorState& e, int64_t block, const float (*value)[256]) {
    constexpr int kBytes = coded ? 4 : 16;
    Bits<16> raw_p[kRows], raw_g[kRows];
    Bits<kBytes> raw_s[Rule::states][kRows];
    BNB_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int64_t at = element(block, r);
      raw_p[r] = load_four(e.p, e.p_type, at);
      raw_g[r] = load_four(e.g, e.g_type, at);
      BNB_UNROLL
      for (int k = 0; k < Rule::states; ++k) raw_s[k][r] = dev::load<Bits<kBytes>>(S::at(e, k) + at * (kBytes / kPer));
    }
    float scale[Rule::states] = {};
    BNB_UNROLL
    for (int k = 0; k < Rule::states; ++k)
      if constexpr (coded) scale[k] = *S::absmax(e, k, block);
    BNB_UNROLL
    for (int r = 0; r < kRows; ++r) {
      widen(raw_p[r], e.p_type, p + r * kPer);
      widen(raw_g[r], e.g_type, g + r * kPer);
      BNB_UNROLL
      for (int k = 0; k < Rule::states; ++k)
        if constexpr (coded) {
          BNB_UNROLL
          for (int i = 0; i < kPer; ++i) s[k][r * kPer + i] = dev::mul(value[S::map_of(k)][raw_s[k][r].word[0] >> i * 8 & 0xff], scale[k]);
        } else {
          widen(raw_s[k][r], DType::f32, s[k] + r * kPer);
        }
    }
  }

  BNB_DEVICE bool update(const Hyper& h, int i, float& u) {
    float mine[Rule::states];
    BNB_UNROLL
    for (int k = 0; k < Rule::states; ++k) mine[k] = s[k][i];
    const bool updated = S::update(h, p[i], g[i], mine, u);
    BNB_UNROLL
    for (int k = 0; k < Rule::states; ++k) s[k][i] = mine[k];
    return updated;
  }
};

// Calls f(tensor, chunk or piece, first block, last block + 1) for this thread block's share of the work. `length(tensor)`: blocks per
// chunk or piece. Each warp has a copy of the tensor's state in shared memory: in registers it would leave little room for elements.
template <class Length, class F> BNB_DEVICE void for_work(const LaunchArgs& args, TensorState* tensor_states, Length&& length, F&& f) {
  TensorState& e = tensor_states[dev::warp()];
  int64_t held = -1;
  for (int64_t c = args.begin + dev::block().x; c < args.end; c += dev::grid().x) {
    const int64_t i = find_tensor(args.first, args.count, c);
    if (i != held) {
      held = i;
      dev::warp_barrier();
      const auto* from = reinterpret_cast<const uint8_t*>(args.tensor_states + i);
      auto* to = reinterpret_cast<uint8_t*>(&e);
      for (unsigned at = dev::lane() * 8; at < sizeof(TensorState); at += dev::kWarp * 8)
        dev::store_shared(to + at, dev::load<Bits<8>>(from + at));
      dev::warp_barrier();
    }
    const int64_t size = length(e), begin = (c - args.first[i]) * size, end = begin + size, blocks = e.blocks();
    f(e, c, begin, end < blocks ? end : blocks);
  }
}

}  // namespace bnb::cuda::optim
