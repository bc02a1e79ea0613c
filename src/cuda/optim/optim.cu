// optimizer_step: tables of the call's tensors made on the device, trust ratios, launches.
//
// Nothing is copied from the host: the tensors' arguments are the parameters of a kernel, kTensors per launch, which writes them to the
// workspace with each tensor's hyperparameters of the step. So a call of up to 2 kTensors tensors takes two launches for the tables and one
// per width of states; trust ratios take one more per width and one.
#include <cmath>
#include <vector>

#include "common/arguments.h"
#include "cuda/optim/optim.cuh"

namespace bnb::cuda {
namespace optim {
namespace {

constexpr uint32_t kTensors = 288;

struct TensorBatch {
  OptimizerConfig config;
  const float* code[2];
  CodeMap* maps;
  TensorState* tensor_states;
  int64_t *first_chunk, *first_piece;
  int64_t* clock;
  uint32_t count;
  bool last;  // of the call: increments the clock
  TensorArgs given[kTensors];
};
static_assert(sizeof(TensorBatch) <= 32764, "the parameters of a kernel from sm_70 on");

// Thresholds and buckets of a map of codes.
BNB_DEVICE void set_map(const float* code, CodeMap& map) {
  auto& s = dev::shared<Tables8>();
  const Lane8 lane = prepare8(s, code, true);
  const unsigned i = dev::thread();
  if (i == 0) {
    map.by_bucket = lane.by_bucket;
    map.not_negative = map.not_positive = -1;
  }
  dev::barrier();
  if (i < 256) {
    map.value[i] = code[i];
    map.threshold[i] = s.plain[i];
    if (i > 0 && code[i] >= 0 && code[i - 1] < 0) map.not_negative = static_cast<int32_t>(i);
    if (i < 255 && code[i] <= 0 && code[i + 1] > 0) map.not_positive = static_cast<int32_t>(i);
  }
  for (unsigned k = i; k < Lane8::kBuckets; k += dev::threads()) map.first[k] = s.first[k];
}

// Block 0: the tensors. Block 1 + m, in the first batch of a call: map m.
BNB_KERNEL(kTensors, 1) set_tables(const TensorBatch b) {
  if (dev::block().x > 0) return set_map(b.code[dev::block().x - 1], b.maps[dev::block().x - 1]);
  const int64_t passed = b.clock ? *b.clock : 0;
  const unsigned i = dev::thread();
  if (i < b.count) {
    TensorState e{b.given[i], {}, 0};
    e.step += passed;
    e.hyper = hyper_at(b.config, e.step, e.gnorm_scale);
    e.step_size = -e.hyper.rate;
    b.tensor_states[i] = e;
    b.first_chunk[i] = e.first_chunk;
    b.first_piece[i] = e.first_piece;
  }
  if (!b.last || !b.clock) return;
  dev::barrier();
  if (i == 0) *b.clock = passed + 1;
}

// One tensor per thread block.
BNB_KERNEL(kMostPieces, 8) set_step_sizes(TensorState* tensor_states, int64_t count, const Sums* sums, double max_unorm) {
  auto& s = dev::shared<double[2][kMostPieces]>();
  for (int64_t i = dev::block().x; i < count; i += dev::grid().x) {
    TensorState& e = tensor_states[i];
    const int64_t pieces = e.pieces();
    if (dev::thread() < pieces) {
      BNB_UNROLL
      for (int k = 0; k < 2; ++k) s[k][dev::thread()] = sums[e.first_piece + dev::thread()].squares[k];
    }
    dev::barrier();
    if (dev::thread() == 0) {
      double p = 0, u = 0;
      for (int64_t j = 0; j < pieces; ++j) p = p + s[0][j], u = u + s[1][j];
      const double p_norm = e.p_norm < 0 ? std::sqrt(p) : static_cast<double>(e.p_norm), u_norm = std::sqrt(u);
      e.step_size = dev::mul(e.step_size, trust_ratio(max_unorm, p_norm, u_norm));
      if (e.u_norm) *e.u_norm = static_cast<float>(u_norm);
    }
    dev::barrier();
  }
}

// What a call does, and its layout of the workspace.
struct StepPlan {
  std::vector<TensorArgs> tensors;         // those with states of 32 bits first
  int64_t plain = 0;                       // how many of them
  int64_t chunks[3] = {}, pieces[3] = {};  // [0, 1) of 32 bits, [1, 2) of 8 bits
  int64_t maps = 0, tensor_states = 0, first_chunk = 0, first_piece = 0, sums = 0, bytes = 0;

