// optimizer_step: bit by bit against the plain rule on every instruction set.
#include "cases/optim_cases.h"
#include "common/optim_rules.h"

namespace bnb::test {
namespace {

// The plain rule, each operation rounded as src/common/optim_rules.h writes it
struct Plain {
  using F32 = float;
  static float set1(float x) { return x; }
  static float mul(float a, float b) { return a * b; }
  static float add(float a, float b) { return a + b; }
  static float fma(float a, float b, float c) { return std::fma(a, b, c); }
  static float div(float a, float b) { return a / b; }
  static float sqrt(float x) { return std::sqrt(x); }
  static float min(float a, float b) { return a < b ? a : b; }
  static float max(float a, float b) { return a > b ? a : b; }
  static float sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : 0.0f; }
};

struct State {
  std::vector<float> p;  // of the type's values
  std::vector<std::vector<float>> s;
  std::vector<std::vector<uint8_t>> codes;
  std::vector<std::vector<float>> absmax;
};

template <class P> void plain_step(const OptimizerConfig& c, bool coded, const std::vector<float>& gradient, int64_t t, State& x) {
  const Hyper h = hyper_at(c, t, 1.0f);
  const size_t n = x.p.size(), states = states_of(c.rule);
  const auto map_of = [&](size_t k) -> const std::vector<float>& {
    return has_second_state(c.rule) && k == states - 1 ? unsigned_map() : signed_map();
  };
  if (coded)
    for (size_t k = 0; k < states; ++k) x.s[k] = reference::dequantize_blockwise<float>(map_of(k), x.codes[k], x.absmax[k], kBlock);
  for (size_t i = 0; i < n; ++i) {
    const float raw = gradient[i] * h.gnorm_scale, g = std::fma(x.p[i], h.coupled, raw);
    const bool squares = c.rule != lion && c.rule != momentum && c.rule != lars;
    if (!std::isfinite(squares ? g * g : g) || (h.skip_zeros && raw == 0)) continue;
    const float u = visit(c.rule, [&]<class Rule>(Rule) {
      float s[Rule::states];
      for (int k = 0; k < Rule::states; ++k) s[k] = x.s[static_cast<size_t>(k)][i];
      const float result = Rule::template direction<Plain>(g, s, h);
      for (int k = 0; k < Rule::states; ++k) x.s[static_cast<size_t>(k)][i] = s[k];
      return result;
    });
    x.p[i] = to_float(rounded<P>(std::fma(u, -h.rate, x.p[i] * h.keep)));
  }
  if (!coded) return;
  const reference::Nearest near_signed(signed_map()), near_unsigned(unsigned_map());
  for (size_t k = 0; k < states; ++k) {
    const bool second = &map_of(k) == &unsigned_map();
    const auto q = reference::quantize_blockwise(second ? near_unsigned : near_signed, x.s[k], kBlock);
    x.codes[k] = q.codes, x.absmax[k] = q.absmax;
    const bool root = second || c.rule == rmsprop || c.rule == adagrad;
    for (size_t i = 0; i < n; ++i) {
      if (!root && x.s[k][i] < 0 && x.codes[k][i] == 127) x.codes[k][i] = 126;
      if (root && x.s[k][i] > 0 && x.codes[k][i] == (second ? 0 : 127)) ++x.codes[k][i];
    }
  }
}

// Gradients that hold everything: normal and tiny ones, zeros, infinities, NaN.
std::vector<float> nasty(int64_t n, int64_t t) {
  auto g = gradient(n, t);
  for (size_t i = 0; i < g.size(); ++i) {
    const uint64_t r = random(static_cast<uint64_t>(1000 + t), i) % 400;
    if (r == 0) g[i] = std::numeric_limits<float>::quiet_NaN();
    if (r == 1) g[i] = -std::numeric_limits<float>::infinity();
    if (r == 2) g[i] = -0.0f;
    if (r == 3) g[i] = 1e25f;
    if (r == 4) g[i] = 1e18f;  // beside it the square of the next is above 0, but 0 by the scale of the block
    if (r == 5) g[i] = 1e-20f;
  }
  return g;
}

template <class P, class G> void compare(Optimizer rule, bool coded, int64_t n, bool skip_zeros) {
  SCOPED_TRACE(std::string(name(rule)) + (coded ? ", 8 bits, n = " : ", 32 bits, n = ") + std::to_string(n));
  OptimizerConfig config = configs(rule)[1];
  config.max_unorm = 0;
  config.skip_zeros = skip_zeros;
  const auto start = rounded_all<P>(normals(3, n));
  const auto size = static_cast<size_t>(n);
  State expected{to_floats(start), {}, {}, {}};
  expected.s.assign(states_of(rule), std::vector<float>(size));
  expected.codes.assign(states_of(rule), std::vector<uint8_t>(size));
  expected.absmax.assign(states_of(rule), std::vector<float>(static_cast<size_t>(blocks_of(n, kBlock))));
  constexpr int64_t kSteps = 3;
  std::vector<std::vector<G>> gradients;
  for (int64_t t = 1; t <= kSteps; ++t) {
    gradients.push_back(rounded_all<G>(nasty(n, t)));
    plain_step<P>(config, coded, to_floats(gradients.back()), t, expected);
  }
  const auto joined = [&](const auto& parts) {
    auto all = parts[0];
    if (first_states(rule) == 2) all.insert(all.end(), parts[1].begin(), parts[1].end());
    return all;
  };
  for_each_isa([&] {
    Parameter<P, G> x(rule, coded, start, 1 + sizeof(P));
    for (int64_t t = 1; t <= kSteps; ++t) step(config, x.with(gradients[static_cast<size_t>(t - 1)], t));
    EXPECT_TRUE(same(x.p.values(), rounded_all<P>(expected.p))) << "p";
    if (!coded) {
      EXPECT_TRUE(same(x.state1.values(), joined(expected.s))) << "state 1";
      if (!has_second_state(rule)) return;
      EXPECT_TRUE(same(x.state2.values(), expected.s.back())) << "state 2";
      return;
    }
    EXPECT_TRUE(same(x.codes1.values(), joined(expected.codes))) << "codes 1";
    EXPECT_TRUE(same(x.absmax1.values(), joined(expected.absmax))) << "absmax 1";
    if (!has_second_state(rule)) return;
    EXPECT_TRUE(same(x.codes2.values(), expected.codes.back())) << "codes 2";
    EXPECT_TRUE(same(x.absmax2.values(), expected.absmax.back())) << "absmax 2";
  });
}

template <class T> class OptimizerBytes : public ::testing::Test {};
TYPED_TEST_SUITE(OptimizerBytes, AllTypes, TypeNames);

TYPED_TEST(OptimizerBytes, AreThoseOfThePlainRule) {
  for (const Optimizer rule : kRules)
    for (const bool coded : {false, true})
      for (const int64_t n : {int64_t{1}, int64_t{17}, int64_t{255}, int64_t{256}, int64_t{257}, int64_t{2000}})
        compare<TypeParam, TypeParam>(rule, coded, n, n % 2 == 0);
}
TYPED_TEST(OptimizerBytes, WithGradientsOfAnotherType) {
  for (const Optimizer rule : {adam, momentum})
    for (const bool coded : {false, true}) {
      compare<TypeParam, float>(rule, coded, 1000, false);
      compare<TypeParam, BFloat16>(rule, coded, 1000, false);
      compare<TypeParam, Half>(rule, coded, 1000, false);
    }
}

TEST(Optimizers, TakeAnyMap) {
  auto linear = create_linear_map(), linear_unsigned = create_linear_map(false);
  Parameter<float> x(adam, true, normals(1, 1000));
  std::vector<uint8_t> before;
  for_each_isa([&] {
    Parameter<float> y(adam, true, normals(1, 1000));
    for (int64_t t = 1; t <= 3; ++t)
      optimizer_step({.config = {}, .tensors = {&y.with(gradient(1000, t), t), 1}, .code1 = linear, .code2 = linear_unsigned});
    if (before.empty()) before = y.codes1.values();
    EXPECT_TRUE(same(y.codes1.values(), before));
  });
  const float* map = linear.data();
  const auto zero = static_cast<uint8_t>(std::ranges::lower_bound(linear, 0.0f) - linear.begin());
  EXPECT_EQ(map[zero], 0);
  EXPECT_NE(std::ranges::count(before, zero), 1000);
}

// Many tensors of all kinds in one call, in one thread or several, or each in a call of its own.
TEST(Optimizers, DoNotDependOnThreadsOrCompany) {
  for (const Optimizer rule : kRules) {
    SCOPED_TRACE(name(rule));
    const OptimizerConfig config = configs(rule)[1];
    const int64_t sizes[] = {5, 40000, 0, 256, 300, 70001};
    const auto run = [&](bool together) {
      std::vector<std::unique_ptr<Parameter<BFloat16, float>>> all;
      for (size_t i = 0; i < std::size(sizes); ++i)
        all.push_back(std::make_unique<Parameter<BFloat16, float>>(rule, i % 3 != 0, rounded_all<BFloat16>(normals(i, sizes[i]))));
      for (int64_t t = 1; t <= 2; ++t) {
        std::vector<OptimizerTensor> tensors;
        for (auto& x : all) tensors.push_back(x->with(gradient(x->n, t), t));
        if (together) {
          step(config, tensors);
        } else {
          for (auto& tensor : tensors) step(config, tensor);
        }
      }
      std::vector<uint8_t> bytes;
      for (auto& x : all) {
        const auto append = [&](const auto& values) {
          const auto raw = std::as_bytes(std::span(values));
          for (const auto b : raw) bytes.push_back(std::to_integer<uint8_t>(b));
        };
        append(x->p.values()), append(x->state1.values()), append(x->codes1.values()), append(x->codes2.values());
      }
      return bytes;
    };
    const auto expected = run(true);
    EXPECT_TRUE(same(run(false), expected)) << "each alone";
    for_each_schedule([&](std::string_view how) { EXPECT_TRUE(same(run(true), expected)) << how; });
  }
}

TEST(Optimizers, GiveTheNormOfTheUpdateAndTakeThatOfTheParameter) {
  const int64_t n = 100000;
  const auto start = normals(1, n), g = normals(2, n);
  const OptimizerConfig config{.rule = lamb, .lr = 0.1, .max_unorm = 0.5};
  std::vector<float> first;
  for_each_isa([&] {
    Parameter<float> x(lamb, false, start), y(lamb, false, start), zero(lamb, false, std::vector<float>(static_cast<size_t>(n)));
    float norm = 0;
    x.with(g, 1).u_norm = &norm;
    step(config, x.t);
    EXPECT_NEAR(norm, std::sqrt(static_cast<double>(n)), 0.1);  // |m / sqrt(v)| is 1 everywhere in step 1
    y.with(g, 1).p_norm = 10.0f;
    step(config, y.t);
    const auto p = y.p.values();
    double way = 0;
    for (size_t i = 0; i < p.size(); ++i) way += std::pow(static_cast<double>(p[i]) - static_cast<double>(start[i]), 2);
    EXPECT_NEAR(std::sqrt(way), 0.1 * 0.5 * 10, 1e-3);
    step(config, zero.with(g, 1));  // no ratio to a norm of 0
    EXPECT_NEAR(std::fabs(zero.p.values()[0]), 0.1, 1e-5);
    if (first.empty()) first = x.p.values();
    EXPECT_TRUE(same(x.p.values(), first));
  });
}

TEST(Optimizers, RoundStochasticallyByPlace) {
  const int64_t n = 3000;
  const OptimizerConfig config{.rule = momentum, .lr = 1e-3, .seed = 42};
  const std::vector<BFloat16> start(static_cast<size_t>(n), rounded<BFloat16>(1.0f));
  const std::vector<float> g(static_cast<size_t>(n), 1.0f);
  Parameter<BFloat16, float> whole(momentum, false, start);
  step(config, whole.with(g, 7));
  const auto p = to_floats(whole.p.values());
  double mean = 0;
  for (const float v : p) mean += static_cast<double>(v) / static_cast<double>(n);
  EXPECT_NEAR(mean, 0.999, 1.5e-4);  // to nearest: 1 everywhere; neighbours are 2^-8 and 2^-9 away
  EXPECT_TRUE(std::ranges::count(p, 1.0f) > 0 && std::ranges::count(p, 1.0f) < n);
  for_each_isa([&] {
    for (const int64_t cut : {1, 255, 1000}) {
      const auto at = static_cast<std::ptrdiff_t>(cut);
      Parameter<BFloat16, float> head(momentum, false, {start.begin(), start.begin() + at}),
          tail(momentum, false, {start.begin() + at, start.end()});
      tail.t.offset = cut;
      step(config, head.with({g.begin(), g.begin() + at}, 7));
      step(config, tail.with({g.begin() + at, g.end()}, 7));
      auto parts = head.p.values();
      for (const auto v : tail.p.values()) parts.push_back(v);
      EXPECT_TRUE(same(parts, whole.p.values()));
    }
  });
}

TEST(Optimizers, HaveNames) {
  for (const Optimizer rule : kRules) EXPECT_EQ(optimizer_of(name(rule)), rule);
  EXPECT_EQ(optimizer_of("adamw"), std::nullopt);
}

RC_GTEST_PROP(Optimizers, AreAlikeOnEveryIsa, ()) {
  const auto rule = *rc::gen::element(adam, lamb, ademamix, lion, momentum, lars, rmsprop, adagrad);
  const bool coded = *rc::gen::arbitrary<bool>();
  const auto n = *rc::gen::inRange<int64_t>(0, 1500);
  const auto seed = *rc::gen::inRange<uint64_t>(0, 1000);
  OptimizerConfig config = configs(rule)[static_cast<size_t>(seed % 3)];
  const auto start = rounded_all<Half>(normals(seed, n));
  std::vector<uint8_t> codes;
  std::vector<Half> p;
  std::vector<float> state;
  bool first = true;
  for (const auto isa : supported_isas()) {
    const ForcedIsa forced(isa);
    Parameter<Half, float> x(rule, coded, start, seed % 3);
    for (int64_t t = 1; t <= 2; ++t) step(config, x.with(waves<float>(seed + static_cast<uint64_t>(t), n), t));
    if (first) codes = x.codes1.values(), p = x.p.values(), state = x.state1.values();
    first = false;
    require(same(x.codes1.values(), codes), "codes on " + std::string(isa));
    require(same(x.state1.values(), state), "state on " + std::string(isa));
    require(same(x.p.values(), p), "p on " + std::string(isa));
  }
}

#if !defined(BNB_TEST_DEVICE)  // there the maps are not looked at; the other checks are the same
TEST(Optimizers, RefuseWrongArguments) {
  const auto refused = [](const std::string& argument, const std::function<void(OptimizerStep&, OptimizerTensor&)>& spoil,
                          bool coded = true) {
    Parameter<float> x(adam, coded, normals(1, 300));
    const auto before = x.p.values();
    OptimizerTensor& t = x.with(normals(2, 300), 1);
    OptimizerStep s{.config = {}, .tensors = {&t, 1}, .code1 = signed_map(), .code2 = unsigned_map()};
    spoil(s, t);
    try {
      optimizer_step(s);
      ADD_FAILURE() << argument << ": no error";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Errc::invalid_argument);
      EXPECT_TRUE(std::string(e.what()).starts_with("optimizer_step: " + argument)) << e.what();
    }
    EXPECT_TRUE(same(x.p.values(), before));
  };
  refused("rule", [](auto& s, auto&) { s.config.rule = static_cast<Optimizer>(9); });
  refused("offset is -3", [](auto&, auto& t) { t.offset = -3; });  // the place of a random word
  refused("offset", [](auto&, auto& t) { t.offset = std::numeric_limits<int64_t>::max() - 299; });
  refused("lr", [](auto& s, auto&) { s.config.lr = std::nan(""); });
  refused("lr", [](auto& s, auto&) { s.config.lr = -1; });
  refused("lr is", [](auto& s, auto&) { s.config.lr = 1e39; });
  refused("lr * weight_decay is", [](auto& s, auto&) { s.config.lr = s.config.weight_decay = 1e30; });
  refused("alpha", [](auto& s, auto&) { s.config.alpha = -1e39; });
  refused("eps", [](auto& s, auto&) { s.config.eps = -1; });
  refused("weight_decay", [](auto& s, auto&) { s.config.weight_decay = std::numeric_limits<double>::infinity(); });
  refused("max_unorm", [](auto& s, auto&) { s.config.max_unorm = -1; });
  refused("beta1", [](auto& s, auto&) { s.config.beta1 = 1; });
  refused("beta2", [](auto& s, auto&) { s.config.beta2 = -0.1; });
  refused("beta3", [](auto& s, auto&) { s.config.rule = ademamix, s.config.beta3 = 2; });
  refused("step", [](auto&, auto& t) { t.step = 0; });
  refused("g", [](auto&, auto& t) { t.g.size = 299; });
  refused("g", [](auto&, auto& t) { t.g.data = nullptr; });
  refused("p", [](auto&, auto& t) { t.p.dtype = static_cast<DType>(7); });
  refused("p", [](auto&, auto& t) { t.p.size = -1, t.g.size = -1; });
  refused("gnorm_scale", [](auto&, auto& t) { t.gnorm_scale = std::numeric_limits<float>::infinity(); });
  refused("codes1", [](auto&, auto& t) { t.codes1 = t.codes1.first(299); });
  refused("codes2", [](auto&, auto& t) { t.codes2 = {}; });
  refused("codes2 is 300 elements", [](auto&, auto& t) { t.p.size = t.g.size = 299, t.codes1 = t.codes1.first(299); });
  refused("p is in the memory of g", [](auto&, auto& t) { t.g = t.p; });
  refused("codes2 is in the memory of codes1", [](auto&, auto& t) { t.codes2 = t.codes1; });
  refused("state1 is in the memory of p", [](auto&, auto& t) { t.state1 = {static_cast<float*>(t.p.data), 300}; }, false);
  refused("absmax1", [](auto&, auto& t) { t.absmax1 = t.absmax1.first(1); });
  refused("absmax2", [](auto&, auto& t) { t.absmax2 = t.absmax2.first(1); });
  refused("state1", [](auto&, auto& t) { t.state1 = t.state1.first(299); }, false);
  refused("state2", [](auto&, auto& t) { t.state2 = {}; }, false);
  refused("code1", [](auto& s, auto&) { s.code1 = s.code1.first(255); });
  refused("code2", [](auto& s, auto&) { s.code2 = {}; });
  static std::vector<float> falling(256, 0.0f);
  falling[7] = -1;
  refused("code2", [](auto& s, auto&) { s.code2 = falling; });
}

