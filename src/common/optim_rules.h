// The rules of the optimizers, each once, for every instruction set and for CUDA, for states of 32 and of 8 bits.
//
// A rule moves its states s and gives the direction u of include/bnb/optim.h. `M` is the arithmetic: vectors of an instruction set or the
// float of a CUDA thread, each operation rounded once to fp32.
#pragma once

#include <bnb/optim.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/convert.h"

namespace bnb {

// The numbers of one tensor's step.
struct Hyper {
  float beta1, gain1, beta2, gain2, beta3, gain3;  // s = s * beta + g * gain
  float alpha, scale, eps;                         // u = scale * (..) / (sqrt(v) + eps)
  float gnorm_scale, coupled, keep, rate;          // g = g * gnorm_scale + p * coupled;  p = p * keep - u * (rate * trust)
  bool skip_zeros, nesterov;
};

template <class M> struct Rules {
  using F32 = typename M::F32;
  static constexpr float kLargest = std::numeric_limits<float>::max();
  BNB_INLINE static constexpr F32 average(F32 s, float beta, F32 x, float gain) {
    return M::fma(s, M::set1(beta), M::mul(x, M::set1(gain)));
  }
  BNB_INLINE static constexpr F32 second_moment(F32 v, float beta, F32 g, float gain) {
    return M::min(average(v, beta, M::mul(g, g), gain), M::set1(kLargest));
  }
  BNB_INLINE static constexpr F32 saturated(F32 s) { return M::max(M::min(s, M::set1(kLargest)), M::set1(-kLargest)); }
  BNB_INLINE static constexpr F32 over_root(F32 x, F32 v, const Hyper& h) {
    return M::div(M::mul(x, M::set1(h.scale)), M::add(M::sqrt(v), M::set1(h.eps)));
  }
};

// Kingma & Ba 2015, arXiv 1412.6980; decoupled decay: Loshchilov & Hutter 2019, arXiv 1711.05101; LAMB: You et al. 2020, arXiv 1904.00962.
struct Adam {
  static constexpr int states = 2, second_moment = 1, root = 1;  // how many; which has the unsigned map; whose root u is divided by
  static constexpr bool squares = true;                          // elements whose g^2 is infinite are skipped: v would not hold what m does
  template <class M> BNB_INLINE static constexpr auto direction(typename M::F32 g, typename M::F32 (&s)[2], const Hyper& h) {
    s[0] = Rules<M>::average(s[0], h.beta1, g, h.gain1);
    s[1] = Rules<M>::second_moment(s[1], h.beta2, g, h.gain2);
    return Rules<M>::over_root(s[0], s[1], h);
  }
};

// Pagliardini et al. 2024, arXiv 2409.03137.
struct AdEMAMix {
  static constexpr int states = 3, second_moment = 2, root = 2;
  static constexpr bool squares = true;
  template <class M> BNB_INLINE static constexpr auto direction(typename M::F32 g, typename M::F32 (&s)[3], const Hyper& h) {
    s[0] = Rules<M>::average(s[0], h.beta1, g, h.gain1);
    s[1] = Rules<M>::average(s[1], h.beta3, g, h.gain3);
    s[2] = Rules<M>::second_moment(s[2], h.beta2, g, h.gain2);
    return Rules<M>::over_root(M::fma(s[1], M::set1(h.alpha), s[0]), s[2], h);
  }
};

// Chen et al. 2023, arXiv 2302.06675.
struct Lion {
  static constexpr int states = 1, second_moment = -1, root = -1;
  static constexpr bool squares = false;
  template <class M> BNB_INLINE static constexpr auto direction(typename M::F32 g, typename M::F32 (&s)[1], const Hyper& h) {
    const auto u = M::sign(Rules<M>::average(s[0], h.beta1, g, h.gain1));
    s[0] = Rules<M>::average(s[0], h.beta2, g, h.gain2);
    return u;
  }
};

// Sutskever et al. 2013 (Nesterov's too), as torch.optim.SGD has it; LARS: You et al. 2017, arXiv 1708.03888.
struct Momentum {
  static constexpr int states = 1, second_moment = -1, root = -1;
  static constexpr bool squares = false;
  template <class M> BNB_INLINE static constexpr auto direction(typename M::F32 g, typename M::F32 (&s)[1], const Hyper& h) {
    s[0] = Rules<M>::saturated(Rules<M>::average(s[0], h.beta1, g, h.gain1));
    return h.nesterov ? M::fma(s[0], M::set1(h.beta2), g) : s[0];
  }
};

// Tieleman & Hinton 2012, lecture 6.5. With beta1 = gain1 = 1 Adagrad: Duchi et al. 2011, JMLR 12.
struct RmsProp {
  static constexpr int states = 1, second_moment = -1, root = 0;  // its one state has the signed map, as in the released package
  static constexpr bool squares = true;
  template <class M> BNB_INLINE static constexpr auto direction(typename M::F32 g, typename M::F32 (&s)[1], const Hyper& h) {
    s[0] = Rules<M>::second_moment(s[0], h.beta1, g, h.gain1);
    return Rules<M>::over_root(g, s[0], h);
  }
};

// f(Adam{}), f(Lion{}), ..: the one place where a rule becomes a type.
template <class F> constexpr decltype(auto) visit(Optimizer o, F&& f) {
  switch (o) {
    case Optimizer::adam:
    case Optimizer::lamb: return f(Adam{});
    case Optimizer::ademamix: return f(AdEMAMix{});
    case Optimizer::lion: return f(Lion{});
    case Optimizer::momentum:
    case Optimizer::lars: return f(Momentum{});
    default: return f(RmsProp{});  // and adagrad
  }
}

// x^n by squaring: the same bits wherever double is IEEE, on the CPU and in a kernel.
constexpr double power(double x, int64_t n) {
  double result = 1;
  for (; n > 0; n /= 2, x *= x)
    if (n % 2) result *= x;
  return result;
}

// e^x for x <= 0 and the natural logarithm for x > 0 to about 1e-14, likewise.
constexpr double exponential(double x) {
  constexpr int kParts = 1024;
  double sum = 1;
  for (int i = 12; i > 0; --i) sum = 1 + sum * (x / kParts) / i;
  return power(sum, kParts);
}
constexpr double logarithm(double x) {
  int octaves = 0;
  for (; x < 0.75; x *= 2) --octaves;
  for (; x > 1.5; x /= 2) ++octaves;
  const double z = (x - 1) / (x + 1);
  double sum = 0;
  for (int i = 33; i > 0; i -= 2) sum = 1.0 / i + sum * (z * z);
  return 2 * z * sum + octaves * 0.693147180559945309417;
}

constexpr bool decoupled(const OptimizerConfig& c) {
  using enum Optimizer;
  return !c.coupled_decay && (c.rule == adam || c.rule == lamb || c.rule == ademamix || c.rule == lion);
}

BNB_INLINE constexpr Hyper hyper_at(const OptimizerConfig& c, int64_t step, float gnorm_scale) {
  using enum Optimizer;
  const auto f = [](double x) { return static_cast<float>(x); };
  const bool has_momentum = c.rule == momentum || c.rule == lars, apart = decoupled(c);
  double beta1 = c.beta1, gain1 = 1 - c.beta1, beta3 = c.beta3, alpha = c.alpha, scale = 1, eps = c.eps;
  if (has_momentum) {
    gain1 = step == 1 ? 1 : 1 - c.dampening;
    if (step == 1) beta1 = 0;  // what was in the state does not count
  }
  if (c.rule == adagrad) beta1 = gain1 = 1;
  if (has_second_state(c.rule) && c.bias_correction) {
    const double first = 1 - power(c.beta1, step), second = std::sqrt(1 - power(c.beta2, step));
    scale = second / first;
    eps *= second;
    alpha *= first;  // m1 / first + alpha m2 = (m1 + alpha first m2) / first
  }
  if (c.rule == ademamix) {
    const double t = static_cast<double>(step);
    if (c.t_alpha > 0) alpha *= std::min(1.0, t / static_cast<double>(c.t_alpha));
    if (c.t_beta3 > 0 && step < c.t_beta3 && c.beta3 > 0) {  // the half-life grows linearly from that of beta1
      const double part = t / static_cast<double>(c.t_beta3), to = logarithm(c.beta3), ratio = c.beta1 > 0 ? to / logarithm(c.beta1) : 0;
      beta3 = std::min(c.beta3, exponential(to / ((1 - part) * ratio + part)));
    }
  }
  return {.beta1 = f(beta1),
          .gain1 = f(gain1),
          .beta2 = f(has_momentum ? c.beta1 : c.beta2),  // Nesterov's step ahead
          .gain2 = f(1 - c.beta2),
          .beta3 = f(beta3),
          .gain3 = f(1 - beta3),
          .alpha = f(alpha),
          .scale = f(scale),
          .eps = std::max(f(eps), std::numeric_limits<float>::min()),  // 0 / 0 is 0
          .gnorm_scale = gnorm_scale,
          .coupled = apart ? 0 : f(c.weight_decay),
          .keep = apart ? f(1 - c.lr * c.weight_decay) : 1,
          .rate = f(c.lr),
          .skip_zeros = c.skip_zeros,
          .nesterov = c.nesterov};
}

// How much of u is taken.
constexpr float trust_ratio(double max_unorm, double p_norm, double u_norm) {
  return p_norm > 0 && u_norm > max_unorm * p_norm ? static_cast<float>(max_unorm * p_norm / u_norm) : 1.0f;
}

}  // namespace bnb
