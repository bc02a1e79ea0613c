// How gemm_4bit is done on a device: families of kernels offer plans for a call, the cheapest runs. A plan is data, and can be printed.
#pragma once

#include <bnb/gemm.h>

#include <string>
#include <vector>

#include "cuda/device/device.h"

namespace bnb::cuda::gemm4 {

struct Plan {
  int family = 0;         // of kFamilies
  int config = 0;         // of the family's table
  int splits = 1;         // parts of k that are added in a second pass
  int64_t panel = 0;      // rows of W that are decoded at once
  int64_t workspace = 0;  // bytes
  double clocks = 0;      // estimate of the time
  std::string (*describe)(const Plan&) = nullptr;
};

// A family of kernels. `offer` adds a plan for each of its configurations that can do the call.
struct Family {
  const char* name;
  void (*offer)(const Gemm4bit&, const dev::Device&, std::vector<Plan>&);
  void (*run)(const Plan&, const Gemm4bit&, void* workspace, Stream);
};
extern const Family kRows, kTile, kPanel, kFma;

// All plans that can do the call, the cheapest first. Sizes are not 0.
std::vector<Plan> plans(const Gemm4bit&, const dev::Device&);
std::string describe(const Plan&, const Gemm4bit&);
void run(const Plan&, const Gemm4bit&, void* workspace, Stream);

// ---- what estimates are made of: clocks of one multiprocessor
struct Rates {
  double mma;       // products (16 bits) a clock with mma
  double library;   // likewise what cuBLASLt reaches
  double l2_bytes;  // read from the second-level cache
};
Rates rates_of(int arch);
inline constexpr double kLaunchClocks = 3000;  // a launch that follows another, tables made

// Tensor cores multiply this type on this architecture, and the tensors allow 16-byte accesses: k a multiple of 32, all addresses aligned.
bool fits_tensor_cores(const Gemm4bit&, const dev::Device&);
// Every pointer to elements is aligned to its type.
bool elements_aligned(const Gemm4bit&);

}  // namespace bnb::cuda::gemm4
