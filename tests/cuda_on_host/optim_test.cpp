// optimizer_step on CUDA against the CPU's bytes: tensors of all kinds in one call, trust ratios, the clock, launches, a long run.
#include <bnb/cuda.h>

#include <cmath>

#include "cases/cases.h"
#include "common/formats.h"

namespace bnb::test {
namespace {

using enum Optimizer;
constexpr Optimizer kRules[] = {adam, lamb, ademamix, lion, momentum, lars, rmsprop, adagrad};

constexpr size_t size_of_blocks(int64_t n) { return static_cast<size_t>(blocks_of(n, kOptimizerBlock)); }

// One tensor and its states, `offset` bytes off any alignment.
struct Parameter {
  DType p_type, g_type;
  int64_t n;
  size_t offset;
  std::vector<uint8_t> p, g, state1, state2, codes1, codes2;
  std::vector<float> absmax1, absmax2;
  float u_norm = -1;
  OptimizerTensor t;

  Parameter(Optimizer rule, bool coded, DType p_type, DType g_type, int64_t n, uint64_t seed, size_t offset)
      : p_type(p_type), g_type(g_type), n(n), offset(offset) {
    const auto elements = static_cast<size_t>(n), first = elements * static_cast<size_t>(first_states(rule));
    const bool two = has_second_state(rule), squares = rule == rmsprop || rule == adagrad;  // no negative states
    p = converted(p_type, normals(seed, n));
    g.resize(offset + elements * static_cast<size_t>(size_of(g_type)));
    if (coded) {
      // Codes as in mid-training: all values, and blocks whose absmax is 0.
      codes1 = random_bytes(seed + 1, static_cast<int64_t>(offset + first));
      if (squares)
        for (uint8_t& c : codes1) c |= 0x80;
      absmax1 = random_absmax(seed + 2, static_cast<int64_t>(size_of_blocks(n)) * first_states(rule));
      for (float& a : absmax1) a = std::fmod(a, 1.0f);
      if (two) codes2 = random_bytes(seed + 3, static_cast<int64_t>(offset + elements));
      if (two) absmax2 = random_absmax(seed + 4, static_cast<int64_t>(size_of_blocks(n)));
      for (float& a : absmax2) a = std::fmod(a, 1.0f);
    } else {
      state1 = converted(DType::f32, normals(seed + 1, static_cast<int64_t>(first)), squares);
      if (two) state2 = converted(DType::f32, normals(seed + 2, n), true);
    }
  }
  Parameter(const Parameter&) = delete;

  std::vector<uint8_t> converted(DType type, std::vector<float> values, bool positive = false) const {
    std::vector<uint8_t> bytes(offset + values.size() * static_cast<size_t>(size_of(type)));
    for (float& v : values) v = positive ? std::fabs(v) : v;
    visit(type, [&]<class T>(T) {
      const auto typed = rounded_all<T>(values);
      if (!typed.empty()) std::memcpy(bytes.data() + offset, typed.data(), typed.size() * sizeof(T));
    });
    return bytes;
  }