  explicit StepPlan(const OptimizerStep& s) {
    const bool norms = s.config.max_unorm > 0;
    int64_t chunk = 0, piece = 0;
    tensors.reserve(s.tensors.size());
    for (const bool coded : {false, true}) {
      for (const OptimizerTensor& t : s.tensors)
        if (t.has_codes() == coded) {
          TensorArgs& g = tensors.emplace_back(given(t, first_states(s.config.rule)));
          g.first_chunk = chunk;
          g.first_piece = piece;
          chunk += ceil_div(g.blocks(), kChunk);
          piece += g.pieces();
        }
      if (!coded) plain = std::ssize(tensors);
      chunks[coded + 1] = chunk;
      pieces[coded + 1] = piece;
    }
    const auto after = [&](int64_t size) {
      const int64_t at = bytes;
      bytes += ceil_div(size, 256) * 256;
      return at;
    };
    const int64_t n = std::ssize(tensors);
    maps = after(chunks[2] > chunks[1] ? 2 * static_cast<int64_t>(sizeof(CodeMap)) : 0);
    tensor_states = after(n * static_cast<int64_t>(sizeof(TensorState)));
    first_chunk = after(n * 8);
    first_piece = after(n * 8);
    sums = after(norms ? piece * static_cast<int64_t>(sizeof(Sums)) : 0);
  }

