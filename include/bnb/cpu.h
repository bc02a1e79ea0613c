// What the CPU can do and which of it is used.
#pragma once

#include <bnb/export.h>

#include <string_view>
#include <vector>

namespace bnb {

// The instruction sets this build has kernels for and this machine can run, best first, ending with "scalar".
BNB_API std::vector<std::string_view> supported_isas();

// The one in use: the best, or BNB_FORCE_ISA=scalar|avx2|avxvnni|avx512|avx512bf16|amx (an Error at first use where it cannot run).
BNB_API std::string_view active_isa();

// Chooses one by name for the whole process, "" for the best. Not to be called while an operation runs.
BNB_API void force_isa(std::string_view name);

}  // namespace bnb
