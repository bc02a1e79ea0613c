// What this machine can do, for the percentages of the benchmark: prints one JSON object
//   {"threads": {"1": {"read": x, "copy": x, "write": x, "update": x, "cache": x, "fresh32": x, "fresh64": x, "fma": y, "bf16": y,
//                      "int8": y, "int8_loaded": y}, "2": {...}},
//    "int8_loaded_isa": "amx", "fma_isa": "avx512f", "bf16_isa": "amx", "int8_isa": "amx"}    x in GB/s, y in 10^9 operations/s
// read   reading 256 MiB                        write  non-temporal stores to 256 MiB of mapped pages
// fresh  writing 32 and 64 MiB that were not mapped before, in huge pages, mapping and unmapping included
// update changing 64 MiB in place again and again, read + written (the states of an optimizer step)
// copy   non-temporal copy, read + written      cache  reading 8 MiB again and again (the weights of one 4096x4096 4-bit layer)
// fma    fp32 multiply-adds in registers        bf16   the best of fma, vdpbf16ps and tdpbf16ps, products of bf16 with fp32 sums
// int8   the best of vpmaddwd, vpdpbusd (of AVX-VNNI or AVX-512) and tdpbssd, products of int8 with int32 sums
// int8_loaded  tdpbssd on tiles that are loaded as in a product, 32 KiB of one operand again and again (L1), 1 MiB of the other (L2)
// Each figure is the best of several runs. Usage: bnb_limits [threads ...]
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <sys/mman.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr size_t kBytes = size_t{256} << 20, kCacheBytes = size_t{8} << 20, kUpdateBytes = size_t{64} << 20, kHugePage = size_t{2} << 20;
constexpr size_t kAhead = 8192;  // bytes between a prefetch and its use
constexpr int64_t kSteps = 1 << 19;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

Buffer buffer(size_t bytes, int fill) {
  Buffer p(static_cast<char*>(std::aligned_alloc(kHugePage, bytes)));
  (void)madvise(p.get(), bytes, MADV_HUGEPAGE);
  std::memset(p.get(), fill, bytes);
  return p;
}

struct Range {
  size_t begin, end;
};

// Memory that has no pages yet.
class Fresh {
 public:
  explicit Fresh(size_t bytes)
      : size_(bytes + kHugePage),
        map_(static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (map_ == MAP_FAILED) std::abort();
    data_ = map_ + (kHugePage - reinterpret_cast<uintptr_t>(map_) % kHugePage) % kHugePage;
    (void)madvise(data_, bytes, MADV_HUGEPAGE);
  }
  ~Fresh() { munmap(map_, size_); }
  Fresh(const Fresh&) = delete;
  Fresh& operator=(const Fresh&) = delete;
  char* data() const { return data_; }

 private:
  size_t size_;
  char *map_, *data_;
};

