// gemm_4bit on a device: its families of kernels and their plans.
#pragma once

#include <bnb/gemm.h>

#include <string>
#include <vector>

#include "cuda/device/plan.h"

namespace bnb::cuda::gemm {

extern const Family<Gemm4bit> kRows4bit, kTile4bit, kPanel4bit, kFma4bit;

// All plans that can do the call, the cheapest first. Sizes are not 0.
std::vector<Plan> plans(const Gemm4bit&, const dev::Device&);
std::string describe(const Plan&, const Gemm4bit&);
void run(const Plan&, const Gemm4bit&, void* workspace, Stream);

// Whether tensor cores multiply this type on this architecture and the tensors allow 16-byte accesses: k a multiple of 32, addresses
// aligned.
bool fits_tensor_cores(const Gemm4bit&, const dev::Device&);
// Whether every pointer to elements is aligned to its type.
bool elements_aligned(const Gemm4bit&);

}  // namespace bnb::cuda::gemm
