// The concept InstructionSet: what lacks an operation, or claims one that it has not, is none.
#include <gtest/gtest.h>

#include "cpu/isa/isa.h"
#include "cpu/isa/scalar.h"
#include "cpu/isa/vec4.h"

namespace bnb::cpu {
namespace {

struct WithoutSqrt : Vec4 {
  static F32 sqrt() = delete;
};
struct OfThreeLanes : Vec4 {
  static constexpr int lanes = 3;
};
struct WithoutHalf : Vec4 {
  static F32 load(const float*);
  static F32 load(const int32_t*);
  static F32 load(const BFloat16*);
};
struct WithoutProducts : Vec4 {
  struct Gemm4bitOps {};
};
struct WithoutAddLanes : Vec4 {
  struct GemmInt8Ops : Vec4::GemmInt8Ops {
    static void add_lanes() = delete;
  };
};
struct ShiftedWithoutSums : Vec4 {
  struct GemmInt8Ops : Vec4::GemmInt8Ops {
    static constexpr bool shifted = true;
  };
};
struct ClaimsBf16 : Vec4 {
  static constexpr bool has_bf16_dot = true;
  struct Bf16DotOps {
    static constexpr int lanes = 8;
  };
};
struct ClaimsDynamic8 : Vec4 {
  static constexpr bool has_dynamic8 = true;
  template <bool, Keep> struct EncodeDynamic {};
};

TEST(InstructionSet, SaysWhatIsOne) {
  EXPECT_TRUE(InstructionSet<Scalar>);
  EXPECT_TRUE(InstructionSet<Vec4>);
  EXPECT_FALSE(InstructionSet<Capabilities>);
  EXPECT_FALSE(InstructionSet<WithoutSqrt>);
  EXPECT_FALSE(InstructionSet<OfThreeLanes>);
  EXPECT_FALSE(InstructionSet<WithoutHalf>);
  EXPECT_FALSE(InstructionSet<WithoutProducts>);
  EXPECT_FALSE(InstructionSet<WithoutAddLanes>);
  EXPECT_FALSE(InstructionSet<ShiftedWithoutSums>);
  EXPECT_FALSE(InstructionSet<ClaimsBf16>);
  EXPECT_FALSE(InstructionSet<ClaimsDynamic8>);
}

}  // namespace
}  // namespace bnb::cpu