// Seconds of the fastest of `repeats` runs of body(thread) on `threads` threads, between before() and after().
double best(int threads, int repeats, const std::function<void(int)>& body, const std::function<void()>& before = {},
            const std::function<void()>& after = {}) {
  double seconds = 1e30;
  for (int r = 0; r < repeats; ++r) {
    const auto start = std::chrono::steady_clock::now();
    if (before) before();
    std::vector<std::thread> pool;
    for (int t = 1; t < threads; ++t) pool.emplace_back(body, t);
    body(0);
    for (auto& t : pool) t.join();
    if (after) after();
    seconds = std::min(seconds, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return seconds;
}

// The widest instructions of this machine for each thing.
struct Machine {
  uint64_t (*read)(const char*, size_t);
  void (*write)(char*, size_t);
  void (*copy)(char*, const char*, size_t);
  double (*fma)();  // returns the operations done
  double (*bf16)();
  double (*int8)();
  std::string fma_isa, bf16_isa, int8_isa;
  double (*int8_loaded)() = nullptr;
};

uint64_t read_plain(const char* p, size_t n) {
  uint64_t s[4] = {};
  for (size_t i = 0; i < n; i += 32) {
    uint64_t v[4];
    std::memcpy(v, p + i, 32);
    for (int k = 0; k < 4; ++k) s[k] += v[k];
  }
  return s[0] + s[1] + s[2] + s[3];
}
void write_plain(char* p, size_t n) { std::memset(p, 1, n); }
void copy_plain(char* out, const char* in, size_t n) { std::memcpy(out, in, n); }

double fma_plain() {
  float s[32] = {};
  volatile float x = 1.0f;
  const float a = x;
  for (int64_t i = 0; i < kSteps; ++i)
    for (float& v : s) v = v * a + a;
  volatile float sink = 0;
  for (float v : s) sink = sink + v;
  return 2.0 * 32 * kSteps;
}

#if defined(__x86_64__)

#define TARGET(isa) __attribute__((target(isa)))

TARGET("avx2") uint64_t read_avx2(const char* p, size_t n) {
  __m256i s[4] = {};
  for (size_t i = 0; i < n; i += 128) {
    _mm_prefetch(p + i + kAhead, _MM_HINT_T1), _mm_prefetch(p + i + 64 + kAhead, _MM_HINT_T1);
    for (int k = 0; k < 4; ++k) s[k] = _mm256_add_epi64(s[k], _mm256_load_si256(reinterpret_cast<const __m256i*>(p + i + 32 * k)));
  }
  const __m256i t = _mm256_add_epi64(_mm256_add_epi64(s[0], s[1]), _mm256_add_epi64(s[2], s[3]));
  return _mm256_extract_epi64(t, 0) + _mm256_extract_epi64(t, 1) + _mm256_extract_epi64(t, 2) + _mm256_extract_epi64(t, 3);
}
TARGET("avx2") void write_avx2(char* p, size_t n) {
  for (size_t i = 0; i < n; i += 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p + i), _mm256_set1_epi8(1));
  _mm_sfence();
}
TARGET("avx2") void copy_avx2(char* out, const char* in, size_t n) {
  for (size_t i = 0; i < n; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), _mm256_load_si256(reinterpret_cast<const __m256i*>(in + i)));
  _mm_sfence();
}
// Instructions of their own, for a compiler merges equal sums and GCC 12 spills those of the vdpbf16ps intrinsic.
TARGET("avx2,fma") double fma_avx2() {
  __m256 s[12] = {};
  const __m256 a = _mm256_set1_ps(1.0f);
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 24
    for (auto& v : s) asm volatile("vfmadd231ps %1, %1, %0" : "+x"(v) : "x"(a));
  return 2.0 * 8 * 12 * kSteps;
}

TARGET("avx2") double madd_avx2() {
  __m256i s[12] = {};
  const __m256i a = _mm256_setzero_si256();
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 24
    for (auto& v : s) {
      __m256i product;
      asm volatile("vpmaddwd %2, %2, %1; vpaddd %1, %0, %0" : "+x"(v), "=&x"(product) : "x"(a));
    }
  return 2.0 * 16 * 12 * kSteps;
}

TARGET("avx2") double dot_avxvnni() {
  __m256i s[12] = {};
  const __m256i a = _mm256_setzero_si256();
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 24
    for (auto& v : s) asm volatile("%{vex%} vpdpbusd %1, %1, %0" : "+x"(v) : "x"(a));
  return 2.0 * 32 * 12 * kSteps;
}

