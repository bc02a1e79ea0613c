// Which table of kernels runs: the best the machine has, unless one is forced by name.
#include <bnb/cpu.h>
#include <bnb/error.h>

#include <atomic>
#include <cstdlib>
#include <string>

#include "cpu/kernels/kernels.h"
#include "cpu/runtime/features.h"
#include "cpu/runtime/parallel.h"

namespace bnb::cpu {
namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

// Best first.
constexpr Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&kAmx, has_amx},
    {&kAvx512Bf16, has_avx512bf16},
    {&kAvx512, has_avx512},
    {&kAvxVnni, has_avxvnni},
    {&kAvx2, has_avx2},
#endif
    {&kScalar, [] { return true; }},
};

constexpr size_t kMostAdded = 4;
constinit const Kernels* g_added[kMostAdded] = {};
constinit size_t g_added_count = 0;

struct Supported {
  const Kernels* list[std::size(kCandidates) + kMostAdded] = {};
  size_t count = 0;
  Supported() {
    for (const auto& c : kCandidates) {
      if (c.kernels == &kScalar)
        for (size_t i = 0; i < g_added_count; ++i) list[count++] = g_added[i];
      if (c.runs_here()) list[count++] = c.kernels;
    }
  }
};

const Kernels& find(std::string_view name) {
  std::string known;
  for (const Kernels* k : supported()) {
    if (k->isa == name) return *k;
    known.append(known.empty() ? "" : ", ").append(k->isa);
  }
  throw Error(Errc::unsupported, "BNB_FORCE_ISA: \"" + std::string(name) + "\" cannot run here, expected one of " + known);
}

std::atomic<const Kernels*> g_active{nullptr};

}  // namespace

std::span<const Kernels* const> supported() {
  const auto& s = process_wide<Supported>();
  return {s.list, s.count};
}

void add_table(const Kernels& kernels) {
  if (g_added_count == kMostAdded) throw Error(Errc::unsupported, "add_table: there are " + std::to_string(kMostAdded) + " tables already");
  g_added[g_added_count++] = &kernels;
}

const Kernels& active() {
  if (const Kernels* k = g_active.load(std::memory_order_acquire)) [[likely]]
    return *k;
  const char* forced = std::getenv("BNB_FORCE_ISA");
  const Kernels& k = forced && *forced ? find(forced) : *supported().front();
  g_active.store(&k, std::memory_order_release);
  return k;
}

}  // namespace bnb::cpu

namespace bnb {

std::vector<std::string_view> supported_isas() {
  std::vector<std::string_view> names;
  for (const auto* k : cpu::supported()) names.push_back(k->isa);
  return names;
}

std::string_view active_isa() { return cpu::active().isa; }

void force_isa(std::string_view name) {
  cpu::g_active.store(name.empty() ? cpu::supported().front() : &cpu::find(name), std::memory_order_release);
}

}  // namespace bnb
