// Optimizers: one step of any rule over any number of tensors in one call, with state of 32 bits or of 8 bits in blocks of 256
// (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861).
//
// With g = gradient * gnorm_scale (+ weight_decay * p for rules with coupled decay) and the direction u of the rule,
//   p = p * (1 - lr * weight_decay) - lr * trust * u        (without the factor for rules with coupled decay)
// in fp32, rounded once to the type of p.
//
//   rule      states        u, after the states moved                                                       decay
//   adam      m, v          (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)                           decoupled
//   lamb      m, v          as adam; trust                                                                  decoupled
//   ademamix  m1 and m2, v  (m1 / (1 - beta1^t) + alpha * m2) / (sqrt(v / (1 - beta2^t)) + eps)             decoupled
//   lion      m             sign(beta1 * m + (1 - beta1) * g), then m = beta2 * m + (1 - beta2) * g         decoupled
//   momentum  m             m = beta1 * m + (1 - dampening) * g, at t = 1 m = g; g + beta1 * m if nesterov  coupled
//   lars      m             as momentum; trust                                                              coupled
//   rmsprop   v             v = beta1 * v + (1 - beta1) * g^2;  g / (sqrt(v) + eps)                         coupled
//   adagrad   v             v = v + g^2;                        g / (sqrt(v) + eps)                         coupled
//
// trust is min(1, max_unorm * |p| / |u|) over the whole tensor where max_unorm > 0 (any rule may have it) and |p| > 0, else 1.
//
// Elements whose g, or g^2 in rules that have it, is not finite in fp32 are passed over: parameter and states stay; so are zeros of g with
// skip_zeros. Second moments and momentum saturate at the largest float. 8-bit states: value[code] * absmax, requantized to the nearest
// code after each step; but a first moment below 0 never becomes the code of 0, nor does a second moment above 0, by whose root the step
// is divided. Bytes do not depend on the number of threads, on the instruction set or on the tensors of the call. Errors:
// bnb::Error{invalid_argument}, before anything is written: also for numbers that are not finite in fp32, and where what is written (p and
// the states) overlaps anything else of the call.
#pragma once

#include <bnb/types.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

namespace bnb {

enum class Optimizer : uint8_t { adam, lamb, ademamix, lion, momentum, lars, rmsprop, adagrad };
inline constexpr int kOptimizers = 8;
BNB_API std::string_view name(Optimizer);
BNB_API std::optional<Optimizer> optimizer_of(std::string_view name);

inline constexpr int64_t kOptimizerBlock = 256;

constexpr bool has_second_state(Optimizer o) { return o == Optimizer::adam || o == Optimizer::lamb || o == Optimizer::ademamix; }
// Elements of state 1 for each element of the parameter: AdEMAMix keeps its two averages one after the other, each with own blocks.
constexpr int64_t first_states(Optimizer o) { return o == Optimizer::ademamix ? 2 : 1; }

struct OptimizerConfig {
  Optimizer rule = Optimizer::adam;
  double lr = 1e-3, beta1 = 0.9, beta2 = 0.999, beta3 = 0.9999, alpha = 5.0, eps = 1e-8, weight_decay = 0;
  int64_t t_alpha = 0, t_beta3 = 0;  // AdEMAMix: steps over which alpha and beta3 reach their values (sections 3.1 and C); 0: at once
  double max_unorm = 0, dampening = 0;
  bool skip_zeros = false, nesterov = false;
  bool bias_correction = true;        // adam, lamb, ademamix: divide by 1 - beta^t
  bool coupled_decay = false;         // of rules that would decouple it
  std::optional<uint64_t> seed = {};  // 16-bit parameters: rounded stochastically, by bits that depend on seed, step and offset + i alone
};

// n elements; states either in fp32 (state1, state2) or in 8 bits (codes and absmax).
struct OptimizerTensor {
  View p;                                       // n
  ConstView g;                                  // n, of the type of p or another
  std::span<float> state1 = {}, state2 = {};    // first_states * n; n or nothing
  std::span<uint8_t> codes1 = {}, codes2 = {};  // first_states * n; n or nothing
  std::span<float> absmax1 = {}, absmax2 = {};  // first_states * blocks; blocks or nothing
  int64_t step = 1;                             // t, from 1
  float gnorm_scale = 1;
  int64_t offset = 0;                // place of element 0 in the whole parameter, where this is a part of one
  std::optional<float> p_norm = {};  // |p|, where it is not that of this tensor
  float* u_norm = nullptr;           // gets |u|, if max_unorm > 0

  bool has_codes() const { return !codes1.empty(); }
};

struct OptimizerStep {
  OptimizerConfig config = {};
  std::span<const OptimizerTensor> tensors = {};
  std::span<const float> code1 = {}, code2 = {};  // 256 ascending values each, where states have 8 bits
};
BNB_API void optimizer_step(const OptimizerStep&);

}  // namespace bnb