TARGET("avx512f") uint64_t read_avx512(const char* p, size_t n) {
  __m512i s[4] = {};
  for (size_t i = 0; i < n; i += 256)
    for (int k = 0; k < 4; ++k) {
      _mm_prefetch(p + i + 64 * k + kAhead, _MM_HINT_T1);
      s[k] = _mm512_add_epi64(s[k], _mm512_load_si512(p + i + 64 * k));
    }
  alignas(64) uint64_t lanes[8];
  _mm512_store_si512(lanes, _mm512_add_epi64(_mm512_add_epi64(s[0], s[1]), _mm512_add_epi64(s[2], s[3])));
  return std::accumulate(lanes, lanes + 8, uint64_t{0});
}
TARGET("avx512f") void write_avx512(char* p, size_t n) {
  for (size_t i = 0; i < n; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(p + i), _mm512_set1_epi32(1));
  _mm_sfence();
}
TARGET("avx512f") void copy_avx512(char* out, const char* in, size_t n) {
  for (size_t i = 0; i < n; i += 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_load_si512(in + i));
  _mm_sfence();
}
TARGET("avx512f") double fma_avx512() {
  __m512 s[24] = {};
  const __m512 a = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 24
    for (auto& v : s) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(v) : "v"(a));
  return 2.0 * 16 * 24 * kSteps;
}
TARGET("avx512f,avx512bf16") double dot_avx512bf16() {
  __m512 s[24] = {};
  const __m512 a = _mm512_setzero_ps();
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 24
    for (auto& v : s) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(v) : "v"(a));
  return 2.0 * 32 * 24 * kSteps;
}
TARGET("avx512f,avx512vnni") double dot_avx512vnni() {
  __m512i s[24] = {};
  const __m512i a = _mm512_setzero_si512();
  for (int64_t i = 0; i < kSteps; ++i)
#pragma GCC unroll 24
    for (auto& v : s) asm volatile("vpdpbusd %1, %1, %0" : "+v"(v) : "v"(a));
  return 2.0 * 64 * 24 * kSteps;
}
template <bool int8> double tiles_amx(int64_t steps = kSteps / 4) {  // leaves the tiles configured if there are none
  struct alignas(64) Shape {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int t = 0; t < 8; ++t) shape.row_bytes[t] = 64, shape.rows[t] = 16;
  asm volatile("ldtilecfg %0" ::"m"(shape));
  asm volatile(
      "tilezero %%tmm0; tilezero %%tmm1; tilezero %%tmm2; tilezero %%tmm3; tilezero %%tmm4; tilezero %%tmm5; "
      "tilezero %%tmm6; tilezero %%tmm7" ::);
  for (int64_t i = 0; i < steps; ++i)
    if constexpr (int8)
      asm volatile(
          "tdpbssd %%tmm6, %%tmm4, %%tmm0; tdpbssd %%tmm7, %%tmm4, %%tmm1; "
          "tdpbssd %%tmm6, %%tmm5, %%tmm2; tdpbssd %%tmm7, %%tmm5, %%tmm3" ::);
    else
      asm volatile(
          "tdpbf16ps %%tmm6, %%tmm4, %%tmm0; tdpbf16ps %%tmm7, %%tmm4, %%tmm1; "
          "tdpbf16ps %%tmm6, %%tmm5, %%tmm2; tdpbf16ps %%tmm7, %%tmm5, %%tmm3" ::);
  if (steps > 0) asm volatile("tilerelease" ::);
  return 2.0 * 16 * 16 * (int8 ? 64 : 32) * 4 * static_cast<double>(steps);
}
double tiles_loaded() {
  constexpr size_t kFirst = size_t{32} << 10, kSecond = size_t{1} << 20, kTile = 1024, kTurns = 512;
  static const Buffer memory = buffer(2 * kHugePage, 0);  // read by all threads, each through its own caches
  tiles_amx<true>(0);
  const char *first = memory.get(), *second = memory.get() + kHugePage;
  for (size_t turn = 0; turn < kTurns; ++turn)
    for (size_t at = 0; at < kSecond; at += 2 * kTile) {
      const char *a = first + at % kFirst, *b = second + at;
      asm volatile(
          "tileloadd (%0,%2,1), %%tmm4; tileloaddt1 (%1,%2,1), %%tmm6; tdpbssd %%tmm6, %%tmm4, %%tmm0; "
          "tileloadd 1024(%0,%2,1), %%tmm5; tdpbssd %%tmm6, %%tmm5, %%tmm1; "
          "tileloaddt1 1024(%1,%2,1), %%tmm7; tdpbssd %%tmm7, %%tmm4, %%tmm2; tdpbssd %%tmm7, %%tmm5, %%tmm3" ::"r"(a),
          "r"(b), "r"(int64_t{64})
          : "memory");
    }
  asm volatile("tilerelease" ::);
  return 2.0 * 16 * 16 * 64 * 4 * kTurns * (kSecond / (2 * kTile));
}

bool has_avxvnni() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

bool has_amx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl: Linux hands out the tile registers on request
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Machine machine() {
  Machine m{read_plain, write_plain, copy_plain, fma_plain, fma_plain, fma_plain, "sse2", "sse2", "sse2"};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    m = {read_avx2, write_avx2, copy_avx2, fma_avx2, fma_avx2, madd_avx2, "avx2", "avx2", "avx2"};
  if (has_avxvnni()) m.int8 = dot_avxvnni, m.int8_isa = "avxvnni";
  if (__builtin_cpu_supports("avx512f")) {
    m.read = read_avx512, m.write = write_avx512, m.copy = copy_avx512, m.fma = m.bf16 = fma_avx512;
    m.fma_isa = m.bf16_isa = "avx512f";
  }
  if (__builtin_cpu_supports("avx512vnni")) m.int8 = dot_avx512vnni, m.int8_isa = "avx512vnni";
  if (__builtin_cpu_supports("avx512bf16")) m.bf16 = dot_avx512bf16, m.bf16_isa = "avx512bf16";
  if (has_amx()) {
    m.bf16 = [] { return tiles_amx<false>(); };
    m.int8 = [] { return tiles_amx<true>(); };
    m.int8_loaded = tiles_loaded;
    m.bf16_isa = m.int8_isa = "amx";
  }
  return m;
}
#else
Machine machine() { return {read_plain, write_plain, copy_plain, fma_plain, fma_plain, fma_plain, "plain", "plain", "plain"}; }
#endif

}  // namespace

