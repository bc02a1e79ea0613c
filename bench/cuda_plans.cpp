// Every plan of every product on this GPU: one line of JSON per plan and case, flushed at once. Whether it agrees with the plainest plan,
// how long it takes, and what the cost model expected, so that the model can be fitted. Exits with 1 if a plan is wrong.
//
//   bnb_cuda_plans                             the shapes of bench/gpu_cases.py
//   bnb_cuda_plans --check                     small shapes of all kinds, not timed: for compute-sanitizer
//   bnb_cuda_plans --shapes 4096x4096,64x96 --rows 1,8,128 --types bf16,f32,int8 --plan "rows, 16"
//                                              these shapes; the plainest plan and those whose text contains that: for a profiler
//
// Times: the median of 20 samples by events. A sample is one call on each of several sets of tensors, which together exceed the cache.
#include <bnb/cuda.h>
#include <bnb/error.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/convert.h"
#include "common/formats.h"
#include "cuda/gemm_4bit/gemm_4bit.h"
#include "cuda/gemm_int8/gemm_int8.h"
#if defined(BNB_CUDA_ON_HOST)
#include <cstdlib>
#else
#include <cuda_runtime_api.h>
#endif

namespace bnb {
namespace {

// ---- memory and time of the device; the emulator (tests/cuda_on_host) has the host's and none
#if defined(BNB_CUDA_ON_HOST)
constexpr bool kTimed = false;
void* take(size_t bytes) { return std::aligned_alloc(256, (bytes + 255) / 256 * 256); }
void give_back(void* p) { std::free(p); }
void copy(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void wait() {}
double milliseconds(const std::function<void()>&) { return 0; }
#else
constexpr bool kTimed = true;
void check(const char* what, cudaError_t error) {
  if (error != cudaSuccess) throw Error(Errc::unsupported, std::string(what) + ": " + cudaGetErrorString(error));
}
void* take(size_t bytes) {
  void* p = nullptr;
  check("cudaMalloc", cudaMalloc(&p, bytes));
  return p;
}
void give_back(void* p) { cudaFree(p); }
void copy(void* to, const void* from, size_t bytes) { check("cudaMemcpy", cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }
void wait() { check("the kernel", cudaDeviceSynchronize()); }
double milliseconds(const std::function<void()>& work) {
  static cudaEvent_t begin = nullptr, end = nullptr;
  if (!begin) check("event", cudaEventCreate(&begin)), check("event", cudaEventCreate(&end));
  float found = 0;
  check("event", cudaEventRecord(begin, nullptr));
  work();
  check("event", cudaEventRecord(end, nullptr));
  check("event", cudaEventSynchronize(end));
  check("event", cudaEventElapsedTime(&found, begin, end));
  return found;
}
#endif

class Memory {
 public:
  explicit Memory(size_t bytes) : at_(take(std::max<size_t>(bytes, 1))) {}
  template <class T> explicit Memory(const std::vector<T>& from) : Memory(from.size() * sizeof(T)) {
    copy(at_, from.data(), from.size() * sizeof(T));
  }
  Memory(Memory&& other) noexcept : at_(std::exchange(other.at_, nullptr)) {}
  Memory& operator=(Memory&&) = delete;
  ~Memory() {
    if (at_) give_back(at_);
  }
  template <class T = void> T* at() const { return static_cast<T*>(at_); }

 private:
  void* at_;
};

struct Random {
  uint64_t state;
  uint32_t next() {
    state += 0x9e3779b97f4a7c15;
    uint64_t x = state;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    return static_cast<uint32_t>((x ^ x >> 27) >> 32);
  }
  float unit() { return static_cast<float>(next() >> 8) * 0x1p-24f; }
};

struct Case {
  int64_t m, n, k;
  DType type;
  bool int8 = false;  // gemm_int8 with output of `type`; else gemm_4bit of `type`
};

std::string name_of(const Case& c) {
  return std::string(c.int8 ? "gemm_int8 " : "gemm_4bit ") + std::string(name(c.type)) + " " + std::to_string(c.n) + "x" +
         std::to_string(c.k) + " M=" + std::to_string(c.m);
}

// A plan, ready to run on one of several sets of tensors.
struct Candidate {
  std::string text;
  double clocks;
  std::function<void(size_t set)> run;
};

// The family and configuration in what describe() says of a plan.
std::string text_of(const std::string& description) {
  const size_t begin = description.find(": ") + 2;
  return description.substr(begin, description.find(", about") - begin);
}

int wrong = 0;
std::string wanted;  // part of the text of a plan

// The first candidate is the plainest: the others are compared with it.
template <class T> void measure(const Case& c, const std::vector<Candidate>& all, const std::vector<Memory>& outputs, double limit) {
  const auto size = static_cast<size_t>(c.m * c.n);
  std::vector<T> plain(size), y(size);
  double cheapest = all.front().clocks;
  for (const auto& one : all) cheapest = std::min(cheapest, one.clocks);
  for (const auto& one : all) {
    if (&one != &all.front() && one.text.find(wanted) == std::string::npos) continue;
    std::string tail;
    try {
      const std::vector<uint8_t> nan(size * sizeof(T), 0xff);
      copy(outputs[0].at(), nan.data(), nan.size());
      one.run(0);
      wait();
      copy(y.data(), outputs[0].at(), size * sizeof(T));
      if (&one == &all.front()) plain = y;
      double difference = 0, norm = 0;
      for (size_t i = 0; i < size; ++i) {
        const double a = to_float(plain[i]), b = to_float(y[i]);
        difference += (a - b) * (a - b), norm += a * a;
      }
      const double error = std::sqrt(difference / norm);
      const bool ok = error <= limit && norm > 0;  // not NaN
      wrong += !ok;
      char digits[32] = "null";
      if (std::isfinite(error)) std::snprintf(digits, sizeof digits, "%.3g", error);
      tail = std::string(", \"error\": ") + digits + ", \"ok\": " + (ok ? "true" : "false");
      if (kTimed && one.clocks <= 8 * cheapest) {
        std::vector<double> samples;
        for (int i = 0; i < 21; ++i)
          samples.push_back(milliseconds([&] {
            for (size_t set = 0; set < outputs.size(); ++set) one.run(set);
          }));
        std::sort(samples.begin() + 1, samples.end());  // the first is the warm-up
        tail += ", \"us\": " + std::to_string(samples[samples.size() / 2] * 1e3 / static_cast<double>(outputs.size()));
      }
    } catch (const Error& e) {
      ++wrong;
      tail = ", \"ok\": false, \"message\": \"" + std::string(e.what()) + "\"";
    }
    std::printf("{\"case\": \"%s\", \"plan\": \"%s\", \"clocks\": %.0f, \"chosen\": %s%s}\n", name_of(c).c_str(), one.text.c_str(),
                one.clocks, one.clocks == cheapest ? "true" : "false", tail.c_str());
    std::fflush(stdout);
  }
}

size_t sets_of(double bytes) {
  const auto cache = static_cast<double>(cuda::dev::device().l2_bytes);
  return kTimed ? static_cast<size_t>(std::clamp(std::ceil(3 * cache / bytes), 3.0, 16.0)) : 1;
}

template <class T> std::vector<T> numbers(Random& random, int64_t n) {
  std::vector<T> x(static_cast<size_t>(n));
  for (auto& v : x) v = rounded<T>(2 * random.unit() - 1);
  return x;
}

template <class T> void four_bit(const Case& c) {
  Random random{static_cast<uint64_t>(c.m * 31 + c.n * 7 + c.k)};
  const auto a = numbers<T>(random, c.m * c.k), bias = numbers<T>(random, c.n);
  std::vector<uint8_t> codes(static_cast<size_t>(packed_size(c.n * c.k)));
  for (auto& v : codes) v = static_cast<uint8_t>(random.next());
  std::vector<float> absmax(static_cast<size_t>(blocks_of(c.n * c.k, 64)));
  for (auto& v : absmax) v = 0.5f + random.unit();
  std::vector<Memory> as, weights, scales, outputs;
  const Memory on_bias(bias);
  std::vector<Gemm4bit> calls;
  const size_t out = static_cast<size_t>(c.m * c.n) * sizeof(T);
  for (size_t i = 0; i < sets_of(static_cast<double>(codes.size() + 4 * absmax.size() + a.size() * sizeof(T) + out)); ++i) {
    as.emplace_back(a), weights.emplace_back(codes), scales.emplace_back(absmax), outputs.emplace_back(out);
    Gemm4bit d{.m = c.m, .n = c.n, .k = c.k};
    d.a = {as[i].at(), c.type, c.m * c.k};
    d.codes = {weights[i].template at<uint8_t>(), codes.size()};
    d.absmax.values = {scales[i].template at<float>(), absmax.size()};
    d.bias = {on_bias.at(), c.type, c.n};
    d.out = {outputs[i].at(), c.type, c.m * c.n};
    calls.push_back(d);
  }
  std::vector<Candidate> all;
  auto plans = cuda::gemm::plans(calls[0], cuda::dev::device());
  int64_t bytes = 0;
  for (const auto& p : plans) bytes = std::max(bytes, p.workspace);
  const Memory workspace(static_cast<size_t>(bytes));
  for (const auto& p : plans)
    all.push_back({text_of(cuda::gemm::describe(p, calls[0])), p.clocks,
                   [&calls, &workspace, p](size_t set) { cuda::gemm::run(p, calls[set], workspace.at(), nullptr); }});
  std::ranges::stable_partition(all, [](const Candidate& one) { return one.text.starts_with("fma"); });
  const double sequence = std::max(1.0, std::sqrt(static_cast<double>(c.k) / 1024));
  measure<T>(c, all, outputs, c.type == DType::f32 ? 2e-6 * sequence : c.type == DType::f16 ? 1e-3 : 5e-3);
}

template <class T> void eight_bit(const Case& c) {
  Random random{static_cast<uint64_t>(c.m * 31 + c.n * 7 + c.k)};
  const auto codes = [&](int64_t n) {
    std::vector<int8_t> x(static_cast<size_t>(n));
    for (auto& v : x) v = static_cast<int8_t>(static_cast<int>(random.next() % 255) - 127);
    return x;
  };
  const auto a = codes(c.m * c.k), b = codes(c.n * c.k);
  const Memory rows(numbers<float>(random, c.m)), columns(numbers<float>(random, c.n));
  std::vector<Memory> as, bs, outputs;
  std::vector<GemmInt8> calls;
  const size_t out = static_cast<size_t>(c.m * c.n) * sizeof(T);
  for (size_t i = 0; i < sets_of(static_cast<double>(a.size() + b.size() + out)); ++i) {
    as.emplace_back(a), bs.emplace_back(b), outputs.emplace_back(out);
    GemmInt8 d{.m = c.m, .n = c.n, .k = c.k};
    d.a = {as[i].at<int8_t>(), a.size()};
    d.b = {bs[i].at<int8_t>(), b.size()};
    d.to.row_scale = {rows.at<float>(), static_cast<size_t>(c.m)};
    d.to.column_scale = {columns.at<float>(), static_cast<size_t>(c.n)};
    d.to.out = {outputs[i].at(), c.type, c.m * c.n};
    calls.push_back(d);
  }
  std::vector<Candidate> all;
  const auto first = cuda::gemm::product_of(calls[0]);
  for (const auto& p : cuda::gemm::plans(first, cuda::dev::device()))
    all.push_back({text_of(cuda::gemm::describe(p, first)), p.clocks,
                   [&calls, p](size_t set) { cuda::gemm::run(p, cuda::gemm::product_of(calls[set]), nullptr, nullptr); }});
  measure<T>(c, all, outputs, 0);  // the same bytes
}

void run(const Case& c) {
  visit(c.type, [&]<class T>(T) { c.int8 ? eight_bit<T>(c) : four_bit<T>(c); });
}

std::vector<std::string> split(std::string_view text, char by) {
  std::vector<std::string> parts;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(by, at), text.size());
    parts.emplace_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parts;
}

int main_of(const std::vector<std::string>& arguments) {
  std::string shapes = "4096x4096,4096x14336,14336x4096,8192x8192", rows = "1,2,4,8,16,32,48,64,128,512,2048", types = "bf16,int8";
  for (size_t i = 0; i < arguments.size(); ++i) {
    const auto& option = arguments[i];
    if (option == "--check") {
      shapes = "96x128,40x320,77x33", rows = "1,5,16,40,130", types = "bf16,f16,f32,int8";
      continue;
    }
    auto* to = option == "--shapes"  ? &shapes
               : option == "--rows"  ? &rows
               : option == "--types" ? &types
               : option == "--plan"  ? &wanted
                                     : nullptr;
    if (!to || i + 1 == arguments.size()) {
      std::fprintf(stderr,
                   "bnb_cuda_plans: %s: expected --check, --shapes NxK,.. --rows M,.. --types bf16|f16|f32|int8,.. or --plan TEXT\n",
                   option.c_str());
      return 2;
    }
    *to = arguments[++i];
  }
  if (cuda::device_count() == 0) {
    std::fprintf(stderr, "bnb_cuda_plans: no CUDA device or no driver here\n");
    return 2;
  }
  for (const auto& m : split(rows, ','))
    for (const auto& shape : split(shapes, ','))
      for (const auto& type : split(types, ',')) {
        const auto sizes = split(shape, 'x');
        if (sizes.size() != 2) return std::fprintf(stderr, "bnb_cuda_plans: %s: expected NxK\n", shape.c_str()), 2;
        const DType dtype = type == "f32" ? DType::f32 : type == "f16" ? DType::f16 : DType::bf16;
        if (type != name(dtype) && type != "int8") return std::fprintf(stderr, "bnb_cuda_plans: %s: expected a type\n", type.c_str()), 2;
        run({std::stoll(m), std::stoll(sizes[0]), std::stoll(sizes[1]), dtype, type == "int8"});
      }
  if (wrong) std::fprintf(stderr, "bnb_cuda_plans: %d plans are wrong\n", wrong);
  return wrong != 0;
}

}  // namespace
}  // namespace bnb

int main(int count, char** arguments) {
  try {
    return bnb::main_of({arguments + 1, arguments + count});
  } catch (const std::exception& e) {
    std::fprintf(stderr, "bnb_cuda_plans: %s\n", e.what());
    return 2;
  }
}
