// Sums of squares of p and u, for the trust ratio, added in the CPU's order (cpu/optim.cpp), so that the bytes agree. Per block of 256,
// eight sums over every eighth element, then in pairs; blocks of a piece in order; pieces in order (optim.cu).
//
// Reads p, g and the states once: sizeof(P) + sizeof(G) + 4 or 1 bytes per state. Lower bound: those at copy bandwidth.
#include "cuda/optim/optim.cuh"

namespace bnb::cuda::optim {
namespace {

constexpr unsigned kThreads = 256, kWarps = kThreads / dev::kWarp;

struct Shared {
  TensorState tensor_states[kWarps];
  float value[2][256];
  float x[kWarps][2][kBlock + 8];  // p and u of a warp's block; padded so that the 16 lanes that add have no bank conflicts
  double sums[2][kWarps][2];       // per block; alternate between rounds
};

template <class Rule, bool coded> BNB_DEVICE void stage_block(const TensorState& e, int64_t block, Shared& s) {
  using Block = BlockRegisters<Rule, coded>;
  Block x(e, block, s.value);
  BNB_UNROLL
  for (int r = 0; r < kRows; ++r) {
    Bits<16> p, directions;
    BNB_UNROLL
    for (int i = 0; i < kPer; ++i) {
      float u = 0;
      if (!x.update(e.hyper, r * kPer + i, u)) u = 0;
      p.word[i] = dev::float_bits(x.p[r * kPer + i]);
      directions.word[i] = dev::float_bits(u);
    }
    const auto at = Block::element(0, r);
    dev::store_shared(&s.x[dev::warp()][0][at], p);
    dev::store_shared(&s.x[dev::warp()][1][at], directions);
  }
}
template <class Rule, bool coded> BNB_DEVICE void stage_rest(const TensorState& e, int64_t block, Shared& s) {
  using S = States<Rule, coded>;
  auto& mine = s.x[dev::warp()];
  for (unsigned i = dev::lane(); i < kBlock; i += dev::kWarp) mine[0][i] = mine[1][i] = 0;
  float scale[Rule::states] = {};
  BNB_UNROLL
  for (int k = 0; k < Rule::states; ++k)
    if constexpr (coded) scale[k] = *S::absmax(e, k, block);
  for_lane(e, block, [&](int64_t i) {
    const ElementStep<Rule, coded> x(e, i, s.value, scale);
    mine[0][i - block * kBlock] = x.p;
    mine[1][i - block * kBlock] = x.updated ? x.u : 0;
  });
}

// Valid in lane 0 (p) and lane 8 (u).
BNB_DEVICE double squares(const Shared& s) {
  const unsigned which = dev::lane() / 8 & 1, first = dev::lane() % 8;
  double sum = 0;
  BNB_KEEP_LOOP
  for (unsigned i = first; i < kBlock; i += 8) {
    const double x = s.x[dev::warp()][which][i];
    sum = sum + x * x;
  }
  BNB_UNROLL
  for (unsigned by = 4; by; by /= 2) sum = sum + dev::shuffle_xor(sum, by);
  return sum;
}

template <class Rule, bool coded> BNB_KERNEL(kThreads, 3) norms(const LaunchArgs args) {
  auto& s = dev::shared<Shared>();
  if constexpr (coded) {
    for (int m = 0; m < States<Rule, coded>::kMaps; ++m)
      for (unsigned i = dev::thread(); i < 256; i += dev::threads()) s.value[m][i] = args.maps[m].value[i];
    dev::barrier();
  }
  unsigned turn = 0;
  for_work(
      args, s.tensor_states, [](const TensorState& e) { return e.piece(); },
      [&](const TensorState& e, int64_t piece, int64_t begin, int64_t end) {
        double sum = 0;
        for (int64_t base = begin; base < end; base += kWarps, turn ^= 1) {
          const int64_t b = base + dev::warp();
          if (b < end) {
            if (e.vectors && (b + 1) * kBlock <= e.n)
              stage_block<Rule, coded>(e, b, s);
            else
              stage_rest<Rule, coded>(e, b, s);
            dev::warp_barrier();
            const double of_block = squares(s);
            if (dev::lane() % 8 == 0 && dev::lane() < 16) s.sums[turn][dev::warp()][dev::lane() / 8] = of_block;
          }
          dev::barrier();
          if (dev::thread() < 2)
            for (int w = 0; w < static_cast<int>(kWarps) && base + w < end; ++w) sum = sum + s.sums[turn][w][dev::thread()];
        }
        if (dev::thread() < 2) args.sums[piece].squares[dev::thread()] = sum;
      });
}

}  // namespace

void launch_norms(Optimizer rule, bool coded, const LaunchArgs& args, dev::Launch l) {
  visit(rule, [&]<class Rule>(Rule) {
    const int64_t most = int64_t{3} * dev::device().sms, pieces = args.end - args.begin;
    l.grid = {static_cast<uint32_t>(pieces < most ? pieces : most)};
    l.threads = kThreads;
    l.shared = sizeof(Shared);
    dev::launch(l, coded ? norms<Rule, true> : norms<Rule, false>, args);
  });
}

}  // namespace bnb::cuda::optim