  static TensorArgs given(const OptimizerTensor& t, int64_t first_states) {
    const bool coded = t.has_codes();
    const auto bytes = [&](const auto& floats, const auto& codes) {
      return coded ? codes.data() : reinterpret_cast<uint8_t*>(floats.data());
    };
    TensorArgs g = {.p = static_cast<uint8_t*>(t.p.data),
                    .g = static_cast<const uint8_t*>(t.g.data),
                    .state1 = bytes(t.state1, t.codes1),
                    .state2 = bytes(t.state2, t.codes2),
                    .absmax1 = t.absmax1.data(),
                    .absmax2 = t.absmax2.data(),
                    .u_norm = t.u_norm,
                    .n = t.p.size,
                    .step = t.step,
                    .offset = t.offset,
                    .first_chunk = 0,
                    .first_piece = 0,
                    .gnorm_scale = t.gnorm_scale,
                    .p_norm = t.p_norm.value_or(-1),
                    .p_type = t.p.dtype,
                    .g_type = t.g.dtype,
                    .vectors = false};
    const int64_t unit = coded ? kPer : kPer * 4;
    g.vectors = dev::aligned(g.p, kPer * size_of(g.p_type)) && dev::aligned(g.g, kPer * size_of(g.g_type)) &&
                dev::aligned(g.state1, unit) && dev::aligned(g.state2, unit) && (first_states == 1 || g.n % kPer == 0);
    return g;
  }
  int launches(bool norms, bool clock) const {
    const int widths = (chunks[1] > 0) + (chunks[2] > chunks[1]);
    return static_cast<int>(table_launches(clock)) + widths * (1 + norms) + (norms && !tensors.empty());
  }
  int64_t table_launches(bool clock) const { return tensors.empty() ? clock : ceil_div(std::ssize(tensors), kTensors); }
};

}  // namespace
}  // namespace optim

int64_t optimizer_workspace(const OptimizerStep& s) {
  check_arguments(s);
  return optim::StepPlan(s).bytes;
}

std::string describe_optimizer_step(const OptimizerStep& s) {
  check_arguments(s);
  const optim::StepPlan plan(s);
  int64_t elements = 0;
  for (const auto& t : plan.tensors) elements += t.n;
  return "optimizer_step " + std::string(name(s.config.rule)) + ": " + std::to_string(plan.plain) + " tensors with states of 32 bits, " +
         std::to_string(std::ssize(plan.tensors) - plan.plain) + " with 8 bits, " + std::to_string(elements) + " elements, " +
         std::to_string(plan.launches(s.config.max_unorm > 0, false)) + " kernels, " + std::to_string(plan.bytes) + " bytes of workspace";
}

void optimizer_step(const OptimizerStep& s, void* workspace, int64_t* clock, Stream stream) {
  using namespace optim;
  const Checker check = check_arguments(s);
  const StepPlan plan(s);
  if (plan.bytes)
    check.that(workspace && dev::aligned(workspace, 256), "workspace", workspace ? "not aligned" : "null",
               std::to_string(plan.bytes) + " bytes aligned to 256");
  auto* memory = static_cast<std::byte*>(workspace);
  const auto at = [&]<class T>(int64_t offset, T*) { return reinterpret_cast<T*>(memory + offset); };
  auto* tensor_states = at(plan.tensor_states, static_cast<TensorState*>(nullptr));
  auto* maps = at(plan.maps, static_cast<CodeMap*>(nullptr));
  auto* first_chunk = at(plan.first_chunk, static_cast<int64_t*>(nullptr));
  auto* first_piece = at(plan.first_piece, static_cast<int64_t*>(nullptr));
  auto* sums = at(plan.sums, static_cast<Sums*>(nullptr));
  const auto count = std::ssize(plan.tensors);
  const bool coded = plan.chunks[2] > plan.chunks[1], norms = s.config.max_unorm > 0;

  dev::Launch l = {.op = "optimizer_step", .dtype = count ? plan.tensors[0].p_type : DType::f32, .shape = {count}, .stream = stream};
  TensorBatch batch = {};
  batch.config = s.config;
  batch.code[0] = s.code1.data();
  batch.code[1] = s.code2.data();
  batch.maps = maps;
  batch.clock = clock;
  for (int64_t begin = 0, launches = plan.table_launches(clock != nullptr); launches > 0; begin += kTensors) {
    batch.tensor_states = tensor_states + begin;
    batch.first_chunk = first_chunk + begin;
    batch.first_piece = first_piece + begin;
    batch.count = static_cast<uint32_t>(std::min<int64_t>(count - begin, kTensors));
    batch.last = --launches == 0;
    std::copy_n(plan.tensors.begin() + begin, batch.count, batch.given);
    const bool with_maps = begin == 0 && coded;
    l.grid = {1u + (with_maps ? (has_second_state(s.config.rule) ? 2u : 1u) : 0u)};
    l.threads = kTensors;
    l.shared = with_maps ? sizeof(Tables8) : 0;
    dev::launch(l, set_tables, batch);
  }
  const auto args_of = [&](bool width, const int64_t* first, const int64_t (&ends)[3]) {
    return LaunchArgs{.tensor_states = tensor_states,
                      .first = first,
                      .count = count,
                      .begin = ends[width],
                      .end = ends[width + 1],
                      .maps = maps,
                      .sums = sums,
                      .seed = s.config.seed.value_or(0),
                      .stochastic = s.config.seed.has_value(),
                      .copies = 0};
  };
  if (norms && count) {
    for (const bool width : {false, true})
      if (const LaunchArgs args = args_of(width, first_piece, plan.pieces); args.begin < args.end)
        launch_norms(s.config.rule, width, args, l);
    l.grid = {static_cast<uint32_t>(std::min<int64_t>(count, int64_t{8} * dev::device().sms))};
    l.threads = kMostPieces;
    l.shared = 2 * kMostPieces * sizeof(double);
    dev::launch(l, set_step_sizes, tensor_states, count, sums, s.config.max_unorm);
    l.shared = 0;
  }
  for (const bool width : {false, true})
    if (const LaunchArgs args = args_of(width, first_chunk, plan.chunks); args.begin < args.end) launch_step(s.config.rule, width, args, l);
}

}  // namespace bnb::cuda
