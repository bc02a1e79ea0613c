// The code values of every map that users of k-bit quantization know by name.
#pragma once

#include <bnb/types.h>

#include <span>
#include <string_view>
#include <vector>

namespace bnb {

// The 16 values of a 4-bit format in code order (fp4: codes 8..15 are the negatives of 0..7).
BNB_API std::span<const float, 16> values_of(QuantType);

// A 16-entry map by name: "nf4", "fp4", "int4", "af4" (abnormal float, Yoshida 2023, arXiv 2306.06965), for blocks of 64 as in the released
// package.
BNB_API std::vector<float> create_4bit_map(std::string_view name);

// Dynamic map (arXiv 2110.02861, section 1.3): a run-length exponent of base 10, the remaining bits a linear fraction. 2^total_bits values
// in ascending order, padded with zeros to 256.
BNB_API std::vector<float> create_dynamic_map(bool is_signed = true, int max_exponent_bits = 7, int total_bits = 8);

// Equal steps over [-1, 1] or [0, 1].
BNB_API std::vector<float> create_linear_map(bool is_signed = true, int total_bits = 8, bool add_zero = true);

// Quantiles of the normal distribution, scaled to [-1, 1]; `offset` is the probability of the outermost one.
BNB_API std::vector<float> create_normal_map(double offset = 0.9677083, bool use_extra_value = true);

// Floating point with the given split of bits, scaled to [-1, 1].
BNB_API std::vector<float> create_fp8_map(bool is_signed = true, int exponent_bits = 5, int precision_bits = 2, int total_bits = 8);

}  // namespace bnb
