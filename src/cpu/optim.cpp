// One step over all tensors of a call: their blocks in one row, cut among the threads.
#include <bnb/bnb.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "common/arguments.h"
#include "cpu/gemm/driver.h"
#include "cpu/kernels/codebook8.h"
#include "cpu/kernels/kernels.h"

namespace bnb {
namespace {

constexpr std::array<std::string_view, kOptimizers> kNames = {"adam", "lamb", "ademamix", "lion", "momentum", "lars", "rmsprop", "adagrad"};

int64_t blocks_of(const OptimizerTensor& t) { return bnb::blocks_of(t.p.size, kOptimizerBlock); }

// Rows of pieces of several tensors: `first[i]` is the place of tensor i's first piece, the last entry their number.
template <class Count> int64_t* places(std::span<const OptimizerTensor> tensors, int64_t* first, Count&& count) {
  first[0] = 0;
  for (size_t i = 0; i < tensors.size(); ++i) first[i + 1] = first[i] + count(tensors[i]);
  return first;
}

// f(tensor, its pieces) for pieces [begin, end) of the row.
template <class F> void for_pieces(const int64_t* first, size_t tensors, int64_t begin, int64_t end, F&& f) {
  for (auto i = static_cast<size_t>(std::upper_bound(first, first + tensors, begin) - first - 1); begin < end; ++i) {
    const int64_t last = std::min(end, first[i + 1]);
    if (begin < last) f(i, cpu::Range{begin - first[i], last - first[i]});
    begin = last;
  }
}

// Blocks whose squares one thread adds up: at most 128 sums a tensor.
int64_t blocks_of_a_sum(const OptimizerTensor& t) { return std::max<int64_t>(64, (blocks_of(t) + 127) / 128); }
int64_t sums_of(const OptimizerTensor& t) { return bnb::blocks_of(blocks_of(t), blocks_of_a_sum(t)); }

struct Sum {
  double squares[2];  // of p, of u
};

// The trust ratio of every tensor.
void set_rates(const cpu::Kernels& kernels, const OptimizerStep& s, cpu::OptimizerTask* tasks, int64_t* first) {
  const size_t n = s.tensors.size();
  const int64_t count = places(s.tensors, first, sums_of)[n];
  const cpu::Scratch scratch(count * static_cast<int64_t>(sizeof(Sum)));
  auto* sums = static_cast<Sum*>(scratch.data());
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    for_pieces(first, n, begin, end, [&](size_t i, cpu::Range pieces) {
      const OptimizerTensor& t = s.tensors[i];
      for (int64_t j = pieces.begin; j < pieces.end; ++j) {
        const int64_t blocks = blocks_of_a_sum(t);
        Sum sum{};
        kernels.optimizer_norms(tasks[i], {j * blocks, std::min((j + 1) * blocks, blocks_of(t))}, sum.squares);
        sums[first[i] + j] = sum;
      }
    });
  });
  for (size_t i = 0; i < n; ++i) {
    const OptimizerTensor& t = s.tensors[i];
    double p = 0, u = 0;
    for (int64_t j = first[i]; j < first[i + 1]; ++j) p += sums[j].squares[0], u += sums[j].squares[1];
    const double p_norm = t.p_norm ? static_cast<double>(*t.p_norm) : std::sqrt(p), u_norm = std::sqrt(u);
    tasks[i].rate *= trust_ratio(s.config.max_unorm, p_norm, u_norm);
    if (t.u_norm) *t.u_norm = static_cast<float>(u_norm);
  }
}

}  // namespace

std::string_view name(Optimizer o) {
  const auto i = static_cast<size_t>(o);
  return i < kNames.size() ? kNames[i] : "unknown";
}
std::optional<Optimizer> optimizer_of(std::string_view name) {
  const auto* found = std::ranges::find(kNames, name);
  return found == kNames.end() ? std::nullopt : std::optional(static_cast<Optimizer>(found - kNames.begin()));
}

namespace {

void step_tensors(const Checker& check, const OptimizerStep& s) {
  const auto& kernels = cpu::active();
  const size_t n = s.tensors.size();
  const bool coded = std::ranges::any_of(s.tensors, [](const OptimizerTensor& t) { return t.has_codes(); });
  std::shared_ptr<const cpu::Encoder8> encoder1, encoder2;
  if (coded) {
    constexpr int64_t kMany = 1 << 20;  // a table pays: the next step comes
    check.ascending("code1", s.code1);
    encoder1 = encoder2 = cpu::encoder_for(s.code1, kMany);
    if (has_second_state(s.config.rule)) check.ascending("code2", s.code2), encoder2 = cpu::encoder_for(s.code2, kMany);
  }
  const cpu::Scratch scratch(static_cast<int64_t>(n * sizeof(cpu::OptimizerTask) + (n + 1) * sizeof(int64_t)));
  auto* tasks = static_cast<cpu::OptimizerTask*>(scratch.data());
  auto* first = reinterpret_cast<int64_t*>(tasks + n);
  for (size_t i = 0; i < n; ++i) {
    const OptimizerTensor& t = s.tensors[i];
    const Hyper hyper = hyper_at(s.config, t.step, t.gnorm_scale);
    const bool codes = t.has_codes();
    const float* second = has_second_state(s.config.rule) ? s.code2.data() : s.code1.data();
    new (tasks + i) cpu::OptimizerTask{.tensor = &t,
                                       .rule = s.config.rule,
                                       .hyper = hyper,
                                       .rate = -hyper.rate,
                                       .encoder1 = codes ? encoder1.get() : nullptr,
                                       .encoder2 = codes ? encoder2.get() : nullptr,
                                       .code1 = s.code1.data(),
                                       .code2 = second,
                                       .seed = s.config.seed};
  }
  if (s.config.max_unorm > 0) set_rates(kernels, s, tasks, first);
  const int64_t blocks = places(s.tensors, first, [](const OptimizerTensor& t) { return blocks_of(t); })[n];
  parallel_for(blocks, grain_of(kGrainElements, kOptimizerBlock), [&](int64_t begin, int64_t end) {
    for_pieces(first, n, begin, end, [&](size_t i, cpu::Range range) { kernels.optimizer_step(tasks[i], range); });
  });
}

}  // namespace

void optimizer_step(const OptimizerStep& s) {
  const Checker check = check_arguments(s);
  check.within_memory([&] { step_tensors(check, s); });
}

}  // namespace bnb
