// fp32, fp16 and bf16 into one another (bnb/convert.h), in parallel.
#include <bnb/convert.h>

#include <cstring>
#include <type_traits>

#include "common/check.h"
#include "common/convert.h"
#include "common/formats.h"
#include "cpu/gemm/driver.h"

namespace bnb {

float to_fp32(Half x) { return to_float(x); }
float to_fp32(BFloat16 x) { return to_float(x); }
Half to_fp16(float x) { return rounded<Half>(x); }
BFloat16 to_bf16(float x) { return rounded<BFloat16>(x); }

void convert(ConstView from, View to) {
  const Checker check("convert");
  const Memory source = check.view("from", from), target = check.view("to", to);
  check.equal("to", to.size, from.size, "as many as in from");
  check.apart({target}, {source});
  visit(from.dtype, [&](auto from_type) {
    visit(to.dtype, [&](auto to_type) {
      using From = decltype(from_type);
      using To = decltype(to_type);
      parallel_for(from.size, kGrainElements, [&](int64_t begin, int64_t end) {
        if constexpr (std::is_same_v<From, To>)
          std::memcpy(static_cast<To*>(to.data) + begin, static_cast<const From*>(from.data) + begin, (end - begin) * sizeof(To));
        else
          for (int64_t i = begin; i < end; ++i)
            write(static_cast<To*>(to.data) + i, rounded<To>(read(static_cast<const From*>(from.data) + i)));
      });
    });
  });
}

}  // namespace bnb
