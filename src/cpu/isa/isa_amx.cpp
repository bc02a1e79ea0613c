#include "cpu/isa/avx512.h"

#include "cpu/gemm/avx512/gemm_4bit_amx.h"
#include "cpu/gemm/avx512/gemm_4bit_row16.h"
#include "cpu/gemm/avx512/gemm_int8_amx.h"
#include "cpu/isa/make_kernels.h"

namespace bnb::cpu {
constinit const Kernels kAmx = make_kernels<Amx>();
}
