// The instructions of ptx.h against plain references, and the rules of memory that they check.
#include <gtest/gtest.h>

#include "cuda/ptx.cuh"

namespace bnb::cuda {
namespace {

TEST(Ptx, FmaUpIsTheLeastFloatNotBelow) {
  EXPECT_EQ(dev::fma_up(0.0f, 15.5f, 1.0f), 1.0f);
  EXPECT_EQ(dev::fma_up(-0x1p-149f, 15.5f, 1.0f), 1.0f);
  EXPECT_EQ(dev::fma_up(0x1p-149f, 15.5f, 1.0f), 1.0f + 0x1p-23f);
  EXPECT_EQ(dev::fma_up(0.5f, 0.5f, 0.75f), 1.0f);
  EXPECT_EQ(dev::float_bits(dev::fma_up(NAN, 1.0f, 1.0f)), 0x7fffffffu);
}

}  // namespace
}  // namespace bnb::cuda
