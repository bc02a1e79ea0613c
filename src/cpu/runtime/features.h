// What cpuid and the operating system say. Each level contains the ones before it, but that AVX-512 does without AVX-VNNI.
#pragma once

namespace bnb::cpu {

bool has_avx2();        // AVX2, FMA, F16C, BMI2
bool has_avxvnni();     // AVX-VNNI: products of int8 in the encoding of AVX2
bool has_avx512();      // F, BW, CD, DQ, VL
bool has_avx512bf16();  // VBMI, VNNI, BF16
bool has_amx();         // AMX tiles with bf16 and int8, granted to this process by the kernel

}  // namespace bnb::cpu
