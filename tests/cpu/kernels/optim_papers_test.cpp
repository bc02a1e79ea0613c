// optimizer_step: every rule against its paper in fp64.
#include "cases/optim_cases.h"

namespace bnb::test {
namespace {

struct Exact {
  OptimizerConfig c;
  std::vector<double> p, m, n, v;  // n: AdEMAMix's slow average

  Exact(const OptimizerConfig& config, const std::vector<float>& start)
      : c(config), p(start.begin(), start.end()), m(p.size()), n(p.size()), v(p.size()) {}

  void step(const std::vector<float>& gradient, int64_t t) {
    const bool decoupled = !c.coupled_decay && (c.rule == adam || c.rule == lamb || c.rule == ademamix || c.rule == lion);
    const double T = static_cast<double>(t), c1 = c.bias_correction ? 1 - std::pow(c.beta1, T) : 1,
                 c2 = c.bias_correction ? 1 - std::pow(c.beta2, T) : 1;
    double alpha = c.alpha, beta3 = c.beta3;
    if (c.t_alpha) alpha *= std::min(1.0, T / static_cast<double>(c.t_alpha));
    if (c.t_beta3) {
      const double part = T / static_cast<double>(c.t_beta3), a = std::log(c.beta1), b = std::log(c.beta3);
      beta3 = std::min(c.beta3, std::exp(a * b / ((1 - part) * b + part * a)));
    }
    std::vector<double> u(p.size());
    double p2 = 0, u2 = 0;
    for (size_t i = 0; i < p.size(); ++i) {
      const double g = static_cast<double>(gradient[i]) + (decoupled ? 0 : c.weight_decay * p[i]);
      switch (c.rule) {
        case adam:
        case lamb:
          m[i] = c.beta1 * m[i] + (1 - c.beta1) * g;
          v[i] = c.beta2 * v[i] + (1 - c.beta2) * g * g;
          u[i] = m[i] / c1 / (std::sqrt(v[i] / c2) + c.eps);
          break;
        case ademamix:
          m[i] = c.beta1 * m[i] + (1 - c.beta1) * g;
          n[i] = beta3 * n[i] + (1 - beta3) * g;
          v[i] = c.beta2 * v[i] + (1 - c.beta2) * g * g;
          u[i] = (m[i] / c1 + alpha * n[i]) / (std::sqrt(v[i] / c2) + c.eps);
          break;
        case lion: {
          const double x = c.beta1 * m[i] + (1 - c.beta1) * g;
          u[i] = x > 0 ? 1 : x < 0 ? -1 : 0;
          m[i] = c.beta2 * m[i] + (1 - c.beta2) * g;
          break;
        }
        case momentum:
        case lars:
          m[i] = t == 1 ? g : c.beta1 * m[i] + (1 - c.dampening) * g;
          u[i] = c.nesterov ? g + c.beta1 * m[i] : m[i];
          break;
        case rmsprop:
          v[i] = c.beta1 * v[i] + (1 - c.beta1) * g * g;
          u[i] = g / (std::sqrt(v[i]) + c.eps);
          break;
        case adagrad:
          v[i] += g * g;
          u[i] = g / (std::sqrt(v[i]) + c.eps);
          break;
      }
      p2 += p[i] * p[i], u2 += u[i] * u[i];
    }
    const double limit = c.max_unorm * std::sqrt(p2), trust = c.max_unorm > 0 && p2 > 0 ? std::min(1.0, limit / std::sqrt(u2)) : 1;
    for (size_t i = 0; i < p.size(); ++i) p[i] = p[i] * (decoupled ? 1 - c.lr * c.weight_decay : 1) - c.lr * trust * u[i];
  }
};

// |x - y| / |y - start|: of the way that was gone.
double error(const std::vector<float>& x, const std::vector<double>& y, const std::vector<float>& start) {
  double wrong = 0, way = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double d = static_cast<double>(x[i]) - y[i], w = y[i] - static_cast<double>(start[i]);
    wrong += d * d, way += w * w;
  }
  return std::sqrt(wrong / way);
}

TEST(Optimizers, FollowTheirPapers) {
  for (const Optimizer rule : kRules)
    for (const auto& config : configs(rule)) {
      SCOPED_TRACE(std::string(name(rule)) + ", weight decay " + std::to_string(config.weight_decay));
      const int64_t n = 1000;
      const auto start = normals(1, n);
      Exact exact(config, start), even(config, start);
      Parameter<float> plain(rule, false, start), coded(rule, true, start);
      for (int64_t t = 1; t <= 100; ++t) {
        const auto g = gradient(n, t);
        exact.step(g, t);
        step(config, plain.with(g, t));
        // 8 bits: elements of one block differ by a factor of 10^3 at most. What is below that has the least second moment above 0.
        const auto alike = normals(static_cast<uint64_t>(500 + t), n);
        even.step(alike, t);
        step(config, coded.with(alike, t));
      }
      // Lion: a sign may turn where the sum of two terms is next to 0.
      EXPECT_LT(error(plain.p.values(), exact.p, start), rule == lion ? 2e-3 : 5e-5);
      EXPECT_LT(error(coded.p.values(), even.p, start), rule == lion ? 0.15 : 0.05);
    }
}

TEST(Optimizers, StayFiniteWithHugeAndTinyGradients) {
  constexpr float kRate = 1e-3f;
  for (const Optimizer rule : kRules)
    for (const bool coded : {false, true})
      for (const float size : {3e38f, 1e30f, 2e19f, 1e19f, 1e-30f, 1e-44f}) {
        SCOPED_TRACE(std::string(name(rule)) + " " + std::to_string(size));
        Parameter<float> x(rule, coded, normals(1, 600));
        for (int64_t t = 1; t <= 30; ++t) {
          auto g = normals(static_cast<uint64_t>(t), 600);
          for (float& v : g) v = std::clamp(v, -1.0f, 1.0f) * size;
          step({.rule = rule, .lr = rule == momentum || rule == lars ? 1e-38 : kRate, .max_unorm = rule == lamb || rule == lars ? 1.0 : 0},
               x.with(g, t));
        }
        const auto start = normals(1, 600), p = x.p.values();
        float way = 0;
        for (size_t i = 0; i < p.size(); ++i) way = std::max(way, std::fabs(p[i] - start[i]));
        EXPECT_TRUE(coded || rule == momentum || rule == lars || way < 30 * kRate * 20) << "a step is about lr, whatever the gradient";
        for (const auto* values : {&x.p, &x.state1, &x.state2, &x.absmax1, &x.absmax2})
          for (const float v : values->values()) ASSERT_TRUE(std::isfinite(v));
      }
}

}  // namespace
}  // namespace bnb::test
