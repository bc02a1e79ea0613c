// Which instruction set runs: the best, or the one that was asked for, or an error that names the choices.
#include <sys/wait.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>
#include <sstream>

#include <bnb/gemm.h>
#include <bnb/int8.h>

#include "cases/cases.h"
#include "cpu/kernels/kernels.h"

namespace bnb::test {
namespace {

struct Run {
  std::string output;
  int status;
};
Run print_isa(const std::string& forced) {
  const std::string command = "BNB_FORCE_ISA='" + forced + "' '" BNB_PRINT_ISA "' 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  EXPECT_NE(pipe, nullptr);
  Run run{"", -1};
  char buffer[512];
  for (size_t got; (got = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) run.output.append(buffer, got);
  const int status = pclose(pipe);
  run.status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return run;
}

TEST(Dispatch, TablesAreComplete) {
  std::set<std::string_view> names;
  for (const auto* k : cpu::supported()) {
    EXPECT_TRUE(names.insert(k->isa).second) << k->isa << " twice";
    cpu::for_each_kernel(
        *k, [&](std::string_view name, const auto& kernel) { EXPECT_TRUE(cpu::is_set(kernel)) << k->isa << " has no " << name; });
    EXPECT_TRUE(cpu::is_complete(*k)) << k->isa;
  }
  EXPECT_EQ(supported_isas().back(), "scalar");
}

TEST(Dispatch, ATableThatLacksAKernelIsIncomplete) {
  std::set<std::string_view> names;
  cpu::for_each_kernel(*cpu::supported().back(), [&](std::string_view name, const auto& kernel) {
    EXPECT_TRUE(names.insert(name).second) << name << " twice";
    cpu::Kernels copy = *cpu::supported().back();
    const auto offset = reinterpret_cast<const std::byte*>(&kernel) - reinterpret_cast<const std::byte*>(cpu::supported().back());
    std::memset(reinterpret_cast<std::byte*>(&copy) + offset, 0, sizeof(kernel));
    EXPECT_FALSE(cpu::is_complete(copy)) << "without " << name;
  });
  EXPECT_EQ(names.size(), std::tuple_size_v<decltype(cpu::kKernelMembers)>);
}

// Columns are computed by several threads at once: a task that wrote those of another would race with it.
TEST(Dispatch, ATaskOfAProductWritesItsColumnsOnly) {
  constexpr int64_t k = 1000, blocks = 2;
  for (const auto* kernels : cpu::supported())
    for (const int64_t m : {1, 3, 8, 20, 33, 70}) {
      const auto check = [&](const auto& product, const auto& d, auto& y, auto untouched) {
        const int64_t n = d.n, begin = product.column_step, end = 2 * product.column_step;
        std::vector<char> packed(static_cast<size_t>(product.pack_bytes(d)) + 64);
        char* aligned = packed.data() + (64 - reinterpret_cast<uintptr_t>(packed.data()) % 64) % 64;
        product.pack(d, aligned, {0, product.pack_units(d)});
        product.run(d, aligned, {begin, end});
        for (int64_t i = 0; i < m * n; ++i)
          ASSERT_EQ(y[static_cast<size_t>(i)] == untouched, i % n < begin || i % n >= end)
              << kernels->isa << ", m = " << m << ", row " << i / n << ", column " << i % n;
      };
      const auto size = [](int64_t x) { return static_cast<size_t>(x); };
      {
        const int64_t n = 4 * kernels->gemm_int8.column_step;
        const std::vector<int8_t> a(size(m * k), 1), b(size(n * k), 1);
        std::vector<int32_t> sums(size(m * n), -7);
        check(kernels->gemm_int8, GemmInt8{.m = m, .n = n, .k = k, .a = a, .b = b, .sums = sums}, sums, -7);
      }
      {
        const int64_t n = 4 * kernels->gemm_4bit.column_step, depth = 64 * 16;
        std::vector<uint16_t> a(size(m * depth), 0x3f80), y(size(m * n), 0xc0e0);  // ones; -7
        const std::vector<uint8_t> codes(size(n * depth / 2), 0xff);
        const std::vector<float> absmax(size(n * depth / (64 * blocks)), 1);
        Gemm4bit d{.blocksize = 64 * blocks, .m = m, .n = n, .k = depth, .a = {a.data(), DType::bf16, m * depth}, .codes = codes};
        d.absmax.values = absmax;
        d.out = {y.data(), DType::bf16, m * n};
        check(kernels->gemm_4bit, d, y, uint16_t{0xc0e0});
      }
    }
}

#if defined(__x86_64__) && defined(__linux__)
// The kernel's list of flags, which knows of registers that are not saved.
TEST(Dispatch, TablesAreThoseOfTheFlagsInCpuinfo) {
  std::ifstream file("/proc/cpuinfo");
  std::set<std::string> flags;
  for (std::string line; flags.empty() && std::getline(file, line);)
    if (line.starts_with("flags")) {
      std::istringstream words(line.substr(line.find(':') + 1));
      flags.insert(std::istream_iterator<std::string>(words), {});
    }
  if (flags.empty()) GTEST_SKIP() << "/proc/cpuinfo names no flags";
  const auto has = [&](std::initializer_list<const char*> names) {
    return std::ranges::all_of(names, [&](const char* name) { return flags.contains(name); });
  };
  const bool avx2 = has({"avx2", "fma", "f16c", "bmi2"});
  const bool avx512 = avx2 && has({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"});
  const bool avx512bf16 = avx512 && has({"avx512vbmi", "avx512_vnni", "avx512_bf16"});
  uint64_t granted = 0;  // ARCH_GET_XCOMP_PERM: what supported_isas() has asked for
  (void)supported_isas();
  const bool tiles = syscall(SYS_arch_prctl, 0x1022, &granted) == 0 && (granted >> 18 & 1) != 0;
  std::vector<std::string_view> expected;
  if (avx512bf16 && has({"amx_bf16", "amx_tile", "amx_int8"}) && tiles) expected.push_back("amx");
  if (avx512bf16) expected.push_back("avx512bf16");
  if (avx512) expected.push_back("avx512");
  if (avx2 && has({"avx_vnni"})) expected.push_back("avxvnni");
  if (avx2) expected.push_back("avx2");
  expected.insert(expected.end(), {"vec4", "scalar"});  // tests/cpu/isa, added by the tests
  EXPECT_EQ(supported_isas(), expected);
  EXPECT_EQ(print_isa("").output, expected.front());
}
#endif

TEST(Dispatch, TheEnvironmentChooses) {
  for (const auto isa : supported_isas()) {
    const auto run = print_isa(std::string(isa));
    EXPECT_EQ(run.output, isa);
    EXPECT_EQ(run.status, 0);
  }
  EXPECT_EQ(print_isa("").output, supported_isas().front());
}

void expect_names_choices(const std::string& message, const std::string& given) {
  EXPECT_NE(message.find(given), std::string::npos) << message;
  for (const auto isa : supported_isas()) EXPECT_NE(message.find(isa), std::string::npos) << message;
}

TEST(Dispatch, AnUnknownNameIsAnError) {
  const auto run = print_isa("avx9000");
  EXPECT_EQ(run.status, 3);
  expect_names_choices(run.output, "avx9000");
  EXPECT_NE(run.output.find("BNB_FORCE_ISA"), std::string::npos) << run.output;
  for (const char* isa : {"avx9000", "AVX2", "scalar ", "s"}) {
    const std::string before(active_isa());
    try {
      force_isa(isa);
      FAIL() << isa << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Errc::unsupported);
      expect_names_choices(e.what(), isa);
    }
    EXPECT_EQ(active_isa(), before);
  }
}

TEST(Dispatch, ForceIsaChoosesAndGivesBack) {
  for (const auto isa : supported_isas()) {
    force_isa(isa);
    EXPECT_EQ(active_isa(), isa);
    EXPECT_EQ(cpu::active().isa, isa);
  }
  force_isa("");
  EXPECT_EQ(active_isa(), supported_isas().front());
}

}  // namespace
}  // namespace bnb::test
