// The table of CPU kernels: one entry per operation, one table per instruction set. Dispatch and tests iterate it.
// Arguments are checked by the public functions (src/cpu/*.cpp) before a kernel sees them; a kernel gets a Range of independent units of
// work.
#pragma once

#include <bnb/gemm.h>
#include <bnb/int8.h>
#include <bnb/optim.h>
#include <bnb/quantize.h>

#include <cstdint>
#include <span>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common/optim_rules.h"

namespace bnb::cpu {

struct Range {
  int64_t begin = 0, end = 0;
};

// Whether large outputs go past the caches. Memory whose pages were mapped a moment ago is in the caches already.
enum class Stores : uint8_t { cached, streaming };

// The decision rule of a sorted 256-entry map, made once per call (cpu/kernels/codebook8.h).
struct Encoder8;

inline constexpr int64_t kInt8Columns = 64;  // that quantize_columns_int8 takes at once

// A product in two steps: `pack` brings rows of a into the order and type in which `run` wants them (written to scratch of pack_bytes),
// `run` computes columns [begin, end) of y for all m rows. Columns come in multiples of `column_step`, except the last.
template <class D> struct Product {
  int64_t column_step;
  int64_t (*pack_bytes)(const D&);
  int64_t (*pack_units)(const D&);
  void (*pack)(const D&, void* packed, Range units);
  void (*run)(const D&, const void* packed, Range columns);
};

// One tensor's step. Units of work are its blocks of kOptimizerBlock elements.
struct OptimizerTask {
  const OptimizerTensor* tensor;
  Optimizer rule;
  Hyper hyper;
  float rate;                           // -lr * trust
  const Encoder8 *encoder1, *encoder2;  // of 8-bit states, else null
  const float *code1, *code2;           // their maps
  std::optional<uint64_t> seed;
};

struct Kernels {
  std::string_view isa;
  void (*quantize_4bit)(const Quantize4bit&, Range blocks);
  void (*dequantize_4bit)(const Dequantize4bit&, Stores, Range blocks);
  void (*quantize_blockwise)(const QuantizeBlockwise&, const Encoder8&, Range blocks);
  void (*dequantize_blockwise)(const DequantizeBlockwise&, Stores, Range blocks);
  Product<Gemm4bit> gemm_4bit;

  // `outliers` gets the columns with outliers in these rows; codes in those columns are cleared by the caller.
  void (*quantize_int8)(const QuantizeInt8&, uint64_t* outliers, Range rows);
  void (*quantize_columns_int8)(const QuantizeColumnsInt8&, Range columns);
  void (*dequantize_int8)(const DequantizeInt8&, Range rows);
  void (*dequantize_sums)(const DequantizeSums&, Range rows);
  Product<GemmInt8> gemm_int8;

  void (*optimizer_step)(const OptimizerTask&, Range blocks);
  // Adds |p|^2 and |u|^2; nothing else changes.
  void (*optimizer_norms)(const OptimizerTask&, Range blocks, double (&sums)[2]);
};

// The list of its members: what the tests, and all that must know every kernel, iterate.
template <class Member> struct NamedMember {
  std::string_view name;
  Member Kernels::* at;
};
template <class Member> NamedMember(std::string_view, Member Kernels::*) -> NamedMember<Member>;
inline constexpr std::tuple kKernelMembers = {
    NamedMember{"quantize_4bit", &Kernels::quantize_4bit},
    NamedMember{"dequantize_4bit", &Kernels::dequantize_4bit},
    NamedMember{"quantize_blockwise", &Kernels::quantize_blockwise},
    NamedMember{"dequantize_blockwise", &Kernels::dequantize_blockwise},
    NamedMember{"gemm_4bit", &Kernels::gemm_4bit},
    NamedMember{"quantize_int8", &Kernels::quantize_int8},
    NamedMember{"quantize_columns_int8", &Kernels::quantize_columns_int8},
    NamedMember{"dequantize_int8", &Kernels::dequantize_int8},
    NamedMember{"dequantize_sums", &Kernels::dequantize_sums},
    NamedMember{"gemm_int8", &Kernels::gemm_int8},
    NamedMember{"optimizer_step", &Kernels::optimizer_step},
    NamedMember{"optimizer_norms", &Kernels::optimizer_norms},
};

// f(name, member) for each kernel of a table.
template <class F> constexpr void for_each_kernel(const Kernels& kernels, F&& f) {
  std::apply([&](const auto&... member) { (f(member.name, kernels.*member.at), ...); }, kKernelMembers);
}

constexpr bool is_set(auto* kernel) { return kernel != nullptr; }
template <class D> constexpr bool is_set(const Product<D>& p) {
  return p.column_step > 0 && p.pack_bytes && p.pack_units && p.pack && p.run;
}
constexpr bool is_complete(const Kernels& kernels) {
  bool complete = !kernels.isa.empty();
  for_each_kernel(kernels, [&](std::string_view, const auto& kernel) { complete = complete && is_set(kernel); });
  return complete;
}

template <class A, class B> constexpr bool is_same_member(const NamedMember<A>& a, const NamedMember<B>& b) {
  if constexpr (std::is_same_v<A, B>)
    return a.at == b.at;
  else
    return false;
}
static_assert(std::apply(
                  [](const auto&... member) {
                    const auto times = [&](const auto& one) { return (is_same_member(one, member) + ...); };
                    const size_t bytes = (sizeof(Kernels::isa) + ... + sizeof(std::declval<const Kernels&>().*member.at));
                    return bytes == sizeof(Kernels) && ((times(member) == 1) && ...);
                  },
                  kKernelMembers),
              "kKernelMembers lacks a member of Kernels, or has one twice");

extern const Kernels kScalar, kAvx2, kAvxVnni, kAvx512, kAvx512Bf16, kAmx;

// The tables this build holds and this machine runs, best first.
std::span<const Kernels* const> supported();

// Adds a table to them, just before `scalar`. To be called before anything asks for them: for an instruction set under development, and
// for that of the tests (tests/cpu/isa).
void add_table(const Kernels&);

// The table in use (BNB_FORCE_ISA, force_isa). Throws Error{unsupported} if the forced one cannot run here.
const Kernels& active();

}  // namespace bnb::cpu
