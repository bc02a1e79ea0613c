// Cases of optimizer_step: one tensor with its states, configurations of every rule, gradients.
#pragma once

#include <cmath>

#include "cases/cases.h"

namespace bnb::test {
namespace {

using enum Optimizer;
constexpr Optimizer kRules[] = {adam, lamb, ademamix, lion, momentum, lars, rmsprop, adagrad};
static_assert(std::size(kRules) == kOptimizers);
constexpr int64_t kBlock = kOptimizerBlock;

const std::vector<float>& signed_map() {
  static const auto map = create_dynamic_map();
  return map;
}
const std::vector<float>& unsigned_map() {
  static const auto map = create_dynamic_map(false);
  return map;
}

inline size_t states_of(Optimizer rule) { return static_cast<size_t>(first_states(rule) + has_second_state(rule)); }

// One tensor with its states, guarded against writes outside.
template <class P, class G = P> struct Parameter {
  int64_t n, blocks;
  Output<P> p;
  std::vector<G> g;
  Output<float> state1, state2, absmax1, absmax2;
  Output<uint8_t> codes1, codes2;
  OptimizerTensor t;

  Parameter(Optimizer rule, bool coded, const std::vector<P>& start, size_t offset = 0)
      : n(static_cast<int64_t>(start.size())),
        blocks(blocks_of(n, kBlock)),
        p(n, offset),
        state1(coded ? 0 : first_states(rule) * n),
        state2(coded || !has_second_state(rule) ? 0 : n),
        absmax1(coded ? first_states(rule) * blocks : 0),
        absmax2(coded && has_second_state(rule) ? blocks : 0),
        codes1(coded ? first_states(rule) * n : 0, offset),
        codes2(coded && has_second_state(rule) ? n : 0, offset) {
    if (n) std::memcpy(p.view().data, start.data(), start.size() * sizeof(P));
    for (auto* s : {&state1, &state2, &absmax1, &absmax2}) std::ranges::fill(s->span(), 0.0f);
    for (auto* s : {&codes1, &codes2}) std::ranges::fill(s->span(), uint8_t{0});  // as the released package begins: -0.99 * 0
    t.p = p.view();
    t.state1 = state1.span(), t.state2 = state2.span(), t.absmax1 = absmax1.span(), t.absmax2 = absmax2.span();
    t.codes1 = codes1.span(), t.codes2 = codes2.span();
  }
  OptimizerTensor& with(const std::vector<G>& gradient, int64_t step) {
    g = gradient;
    t.g = std::span<const G>(g);
    t.step = step;
    return t;
  }
};

void step(const OptimizerConfig& config, std::span<const OptimizerTensor> tensors) {
  optimizer_step({.config = config, .tensors = tensors, .code1 = signed_map(), .code2 = unsigned_map()});
}
void step(const OptimizerConfig& config, OptimizerTensor& tensor) { step(config, {&tensor, 1}); }

std::vector<OptimizerConfig> configs(Optimizer rule) {
  OptimizerConfig plain{.rule = rule, .lr = 1e-2, .max_unorm = rule == lamb || rule == lars ? 0.05 : 0};
  if (rule == lion) plain.lr = 1e-3, plain.beta2 = 0.99;
  if (rule == rmsprop) plain.beta1 = 0.99;
  OptimizerConfig other = plain;
  other.weight_decay = 0.1, other.eps = 1e-3, other.beta1 = 0.7, other.beta2 = 0.95, other.max_unorm = 0.01;
  other.dampening = 0.3, other.nesterov = true, other.t_alpha = 60, other.t_beta3 = 80, other.alpha = 8;
  OptimizerConfig third = plain;
  third.weight_decay = 0.02, third.bias_correction = false, third.coupled_decay = true, third.eps = 1e-6;
  return {plain, other, third};
}

// Gradients of many magnitudes, with runs of zeros.
std::vector<float> gradient(int64_t n, int64_t step) {
  auto g = normals(static_cast<uint64_t>(100 + step), n);
  for (size_t i = 0; i < g.size(); ++i) {
    g[i] *= std::ldexp(1.0f, -static_cast<int>(random(7, i / 32) % 20));
    if (random(9, i / 64) % 8 == 0) g[i] = 0;
  }
  return g;
}

}  // namespace
}  // namespace bnb::test
