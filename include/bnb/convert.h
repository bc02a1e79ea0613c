// fp32, fp16 and bf16 into one another: rounded to nearest, ties to even, subnormal numbers kept. Beyond the largest number fp16 has
// infinity. A NaN stays one, with its sign and leading payload, made quiet.
#pragma once

#include <bnb/types.h>

namespace bnb {

BNB_API float to_fp32(Half);
BNB_API float to_fp32(BFloat16);
BNB_API Half to_fp16(float);
BNB_API BFloat16 to_bf16(float);

// to[i] = from[i], rounded once; between the two 16-bit types by way of fp32. As many elements in both, in separate memory; a copy where
// the types are the same. Errors: bnb::Error{invalid_argument}.
BNB_API void convert(ConstView from, View to);

}  // namespace bnb
