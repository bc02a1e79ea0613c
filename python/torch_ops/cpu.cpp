// torch.ops.bitsandbytes on the CPU.
#include <atomic>

#include "ops.h"

namespace bnb::torch_ops {
namespace {

// torch gives every thread one range of equal length. Threads take quarters of such a range from a common counter instead, so that none
// waits for one that was late or slow.
void torch_parallel(int64_t count, int64_t grain, ParallelBody body, void* context) {
  struct Job {
    ParallelBody body;
    void* context;
    int64_t count, grain;
    std::atomic<int64_t> next{0};
  } job{body, context, count, grain};
  const auto run = [](int64_t begin, int64_t end, void* j) {
    auto& job = *static_cast<Job*>(j);
    const int64_t chunk = std::max(job.grain, (end - begin) / 4 + 1);
    for (int64_t i; (i = job.next.fetch_add(chunk)) < job.count;) job.body(job.context, i, std::min(i + chunk, job.count));
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
};

STABLE_TORCH_LIBRARY_IMPL(bitsandbytes, CPU, m) {
  set_parallel_for(torch_parallel);
  register_kernels<Cpu>(m);
}

}  // namespace
}  // namespace bnb::torch_ops
