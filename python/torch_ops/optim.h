// The operators of the optimizers for any device (args.h): one private operator that steps all tensors of a group, and the two of the
// released package, which step one. A Device supplies for them
//   optimizer_step(s, clock, allocate)    clock: null or one int64 on the device, added to every step and then incremented
#pragma once

#include "args.h"

namespace bnb::torch_ops {

using Tensors = std::vector<Tensor>;

template <class Device> struct OptimizerArgs : Args<Device> {
  using Args<Device>::Args;

  Optimizer rule(std::string_view given) const {
    if (const auto known = optimizer_of(given)) return *known;
    std::string names;
    for (int i = 0; i < kOptimizers; ++i) names.append(i ? ", " : "").append(name(static_cast<Optimizer>(i)));
    this->fail("optimizer_name", std::string("\"").append(given) += '"', "one of " + names);
  }
  // A tensor that is updated in place.
  void in_place(std::string_view argument, const Tensor& t) const {
    this->on_device(argument, t);
    if (!t.is_contiguous()) [[unlikely]]
      this->fail(argument, "not contiguous", "a contiguous tensor");
  }
  View parameter(const Tensor& p) const {
    in_place("p", p);
    return this->mutable_values("p", p);
  }
  std::span<float> floats_in_place(std::string_view argument, const Tensor& t) const {
    this->type(argument, t, ScalarType::Float);
    in_place(argument, t);
    return write<float>(t);
  }
  // A state in fp32 or in 8-bit codes.
  void state(std::string_view argument, const Tensor& t, std::span<float>& plain, std::span<uint8_t>& codes) const {
    this->present(argument, t);
    if (type_of(t) != ScalarType::Byte) {
      plain = floats_in_place(argument, t);
      return;
    }
    in_place(argument, t);
    codes = write<uint8_t>(t);
  }
};

// The core's view of a call's tensors, and the temporary tensors that must outlive the call.
template <class Device> struct StepArguments {
  OptimizerArgs<Device>& args;
  Tensors kept;
  std::vector<OptimizerTensor> tensors;
  OptimizerStep step;

  StepArguments(OptimizerArgs<Device>& args, std::string_view rule, size_t n) : args(args) {
    step.config.rule = args.rule(rule);
    tensors.reserve(n);
  }
  OptimizerTensor& add(const Tensor& p, const Tensor& g, const Tensor& state1, const Tensor* state2, const Tensor* absmax1,
                       const Tensor* absmax2) {
    OptimizerTensor& t = tensors.emplace_back();
    t.p = args.parameter(p);
    args.present("g", g);
    if (!std::ranges::equal(g.sizes(), p.sizes())) [[unlikely]]
      args.fail("g", "of shape " + text(sizes(g)), text(sizes(p)) + ", that of p");
    if (g.is_contiguous()) {
      args.on_device("g", g);
      t.g = args.values("g", g);
    } else {
      t.g = args.values("g", kept.emplace_back(args.input("g", g)));
    }
    args.state("state1", state1, t.state1, t.codes1);
    if (state2) args.state("state2", *state2, t.state2, t.codes2);
    same_shape("state1", state1, p, first_states(step.config.rule) == 2);
    if (state2) same_shape("state2", *state2, p, false);
    const bool codes = type_of(state1) == ScalarType::Byte;
    if (state2 && codes != (type_of(*state2) == ScalarType::Byte)) [[unlikely]]
      args.fail("state2", std::string("of dtype ") + name_of(type_of(*state2)), "that of state1");
    if (codes && absmax1) t.absmax1 = args.floats_in_place("absmax1", *absmax1);
    if (codes && absmax2) t.absmax2 = args.floats_in_place("absmax2", *absmax2);
    check_sizes(t, codes, state2);
    return t;
  }
  // A state is flat or has the shape of the parameter; two rows of it follow one another.
  void same_shape(std::string_view argument, const Tensor& state, const Tensor& p, bool doubled) const {
    const auto wanted = sizes(p);
    if (wanted.size() < 2) return;
    const auto given = sizes(state);
    if (given.size() < 2u + doubled) return;
    if (given.size() == wanted.size() + doubled && std::ranges::equal(given.last(wanted.size()), wanted)) return;
    args.fail(argument, "of shape " + text(given), (doubled ? "two in front of " : "") + text(wanted) + ", the shape of p");
  }
  // With the names of this call's arguments, which the core does not know.
  void check_sizes(const OptimizerTensor& t, bool codes, bool second) const {
    const int64_t first = first_states(step.config.rule), blocks = blocks_of(t.p.size, kOptimizerBlock);
    const int64_t elements = args.product("elements of state1", first, t.p.size);
    args.equal("state1", std::ssize(t.state1) + std::ssize(t.codes1), elements, first == 1 ? "as many as p" : "two for each of p");
    if (second) args.equal("state2", std::ssize(t.state2) + std::ssize(t.codes2), t.p.size, "as many as p");
    if (!codes) return;
    args.size("absmax1", t.absmax1, first * blocks);
    if (second) args.size("absmax2", t.absmax2, blocks);
  }
  void maps(const std::optional<Tensor>& qmap1, const std::optional<Tensor>& qmap2) {
    if (qmap1) step.code1 = read<float>(kept.emplace_back(args.map("qmap1", *qmap1)));
    if (qmap2) step.code2 = read<float>(kept.emplace_back(args.map("qmap2", *qmap2)));
    if (std::ranges::none_of(tensors, &OptimizerTensor::has_codes)) return;
    args.size("qmap1", step.code1, 256);
    if (has_second_state(step.config.rule)) args.size("qmap2", step.code2, 256);
  }
  void run(int64_t* clock = nullptr) {
    step.tensors = tensors;
    const Tensor home = kept.front();
    args.device.optimizer_step(step, clock, [&](int64_t size) { return new_empty(args, home, std::array{size}, ScalarType::Byte); });
  }
};

template <class Device>
void optimizer_step(const Str& optimizer_name, const Tensors& p, const Tensors& g, const Tensors& state1, const Tensors& state2,
                    const Tensors& absmax1, const Tensors& absmax2, const Tensors& unorm, const std::optional<Tensor>& qmap1,
                    const std::optional<Tensor>& qmap2, const std::vector<int64_t>& steps, double lr, double beta1, double beta2,
                    double beta3, double alpha, double eps, double weight_decay, int64_t t_alpha, int64_t t_beta3, double max_unorm,
                    bool skip_zeros, double dampening, bool nesterov, bool bias_correction, bool coupled_decay, std::optional<int64_t> seed,
                    const std::vector<int64_t>& offsets, const std::vector<double>& gnorm_scales, const std::vector<double>& p_norms,
                    const std::optional<Tensor>& clock) {
  if (p.empty()) return;
  OptimizerArgs<Device> args("optimizer_step", p.front());
  const size_t n = p.size();
  StepArguments<Device> call(args, optimizer_name, n);
  call.kept.push_back(p.front());
  OptimizerConfig& c = call.step.config;
  c = {.rule = c.rule,
       .lr = lr,
       .beta1 = beta1,
       .beta2 = beta2,
       .beta3 = beta3,
       .alpha = alpha,
       .eps = eps,
       .weight_decay = weight_decay,
       .t_alpha = t_alpha,
       .t_beta3 = t_beta3,
       .max_unorm = max_unorm,
       .dampening = dampening,
       .skip_zeros = skip_zeros,
       .nesterov = nesterov,
       .bias_correction = bias_correction,
       .coupled_decay = coupled_decay};
  if (seed) c.seed = static_cast<uint64_t>(*seed);
  const auto count = [&](std::string_view argument, const auto& list) {
    args.equal(argument, std::ssize(list), static_cast<int64_t>(n), "one for each of p");
  };
  count("g", g), count("state1", state1), count("steps", steps);
  if (has_second_state(c.rule)) count("state2", state2);
  const auto one_each = [&](std::string_view argument, const auto& list) {
    if (!list.empty()) count(argument, list);
  };
  one_each("absmax1", absmax1), one_each("absmax2", absmax2), one_each("unorm", unorm);
  one_each("offsets", offsets), one_each("gnorm_scales", gnorm_scales), one_each("p_norms", p_norms);
  const auto entry = [](const auto& list, size_t i) { return list.empty() ? nullptr : &list[i]; };
  for (size_t i = 0; i < n; ++i) {
    if (n > 1) args.entry(static_cast<int64_t>(i));
    OptimizerTensor& t =
        call.add(p[i], g[i], state1[i], has_second_state(c.rule) ? &state2[i] : nullptr, entry(absmax1, i), entry(absmax2, i));
    t.step = steps[i];
    if (const auto* offset = entry(offsets, i)) t.offset = *offset;
    if (const auto* scale = entry(gnorm_scales, i)) t.gnorm_scale = static_cast<float>(*scale);
    if (const auto* norm = entry(p_norms, i)) t.p_norm = static_cast<float>(*norm);
    if (const auto* u = entry(unorm, i)) {
      const auto to = args.floats_in_place("unorm", *u);
      args.size("unorm", to, 1);
      t.u_norm = to.data();
    }
  }
  args.entry(-1);
  call.maps(qmap1, qmap2);
  int64_t* ticks = nullptr;
  if (clock) {
    args.type("clock", *clock, ScalarType::Long);
    args.in_place("clock", *clock);
    const auto to = write<int64_t>(*clock);
    args.equal("clock", std::ssize(to), 1, "one int64");
    ticks = to.data();
  }
  call.run(ticks);
}

template <class Device>
void optimizer_update_32bit(const Str& optimizer_name, const Tensor& g, const Tensor& p, const Tensor& state1,
                            const std::optional<Tensor>& state2, const std::optional<Tensor>& unorm_vec, double max_unorm,
                            double param_norm, double beta1, double beta2, double beta3, double alpha, double eps, double weight_decay,
                            int64_t step, double lr, double gnorm_scale, bool skip_zeros) {
  OptimizerArgs<Device> args("optimizer_update_32bit", g);
  StepArguments<Device> call(args, optimizer_name, 1);
  call.kept.push_back(p);
  OptimizerConfig& c = call.step.config;
  c = {.rule = c.rule,
       .lr = lr,
       .beta1 = beta1,
       .beta2 = beta2,
       .beta3 = beta3,
       .alpha = alpha,
       .eps = eps,
       .weight_decay = weight_decay,
       .max_unorm = max_unorm,
       .skip_zeros = skip_zeros};
  args.type("state1", state1, ScalarType::Float);
  OptimizerTensor& t = call.add(p, g, state1, state2 ? &*state2 : nullptr, nullptr, nullptr);
  t.step = step;
  t.gnorm_scale = static_cast<float>(gnorm_scale);
  if (max_unorm > 0) t.p_norm = static_cast<float>(param_norm);
  if (unorm_vec) {
    const auto to = args.floats_in_place("unorm_vec", *unorm_vec);
    args.size("unorm_vec", to, 1);
    t.u_norm = to.data();
  }
  call.run();
}

template <class Device>
void optimizer_update_8bit_blockwise(const Str& optimizer_name, const Tensor& g, const Tensor& p, const Tensor& state1,
                                     const std::optional<Tensor>& state2, double beta1, double beta2, double beta3, double alpha,
                                     double eps, int64_t step, double lr, const Tensor& qmap1, const std::optional<Tensor>& qmap2,
                                     const Tensor& absmax1, const std::optional<Tensor>& absmax2, double weight_decay, double gnorm_scale,
                                     bool skip_zeros) {
  OptimizerArgs<Device> args("optimizer_update_8bit_blockwise", g);
  StepArguments<Device> call(args, optimizer_name, 1);
  call.kept.push_back(p);
  OptimizerConfig& c = call.step.config;
  c = {.rule = c.rule,
       .lr = lr,
       .beta1 = beta1,
       .beta2 = beta2,
       .beta3 = beta3,
       .alpha = alpha,
       .eps = eps,
       .weight_decay = weight_decay,
       .skip_zeros = skip_zeros};
  args.type("state1", state1, ScalarType::Byte);
  OptimizerTensor& t = call.add(p, g, state1, state2 ? &*state2 : nullptr, &absmax1, absmax2 ? &*absmax2 : nullptr);
  t.step = step;
  t.gnorm_scale = static_cast<float>(gnorm_scale);
  call.maps(qmap1, qmap2);
  call.run();
}

template <class Device> void register_optimizers(torch::stable::detail::StableLibrary& m) {
  m.impl("optimizer_step", Boxed<optimizer_step<Device>>::call);
  m.impl("optimizer_update_32bit", Boxed<optimizer_update_32bit<Device>>::call);
  m.impl("optimizer_update_8bit_blockwise", Boxed<optimizer_update_8bit_blockwise<Device>>::call);
}

}  // namespace bnb::torch_ops
