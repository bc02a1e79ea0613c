// The targets of api.h for libFuzzer: BNB_FUZZ_TARGET=gemm bnb_fuzz -max_total_time=60 (./dev fuzz).
#include <cstdio>
#include <cstdlib>

#include "fuzz/api.h"

namespace {

const bnb::fuzz::Target& target() {
  const char* wanted = std::getenv("BNB_FUZZ_TARGET");
  for (const auto& t : bnb::fuzz::targets())
    if (wanted && t.name == wanted) return t;
  std::fputs("BNB_FUZZ_TARGET must be one of", stderr);
  for (const auto& t : bnb::fuzz::targets()) std::fprintf(stderr, " %.*s", static_cast<int>(t.name.size()), t.name.data());
  std::fputs("\n", stderr);
  std::exit(2);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto& chosen = target();
  try {
    bnb::fuzz::run(chosen, {data, size});
  } catch (const std::exception& e) {
    std::fprintf(stderr, "%s\n", e.what());
    std::abort();
  }
  return 0;
}