int main(int argc, char** argv) {
  std::vector<int> counts;
  for (int i = 1; i < argc; ++i) counts.push_back(std::max(1, std::atoi(argv[i])));
  if (counts.empty()) counts = {1, static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))};

  const Machine m = machine();
  const Buffer a = buffer(kBytes, 1), b = buffer(kBytes, 2);
  std::printf("{\"threads\": {");
  for (size_t c = 0; c < counts.size(); ++c) {
    const int n = counts[c];
    const auto part = [&](size_t bytes, int t) {
      const size_t step = bytes / n / 4096 * 4096;
      return Range{t * step, t * step + step};
    };
    const auto rate = [&](double factor, size_t bytes, int repeats, const std::function<void(Range)>& body) {
      return factor * (bytes / n / 4096 * 4096) * n / best(n, repeats, [&](int t) { body(part(bytes, t)); }) / 1e9;
    };
    const auto peak = [&](double (*f)()) {
      double work = 0;
      const double seconds = best(n, 7, [&](int t) {
        const double w = f();
        if (t == 0) work = w;
      });
      return work * n / seconds / 1e9;
    };
    std::atomic<uint64_t> sum = 0;  // keeps the reads from being dropped
    const double read = rate(1, kBytes, 7, [&](Range r) { sum += m.read(a.get() + r.begin, r.end - r.begin); });
    const double write = rate(1, kBytes, 7, [&](Range r) { m.write(b.get() + r.begin, r.end - r.begin); });
    const double copy = rate(2, kBytes, 7, [&](Range r) { m.copy(b.get() + r.begin, a.get() + r.begin, r.end - r.begin); });
    const double update = rate(2, kUpdateBytes, 15, [&](Range r) {
      auto* x = reinterpret_cast<uint64_t*>(b.get() + r.begin);
      for (size_t i = 0; i < (r.end - r.begin) / sizeof *x; ++i) x[i] += 1;
    });
    constexpr int kTurns = 32;
    const double cache = rate(kTurns, kCacheBytes, 7, [&](Range r) {
      for (int i = 0; i < kTurns; ++i) sum += m.read(a.get() + r.begin, r.end - r.begin);
    });
    const auto fresh = [&](size_t bytes) {
      double rate = 0;  // one thread may be as fast as all
      for (const int writers : {1, n}) {
        std::optional<Fresh> memory;
        const auto write_fresh = [&](int t) {
          const size_t step = bytes / writers;
          std::memset(memory->data() + t * step, 1, step);
        };
        const double seconds = best(writers, 15, write_fresh, [&] { memory.emplace(bytes); }, [&] { memory.reset(); });
        rate = std::max(rate, static_cast<double>(bytes) / seconds / 1e9);
      }
      return rate;
    };
    const double fresh32 = fresh(size_t{32} << 20), fresh64 = fresh(size_t{64} << 20);
    const double fma = peak(m.fma), bf16 = std::max(fma, peak(m.bf16)), int8 = peak(m.int8);
    std::printf(
        "%s\"%d\": {\"read\": %.2f, \"copy\": %.2f, \"write\": %.2f, \"update\": %.2f, \"cache\": %.2f, \"fresh32\": %.2f, \"fresh64\": "
        "%.2f, \"fma\": %.1f, "
        "\"bf16\": %.1f, \"int8\": %.1f",
        c ? ", " : "", n, read, copy, write, update, cache, fresh32, fresh64, fma, bf16, int8);
    if (m.int8_loaded) std::printf(", \"int8_loaded\": %.1f", peak(m.int8_loaded));
    std::printf("}");
  }
  std::printf("}");
  if (m.int8_loaded) std::printf(", \"int8_loaded_isa\": \"%s\"", m.int8_isa.c_str());
  std::printf(", \"fma_isa\": \"%s\", \"bf16_isa\": \"%s\", \"int8_isa\": \"%s\"}\n", m.fma_isa.c_str(), m.bf16_isa.c_str(),
              m.int8_isa.c_str());
}