TEST(Optimizers, NameTheTensorOfManyThatIsWrong) {
  std::vector<std::unique_ptr<Parameter<float>>> all;
  std::vector<OptimizerTensor> tensors;
  for (uint64_t i = 0; i < 200; ++i) {
    all.push_back(std::make_unique<Parameter<float>>(adam, i % 2 == 0, normals(i, 20)));
    tensors.push_back(all.back()->with(normals(i + 1, 20), 1));
  }
  const auto message = [&](const std::function<void()>& spoil) -> std::string {
    const auto kept = tensors;
    spoil();
    try {
      step({}, tensors);
    } catch (const Error& e) {
      tensors = kept;
      return e.what();
    }
    return "no error";
  };
  EXPECT_EQ(message([&] { tensors[137].step = 0; }), "optimizer_step: step[137] is 0, expected 1 or more");
  EXPECT_EQ(message([&] { tensors[199].state2 = {}; }), "optimizer_step: state2[199] is 0 elements, expected 20 (as many as p)");
  EXPECT_EQ(message([&] { tensors[7].state1 = tensors[133].state2; }),
            "optimizer_step: state2[133] is in the memory of state1[7], expected memory of its own");
  for (uint64_t i = 0; i < 200; ++i) EXPECT_TRUE(same(all[i]->p.values(), normals(i, 20)));
}
#endif

}  // namespace
}  // namespace bnb::test
