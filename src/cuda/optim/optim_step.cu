// One step over all tensors of a call, in one launch for 32-bit states and one for 8-bit states; the rules are in common/optim_rules.h.
//
// A warp takes a block of 256 elements: p, g and states pass through registers once; 8-bit codes use the absmax that the warp computes
// between the rule and the encoder. Bytes per element: 2 sizeof(P) + sizeof(G) + 8 states (32 bits) or + 2 states (8 bits; and 8 states per
// block). Lower bound: those at copy bandwidth. Adam with bf16: 22 and 10 bytes. 8 elements per lane are in flight.
#include "cuda/optim/optim.cuh"

namespace bnb::cuda::optim {
namespace {

template <bool coded> inline constexpr int kThreads = coded ? 512 : 256;
template <class Rule, bool coded> inline constexpr int kPerSm = coded ? (Rule::states > 2 ? 1 : 2) : 3;

template <class Rule, bool coded> struct Shared {
  TensorState tensor_states[kThreads<coded> / dev::kWarp];
};
// Thresholds are replicated 2^copies times against bank conflicts; values and the first code of each bucket are not.
template <class Rule> struct Shared<Rule, true> {
  static constexpr int kMaps = States<Rule, true>::kMaps;
  TensorState tensor_states[kThreads<true> / dev::kWarp];
  float value[kMaps][256];
  uint8_t first[kMaps][Lane8::kBuckets];
  int32_t by_bucket[kMaps], not_negative[kMaps], not_positive[kMaps];
  float threshold[kMaps][256];  // of one copy; more follow

  BNB_DEVICE const float* thresholds(const LaunchArgs& args, int m) const { return &threshold[0][0] + (m * 256 << args.copies); }

  // The codes of states k.
  template <int n> BNB_DEVICE Bits<4> codes(const LaunchArgs& args, int k, const float* s, float inverse) const {
    const int m = States<Rule, true>::map_of(k);
    const unsigned copy = dev::lane() & ((1u << args.copies) - 1), copies = static_cast<unsigned>(args.copies);
    const Lane8 lane = {first[m], thresholds(args, m) + copy, copies, by_bucket[m] != 0};
    float t[n];
    BNB_UNROLL
    for (int i = 0; i < n; ++i) t[i] = dev::mul(s[i], inverse);
    auto codes = lane(t);
    BNB_UNROLL
    for (int i = 0; i < n; ++i) {
      const auto c = static_cast<int32_t>(codes.word[0] >> i * 8 & 0xff);
      if (k == Rule::root)
        codes.word[0] += s[i] > 0 && c == not_positive[m] ? 1u << i * 8 : 0;
      else
        codes.word[0] -= s[i] < 0 && c == not_negative[m] ? 1u << i * 8 : 0;
    }
    return codes;
  }
};
template <class Rule, bool coded> BNB_DEVICE const float (*values(const Shared<Rule, coded>& s))[256] {
  if constexpr (coded) return s.value;
  return nullptr;
}
template <class Rule> constexpr uint32_t shared_bytes(int copies) {
  using S = Shared<Rule, true>;
  return static_cast<uint32_t>(sizeof(S) + sizeof(S::threshold) * ((size_t{1} << copies) - 1));
}

template <class Rule> BNB_DEVICE void prepare(const LaunchArgs& args, Shared<Rule, true>& s) {
  for (int m = 0; m < Shared<Rule, true>::kMaps; ++m) {
    const CodeMap& map = args.maps[m];
    for (unsigned i = dev::thread(); i < 256; i += dev::threads()) s.value[m][i] = map.value[i];
    for (unsigned i = dev::thread() * 16; i < Lane8::kBuckets; i += dev::threads() * 16)
      dev::store_shared(s.first[m] + i, dev::load<Bits<16>>(map.first + i));
    auto* threshold = const_cast<float*>(s.thresholds(args, m));
    for (unsigned i = dev::thread(); i < 256u << args.copies; i += dev::threads()) threshold[i] = map.threshold[i >> args.copies];
    if (dev::thread() == 0) {
      s.by_bucket[m] = map.by_bucket;
      s.not_negative[m] = map.not_negative;
      s.not_positive[m] = map.not_positive;
    }
  }
  dev::barrier();
}

// A parameter at any address. `place`: its index in the whole parameter.
template <class T> BNB_DEVICE T round_one(float p, const LaunchArgs& args, int64_t place, int64_t step) {
  if (!args.stochastic) return rounded<T>(p);
  const Random4 random = random_of(args.seed, place / 4, step);
  const uint32_t low = place & 1 ? random.word[1] : random.word[0], high = place & 1 ? random.word[3] : random.word[2];
  return stochastically_rounded<T>(p, place & 2 ? high : low);
}
BNB_DEVICE void store_one(const TensorState& e, const LaunchArgs& args, int64_t i, float p) {
  if (e.p_type == DType::f32) return store_bytes(e.p, i * 4, (i + 1) * 4, Bits<4>{{dev::float_bits(p)}});
  const uint16_t y = e.p_type == DType::f16 ? round_one<Half>(p, args, e.offset + i, e.step).bits
                                            : round_one<BFloat16>(p, args, e.offset + i, e.step).bits;
  store_bytes(e.p, i * 2, (i + 1) * 2, Bits<2>{{y}});
}

// The same for four parameters.
template <class T> BNB_DEVICE Bits<8> round_four(const float* p, const LaunchArgs& args, int64_t place, int64_t step) {
  if (!args.stochastic) return {{dev::pack<T>(p[0], p[1]), dev::pack<T>(p[2], p[3])}};
  uint32_t random[8] = {};
  BNB_UNROLL
  for (int half = 0; half < (place % 4 ? 2 : 1); ++half) {
    const Random4 four = random_of(args.seed, place / 4 + half, step);
    BNB_UNROLL
    for (int i = 0; i < 4; ++i) random[half * 4 + i] = four.word[i];
  }
  BNB_UNROLL
  for (int by = 1; by <= 2; by *= 2) {
    BNB_UNROLL
    for (int i = 0; i + by < 8; ++i) random[i] = place & by ? random[i + by] : random[i];
  }
  Bits<8> y = {};
  BNB_UNROLL
  for (int i = 0; i < 4; ++i) y.word[i / 2] |= uint32_t{stochastically_rounded<T>(p[i], random[i]).bits} << i % 2 * 16;
  return y;
}
BNB_DEVICE void store_four(const TensorState& e, const LaunchArgs& args, int64_t at, const float* p) {
  if (e.p_type == DType::f32)
    dev::store(e.p + at * 4, Bits<16>{{dev::float_bits(p[0]), dev::float_bits(p[1]), dev::float_bits(p[2]), dev::float_bits(p[3])}});
  else
    dev::store(e.p + at * 2, e.p_type == DType::f16 ? round_four<Half>(p, args, e.offset + at, e.step)
                                                    : round_four<BFloat16>(p, args, e.offset + at, e.step));
}

// absmax of a block from the bits of the largest magnitude per lane.
BNB_DEVICE float absmax_of(uint32_t largest) {
  BNB_UNROLL
  for (unsigned by = 1; by < dev::kWarp; by *= 2) {
    const uint32_t other = dev::shuffle_xor(largest, by);
    largest = other > largest ? other : largest;
  }
  return dev::bits_float(largest);
}
BNB_DEVICE float inverse(float absmax) { return dev::reciprocal(absmax < 1e-38f ? 1e-38f : absmax); }
BNB_DEVICE void take_greater(uint32_t& largest, float x) {
  const uint32_t magnitude = dev::float_bits(x) & 0x7fffffff;
  largest = magnitude > largest ? magnitude : largest;
}

template <class Rule, bool coded>
BNB_DEVICE void step_block(const TensorState& e, const LaunchArgs& args, const Shared<Rule, coded>& s, int64_t block) {
  using S = States<Rule, coded>;
  using Block = BlockRegisters<Rule, coded>;
  Block x(e, block, values(s));
  BNB_UNROLL
  for (int i = 0; i < kPerLane; ++i)
    if (float u = 0; x.update(e.hyper, i, u)) x.p[i] = S::apply_update(e, x.p[i], u);
  BNB_UNROLL
  for (int r = 0; r < kRows; ++r) store_four(e, args, Block::element(block, r), x.p + r * kPer);
  BNB_UNROLL
  for (int k = 0; k < Rule::states; ++k) {
    float scale = 0;
    if constexpr (coded) {
      uint32_t largest = 0;
      BNB_UNROLL
      for (int i = 0; i < kPerLane; ++i) take_greater(largest, x.s[k][i]);
      const float absmax = absmax_of(largest);
      if (dev::lane() == 0) *S::absmax(e, k, block) = absmax;
      scale = inverse(absmax);
    }
    BNB_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float* mine = x.s[k] + r * kPer;
      if constexpr (coded)
        dev::store(S::at(e, k) + Block::element(block, r), s.template codes<kPer>(args, k, mine, scale));
      else
        dev::store(S::at(e, k) + Block::element(block, r) * 4,
                   Bits<16>{{dev::float_bits(mine[0]), dev::float_bits(mine[1]), dev::float_bits(mine[2]), dev::float_bits(mine[3])}});
    }
  }
}

// A block that is not whole, or not aligned. 8-bit states take two passes, since absmax is needed before any code.
template <class Rule, bool coded>
BNB_DEVICE void step_rest(const TensorState& e, const LaunchArgs& args, const Shared<Rule, coded>& s, int64_t block) {
  using S = States<Rule, coded>;
  using Element = ElementStep<Rule, coded>;
  float scale[Rule::states] = {}, factor[Rule::states] = {};
  if constexpr (coded) {
    uint32_t largest[Rule::states] = {};
    BNB_UNROLL
    for (int k = 0; k < Rule::states; ++k) scale[k] = *S::absmax(e, k, block);
    for_lane(e, block, [&](int64_t i) {
      const Element x(e, i, values(s), scale);
      BNB_UNROLL
      for (int k = 0; k < Rule::states; ++k) take_greater(largest[k], x.s[k]);
    });
    BNB_UNROLL
    for (int k = 0; k < Rule::states; ++k) {
      const float absmax = absmax_of(largest[k]);
      if (dev::lane() == 0) *S::absmax(e, k, block) = absmax;
      factor[k] = inverse(absmax);
    }
  }
  for_lane(e, block, [&](int64_t i) {
    const Element x(e, i, values(s), scale);
    if (x.updated) store_one(e, args, i, S::apply_update(e, x.p, x.u));
    BNB_UNROLL
    for (int k = 0; k < Rule::states; ++k)
      if constexpr (coded)
        S::at(e, k)[i] = static_cast<uint8_t>(s.template codes<1>(args, k, &x.s[k], factor[k]).word[0]);
      else
        store_bytes(S::at(e, k), i * 4, (i + 1) * 4, Bits<4>{{dev::float_bits(x.s[k])}});
  });
}

template <class Rule, bool coded> BNB_KERNEL((kThreads<coded>), (kPerSm<Rule, coded>)) step(const LaunchArgs args) {
  auto& s = dev::shared<Shared<Rule, coded>>();
  if constexpr (coded) prepare<Rule>(args, s);
  for_work(
      args, s.tensor_states, [](const TensorState&) { return kChunk; },
      [&](const TensorState& e, int64_t, int64_t begin, int64_t end) {
        BNB_KEEP_LOOP
        for (int64_t b = begin + dev::warp(); b < end; b += kThreads<coded> / dev::kWarp) {
          if (e.vectors && (b + 1) * kBlock <= e.n)
            step_block<Rule, coded>(e, args, s, b);
          else
            step_rest<Rule, coded>(e, args, s, b);
        }
      });
}

template <class Rule, bool coded> void launch(LaunchArgs args, dev::Launch l) {
  constexpr int kCopies = 5;
  const auto& device = dev::device();
  l.shared = sizeof(Shared<Rule, coded>);
  if constexpr (coded) {
    args.copies = kCopies;  // fewer if two blocks would not fit a multiprocessor
    while (args.copies > 0 && 2 * (shared_bytes<Rule>(args.copies) + 1024) > device.shared_per_sm) --args.copies;
    l.shared = shared_bytes<Rule>(args.copies);
  }
  const int64_t most = int64_t{kPerSm<Rule, coded>} * device.sms, chunks = args.end - args.begin;
  l.grid = {static_cast<uint32_t>(chunks < most ? chunks : most)};
  l.threads = kThreads<coded>;
  dev::launch(l, step<Rule, coded>, args);
}

}  // namespace

void launch_step(Optimizer rule, bool coded, LaunchArgs args, dev::Launch l) {
  visit(rule, [&]<class Rule>(Rule) { coded ? launch<Rule, true>(args, l) : launch<Rule, false>(args, l); });
}

}  // namespace bnb::cuda::optim