  // Gradients of all magnitudes, with NaN, infinities and zeros.
  const OptimizerTensor& at(int64_t step, uint64_t seed) {
    auto x = waves<float>(seed + static_cast<uint64_t>(step), n);
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = std::fmod(x[i], 1e3f);
      const uint64_t r = random(seed + 9, i + static_cast<size_t>(step)) % 60;
      if (r == 0) x[i] = NAN;
      if (r == 1) x[i] = INFINITY;
      if (r == 2) x[i] = -0.0f;
    }
    g = converted(g_type, x);
    const auto floats = [&](std::vector<uint8_t>& bytes) {
      return bytes.empty() ? std::span<float>() : std::span(reinterpret_cast<float*>(bytes.data() + offset), (bytes.size() - offset) / 4);
    };
    const auto codes = [&](std::vector<uint8_t>& bytes) { return bytes.empty() ? std::span<uint8_t>() : std::span(bytes).subspan(offset); };
    t.p = {p.data() + offset, p_type, n};
    t.g = {g.data() + offset, g_type, n};
    t.state1 = floats(state1);
    t.state2 = floats(state2);
    t.codes1 = codes(codes1);
    t.codes2 = codes(codes2);
    t.absmax1 = absmax1;
    t.absmax2 = absmax2;
    t.step = step;
    t.u_norm = &u_norm;
    return t;
  }
  void expect_same(const Parameter& other) const {
    EXPECT_TRUE(same(p, other.p)) << "p";
    EXPECT_TRUE(same(state1, other.state1)) << "state1";
    EXPECT_TRUE(same(state2, other.state2)) << "state2";
    EXPECT_TRUE(same(codes1, other.codes1)) << "codes1";
    EXPECT_TRUE(same(codes2, other.codes2)) << "codes2";
    EXPECT_TRUE(same(absmax1, other.absmax1)) << "absmax1";
    EXPECT_TRUE(same(absmax2, other.absmax2)) << "absmax2";
    EXPECT_TRUE(same(std::vector{u_norm}, std::vector{other.u_norm})) << "u_norm";
  }
};

const std::vector<float>& map_of(bool is_signed) {
  static const auto both = std::pair(create_dynamic_map(), create_dynamic_map(false));
  return is_signed ? both.first : both.second;
}

using Tensors = std::vector<std::unique_ptr<Parameter>>;
template <class Step> void run(Tensors& all, const OptimizerConfig& config, int64_t step, Step&& take) {
  std::vector<OptimizerTensor> tensors;
  for (size_t i = 0; i < all.size(); ++i) tensors.push_back(all[i]->at(step, 10 * i));
  for (size_t i = 0; i < all.size(); ++i) {
    tensors[i].gnorm_scale = i % 3 == 0 ? 1.0f : 0.37f;
    tensors[i].offset = static_cast<int64_t>(i) * 1001;
    if (i % 5 == 4) tensors[i].p_norm = 3.25f;
    tensors[i].step += static_cast<int64_t>(i % 2);
  }
  take(OptimizerStep{.config = config, .tensors = tensors, .code1 = map_of(true), .code2 = map_of(false)});
}

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

// Every pair of types, both widths of states, odd sizes, any alignment.
Tensors mixture(Optimizer rule) {
  Tensors all;
  constexpr int64_t kSizes[] = {1, 255, 256, 257, 1024, 0, 4097, 3, 20000};
  for (size_t i = 0; i < 18; ++i)
    all.push_back(std::make_unique<Parameter>(rule, i % 2 == 0, kTypes[i % 3], kTypes[i / 3 % 3], kSizes[i % std::size(kSizes)], 100 * i,
                                              i % 4 == 3 ? 4 * (i % 3) + 1 : 0));
  return all;
}

OptimizerConfig config_of(Optimizer rule, size_t variant) {
  OptimizerConfig c{.rule = rule, .lr = 1e-2, .weight_decay = 0.1};
  if (variant == 0) return c;
  c.max_unorm = 0.02;
  c.dampening = 0.25;
  c.t_alpha = 9;
  c.t_beta3 = 7;
  c.skip_zeros = true;
  c.nesterov = true;
  if (variant == 1) return c;
  c.bias_correction = false;
  c.coupled_decay = true;
  c.seed = 0x123456789abcdef;
  return c;
}

TEST(CudaOptimizers, HaveTheBytesOfTheCpu) {
  for (const Optimizer rule : kRules)
    for (size_t variant = 0; variant < 3; ++variant) {
      SCOPED_TRACE(std::string(name(rule)) + ", variant " + std::to_string(variant));
      const auto config = config_of(rule, variant);
      auto expected = mixture(rule);
      for (int64_t t = 1; t <= 2; ++t) run(expected, config, t, [](const OptimizerStep& s) { bnb::optimizer_step(s); });
      for_each_isa([&] {
        auto all = mixture(rule);
        for (int64_t t = 1; t <= 2; ++t) run(all, config, t, [](const OptimizerStep& s) { test::optimizer_step(s); });
        for (size_t i = 0; i < all.size(); ++i) {
          SCOPED_TRACE("tensor " + std::to_string(i) + ": " + std::to_string(all[i]->n) + " of " + std::string(name(all[i]->p_type)) +
                       ", gradients " + std::string(name(all[i]->g_type)));
          all[i]->expect_same(*expected[i]);
        }
      });
      if (::testing::Test::HasFailure()) return;
    }
}

// Enough blocks that a piece has more than the least number of them, and that grids loop.
TEST(CudaOptimizers, LargeNormsHaveTheBytesOfTheCpu) {
  for (const bool coded : {false, true}) {
    const OptimizerConfig config{.rule = lamb, .lr = 1e-2, .max_unorm = 0.01};
    constexpr int64_t n = 128 * 64 * 256 + 5000;
    Tensors expected, all;
    expected.push_back(std::make_unique<Parameter>(lamb, coded, DType::bf16, DType::f32, n, 5, 0));
    all.push_back(std::make_unique<Parameter>(lamb, coded, DType::bf16, DType::f32, n, 5, 0));
    run(expected, config, 3, [](const OptimizerStep& s) { bnb::optimizer_step(s); });
    run(all, config, 3, [](const OptimizerStep& s) { test::optimizer_step(s); });
    all[0]->expect_same(*expected[0]);
  }
}

TEST(CudaOptimizers, CountOnByTheClock) {
  for (const Optimizer rule : {adam, ademamix, momentum}) {
    OptimizerConfig config = config_of(rule, 1);
    config.seed = 99;
    auto expected = mixture(rule), all = mixture(rule);
    int64_t clock = 0;
    for (int64_t t = 1; t <= 3; ++t) {
      run(expected, config, t, [](const OptimizerStep& s) { bnb::optimizer_step(s); });
      run(all, config, t, [&](const OptimizerStep& s) {
        std::vector<OptimizerTensor> tensors(s.tensors.begin(), s.tensors.end());
        for (auto& x : tensors) x.step -= t - 1;  // as in a graph captured in step 1
        test::optimizer_step({.config = s.config, .tensors = tensors, .code1 = s.code1, .code2 = s.code2}, &clock);
      });
      EXPECT_EQ(clock, t);
    }
    for (size_t i = 0; i < all.size(); ++i) all[i]->expect_same(*expected[i]);
  }
  int64_t clock = 7;
  test::optimizer_step({}, &clock);
  EXPECT_EQ(clock, 8);
}

TEST(CudaOptimizers, MapsOfAnyKind) {
  std::vector<float> random_map = normals(3, 256), same_bucket(256), no_sign(256);
  std::ranges::sort(random_map);
  for (size_t i = 0; i < 256; ++i) {
    same_bucket[i] = 0.5f + static_cast<float>(i) * 1e-4f;  // several thresholds in a bucket
    no_sign[i] = static_cast<float>(i) / 255;
  }
  for (const auto& first : {create_linear_map(), random_map, same_bucket, no_sign}) {
    const auto step_with = [&](Tensors& all, auto&& take) {
      run(all, config_of(adam, 0), 1, [&](OptimizerStep s) {
        s.code1 = first;
        s.code2 = no_sign;
        take(s);
      });
    };
    auto expected = mixture(adam), all = mixture(adam);
    step_with(expected, [](const OptimizerStep& s) { bnb::optimizer_step(s); });
    step_with(all, [](const OptimizerStep& s) { test::optimizer_step(s); });
    for (size_t i = 0; i < all.size(); ++i) all[i]->expect_same(*expected[i]);
  }
}

TEST(CudaOptimizers, AThousandStepsOfAdam8bit) {
  const OptimizerConfig config{.rule = adam, .lr = 1e-3, .weight_decay = 0.01};
  Tensors expected, all;
  for (auto* tensors : {&expected, &all}) {
    tensors->push_back(std::make_unique<Parameter>(adam, true, DType::bf16, DType::bf16, 515, 1, 0));
    auto& x = *tensors->back();
    for (auto* codes : {&x.codes1, &x.codes2}) std::ranges::fill(*codes, uint8_t{0});
    for (auto* absmax : {&x.absmax1, &x.absmax2}) std::ranges::fill(*absmax, 0.0f);
  }
  for (int64_t t = 1; t <= 1000; ++t) {
    run(expected, config, t, [](const OptimizerStep& s) { bnb::optimizer_step(s); });
    run(all, config, t, [](const OptimizerStep& s) { test::optimizer_step(s); });
  }
  all[0]->expect_same(*expected[0]);
}

// 500 tensors with states of both widths take four kernels.
TEST(CudaOptimizers, ManyTensorsTakeFewKernels) {
  const OptimizerConfig config{.rule = adam};
  Tensors expected, all;
  for (size_t i = 0; i < 500; ++i)
    for (auto* tensors : {&expected, &all})
      tensors->push_back(
          std::make_unique<Parameter>(adam, i % 2 == 0, kTypes[i % 3], kTypes[i % 3], 40 + static_cast<int64_t>(i) % 300, i, 0));
  run(expected, config, 1, [](const OptimizerStep& s) { bnb::optimizer_step(s); });
  run(all, config, 1, [](const OptimizerStep& s) {
    EXPECT_NE(cuda::describe_optimizer_step(s).find(" 250 with 8 bits, "), std::string::npos) << cuda::describe_optimizer_step(s);
    EXPECT_NE(cuda::describe_optimizer_step(s).find(" 4 kernels, "), std::string::npos) << cuda::describe_optimizer_step(s);
    EXPECT_LE(cuda::optimizer_workspace(s), 1 << 20);
    test::optimizer_step(s);
  });
  for (size_t i = 0; i < all.size(); ++i) all[i]->expect_same(*expected[i]);
}

TEST(CudaOptimizers, NameTheWrongArgument) {
  Parameter x(adam, true, DType::f32, DType::f32, 300, 1, 0);
  std::vector<OptimizerTensor> tensors{x.at(1, 1)};
  OptimizerStep s{.config = {}, .tensors = tensors, .code1 = map_of(true), .code2 = map_of(false)};
  const auto message = [&](void* workspace) -> std::string {
    try {
      cuda::optimizer_step(s, workspace, nullptr, nullptr);
    } catch (const Error& e) { return e.what(); }
    return "no error";
  };
  const auto bytes = std::to_string(cuda::optimizer_workspace(s));
  EXPECT_EQ(message(nullptr), "optimizer_step: workspace is null, expected " + bytes + " bytes aligned to 256");
  EXPECT_EQ(message(x.p.data() + 1), "optimizer_step: workspace is not aligned, expected " + bytes + " bytes aligned to 256");
  tensors[0].codes2 = tensors[0].codes2.first(299);
  EXPECT_EQ(message(nullptr), "optimizer_step: codes2 is 299 elements, expected 300 (as many as p)");
}

}  // namespace
}  // namespace bnb::test
