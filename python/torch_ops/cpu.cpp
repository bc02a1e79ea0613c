// torch.ops.bitsandbytes on the CPU.
#include <cstring>

#include "cpu/runtime/parallel.h"
#include "int8.h"
#include "ops.h"
#include "optim.h"

namespace bnb::torch_ops {
namespace {

// torch gives every thread one range of equal length; Chunks says what a thread does with it.
void torch_parallel(int64_t count, int64_t grain, ParallelBody body, void* context) {
  uint32_t threads = 1;
  STD_TORCH_CHECK(torch_get_num_threads(&threads) == 0, "get_num_threads failed");
  struct Job {
    ParallelBody body;
    void* context;
    Chunks chunks;
  } job{body, context, Chunks(count, grain, threads)};
  const auto run = [](int64_t begin, int64_t end, void* j) {
    auto& job = *static_cast<Job*>(j);
    job.chunks.take(begin, end, [&](int64_t from, int64_t to) { job.body(job.context, from, to); });
  };
  STD_TORCH_CHECK(torch_parallel_for(0, count, grain, run, &job) == 0, "parallel_for failed");
}

struct Cpu {
  explicit Cpu(const Tensor&) {}
  bool holds(const Tensor& t) const { return t.is_cpu(); }
  std::string text() const { return "cpu"; }
  AtenTensorHandle no_memory(std::span<const int64_t>, ScalarType) const { return nullptr; }
  void quantize_4bit(const Quantize4bit& d) const { bnb::quantize_4bit(d); }
  void dequantize_4bit(const Dequantize4bit& d) const { bnb::dequantize_4bit(d); }
  void quantize_blockwise(const QuantizeBlockwise& d) const { bnb::quantize_blockwise(d); }
  void dequantize_blockwise(const DequantizeBlockwise& d) const { bnb::dequantize_blockwise(d); }
  void gemm_4bit(const Gemm4bit& d, auto&&) const { bnb::gemm_4bit(d); }
  void set_offset(Absmax& absmax, const Tensor& t) const { absmax.offset = read<float>(t)[0]; }
  Tensor on_host(const Tensor& t) const { return t; }

  std::optional<Tensor> quantize_int8(QuantizeInt8 d, auto&& allocate) const {
    std::vector<uint64_t> words(d.threshold > 0 ? static_cast<size_t>(outlier_words(d.columns)) : 0);
    d.outliers = words;
    bnb::quantize_int8(d);
    if (d.threshold == 0) return std::nullopt;
    const auto found = outlier_columns(words);
    const Tensor columns = allocate(std::ssize(found));
    std::ranges::copy(found, write<int64_t>(columns).data());
    return columns;
  }
  void quantize_columns_int8(const QuantizeColumnsInt8& d) const { bnb::quantize_columns_int8(d); }
  void dequantize_int8(const DequantizeInt8& d) const { bnb::dequantize_int8(d); }
  void dequantize_sums(const DequantizeSums& d) const { bnb::dequantize_sums(d); }
  void gemm_int8(const GemmInt8& d) const { bnb::gemm_int8(d); }
  void linear_int8(const LinearInt8& d, auto&&) const { bnb::linear_int8(d); }
  void optimizer_step(OptimizerStep s, int64_t* clock, auto&&) const {
    std::vector<OptimizerTensor> later;
    if (clock) {
      later.assign(s.tensors.begin(), s.tensors.end());
      for (auto& t : later) t.step += *clock;
      s.tensors = later;
    }
    bnb::optimizer_step(s);
    if (clock) ++*clock;
  }
  void gather_columns(const GemmInt8& d, void* to) const {
    const auto size = static_cast<size_t>(size_of(d.x.dtype));
    auto* at = static_cast<std::byte*>(to);
    for (int64_t i = 0; i < d.m; ++i)
      for (const int64_t c : d.outliers) {
        std::memcpy(at, static_cast<const std::byte*>(d.x.data) + static_cast<size_t>(i * d.k + c) * size, size);
        at += size;
      }
  }
};

// A map of bnb/codebook.h: the name of its maker and the numbers that it takes.
void create_map(const Tensor& out, const Str& name, const std::vector<double>& numbers) {
  const Args<Cpu> args("create_map", out);
  const std::string_view kind = name;
  const auto number = [&](size_t i) {
    args.that(i < numbers.size(), "numbers", std::to_string(numbers.size()) + " elements", "all that the maker takes");
    return numbers[i];
  };
  const auto whole = [&](size_t i) { return static_cast<int>(std::clamp(number(i), -1e9, 1e9)); };
  const auto values = [&] {
    if (kind == "dynamic") return create_dynamic_map(whole(0) != 0, whole(1), whole(2));
    if (kind == "linear") return create_linear_map(whole(0) != 0, whole(1), whole(2) != 0);
    if (kind == "normal") return create_normal_map(number(0), whole(1) != 0);
    if (kind == "fp8") return create_fp8_map(whole(0) != 0, whole(1), whole(2), whole(3));
    return create_4bit_map(kind);
  }();
  args.check_output(out, ScalarType::Float, std::array{std::ssize(values)});
  std::ranges::copy(values, write<float>(out).data());
}

STABLE_TORCH_LIBRARY_IMPL(bitsandbytes, CPU, m) {
  set_parallel_for(torch_parallel);
  register_kernels<Cpu>(m);
  register_int8<Cpu>(m);
  register_optimizers<Cpu>(m);
  m.impl("create_map", Boxed<create_map>::call);
}

}  // namespace
}  // namespace bnb::torch_ops
