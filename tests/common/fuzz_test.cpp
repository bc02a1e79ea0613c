// The targets of ./dev fuzz on random bytes of a fixed seed: some seconds of what libFuzzer does for minutes.
#include "fuzz/api.h"

#include <chrono>

#include "cases/cases.h"

namespace bnb::test {
namespace {

class Fuzz : public ::testing::TestWithParam<fuzz::Target> {};
INSTANTIATE_TEST_SUITE_P(Targets, Fuzz, ::testing::ValuesIn(fuzz::targets().begin(), fuzz::targets().end()),
                         [](const auto& t) { return std::string(t.param.name); });

TEST_P(Fuzz, RandomBytes) {
  const int cases = quick() ? 300 : 3000;
  for (int i = 0; i < cases; ++i) {
    const auto seed = static_cast<uint64_t>(i) + 1;
    auto bytes = random_bytes(seed, static_cast<int64_t>(random(seed, 0) % 400));
    if (i % 3 == 0)
      for (auto& b : bytes) b %= 248;  // right calls
    try {
      fuzz::run(GetParam(), bytes);
    } catch (const std::exception& e) { FAIL() << "case " << i << ": " << e.what(); }
  }
}

// A call that writes where it should not is found.
TEST(FuzzMemory, FindsWrites) {
  fuzz::Memory memory;
  const std::vector<uint8_t> given(64, 0);
  for (const bool written : {false, true})
    for (const int64_t at : {-1, 0, 8}) {
      memory.clear();
      fuzz::Bytes bytes(given);
      auto* data = memory.take<uint8_t>(bytes, 8, written);
      memory.keep();
      if (at == 8)
        EXPECT_DEATH(data[at] = 1, "");  // the page behind
      else
        data[at] = 1;
      const bool right = at == 8 || (at == 0 && written);
      if (right)
        EXPECT_NO_THROW(memory.check(true));
      else
        EXPECT_THROW(memory.check(true), fuzz::Fault);
      if (at != 8) EXPECT_THROW(memory.check(false), fuzz::Fault);
    }
}

}  // namespace
}  // namespace bnb::test
