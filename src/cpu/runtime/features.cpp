#include "cpu/runtime/features.h"

#include <cstdint>
#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace bnb::cpu {

#if defined(__x86_64__)

// __builtin_cpu_supports knows other names from compiler to compiler, and answers 0 to all of them where the compiler's runtime library is
// not initialized. So cpuid and xgetbv are asked here.
namespace {

struct Registers {
  unsigned a = 0, b = 0, c = 0, d = 0;
};
Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves zeros where there is no such leaf
  return r;
}
constexpr bool has_bits(uint64_t given, std::initializer_list<int> bits) {
  for (const int bit : bits)
    if ((given >> bit & 1) == 0) return false;
  return true;
}
// Of which registers the operating system keeps the contents.
bool saves_registers(std::initializer_list<int> states) {
  if (!has_bits(cpuid(1, 0).c, {27})) return false;  // OSXSAVE: xgetbv may be used
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return has_bits(uint64_t{high} << 32 | low, states);
}

}  // namespace

bool has_avx2() {
  return saves_registers({1, 2}) &&                // SSE, AVX
         has_bits(cpuid(1, 0).c, {12, 28, 29}) &&  // FMA, AVX, F16C
         has_bits(cpuid(7, 0).b, {5, 8});          // AVX2, BMI2
}

bool has_avxvnni() { return has_avx2() && has_bits(cpuid(7, 1).a, {4}); }

bool has_avx512() {
  return has_avx2() && saves_registers({5, 6, 7}) &&     // masks, upper halves of 0 to 15, 16 to 31
         has_bits(cpuid(7, 0).b, {16, 17, 28, 30, 31});  // F, DQ, CD, BW, VL
}

bool has_avx512bf16() {
  return has_avx512() && has_bits(cpuid(7, 0).c, {1, 11}) &&  // VBMI, VNNI
         has_bits(cpuid(7, 1).a, {5});                        // BF16
}

bool has_amx() {
#if defined(__linux__)
  if (!has_avx512bf16() || !saves_registers({17, 18}) ||  // shapes of tiles, tiles
      !has_bits(cpuid(7, 0).d, {22, 24, 25}))             // bf16, tiles, int8
    return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; threads started later inherit it
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

}  // namespace bnb::cpu
