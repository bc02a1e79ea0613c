// The decision rule of a sorted 256-entry map: the code of t is the number of thresholds below t. Threshold i lies between codes i and i+1
// at their fp32 midpoint; a t on the midpoint takes the even one of the two (docs/NUMERICS.md). A NaN is above every threshold.
#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "common/convert.h"

namespace bnb::cpu {

// The dynamic maps (create_dynamic_map with 8 bits, 7 of exponent) are 7 decades of n equal steps, then 1.0. So h, the code counted from
// that of zero, is the integer part of  min(|t| * slope + icept, top),  the three by decade ("segment"; 0 is zero, 8 is 1.0). The segment
// comes from integers:  (bits(|t|) + step[exponent]) >> 23  changes at the one boundary of decades that an octave can hold. icept adds
// 128.5 (signed) or 256.5, which leaves h in the upper mantissa bits and how far |t| is above a threshold in the lower ones. That grows
// with t and is known at each threshold: at least 0 and below `unsure`. So a distance of `unsure` or more proves h.
struct Dynamic8 {
  // What icept adds, and what h = 0 gives.
  BNB_INLINE static constexpr float offset(bool is_signed) { return is_signed ? 128.5f : 256.5f; }
  bool is_signed;
  int zero;                       // the code of 0.0
  uint32_t unsure;                // in units of the fraction: 16 bits (signed) or 15 bits
  uint32_t cut[8];                // bits of the greatest |t| of segments 0..7
  alignas(64) uint32_t step[32];  // by exponent - 96
  alignas(64) float slope[16], icept[16], top[16];
};

struct Encoder8 {
  alignas(64) float threshold[256];        // ascending; the last is infinity
  std::unique_ptr<const uint8_t[]> first;  // by the upper 16 bits of t: the code of the least t that has them. Null: not worth making
  bool many = false;                       // some of these buckets hold more than one threshold
  const Dynamic8* dynamic = nullptr;       // set for the two dynamic maps

  BNB_INLINE uint8_t operator()(float t) const {
    if (!first) {
      uint32_t c = 0;
      for (uint32_t step = 128; step; step /= 2) c += t <= threshold[c + step - 1] ? 0 : step;
      return static_cast<uint8_t>(c);
    }
    uint32_t c = first[bits_of(t) >> 16];
    if (!many) return static_cast<uint8_t>(c + (t > threshold[c]));
    while (t > threshold[c]) ++c;
    return static_cast<uint8_t>(c);
  }
};

// Which numbers never take the code of 0, however near to it they are: they take the next one on their side.
enum class Keep : uint8_t { none, negative, positive };

// The code of x, whose nearest one is c.
template <Keep keep> BNB_INLINE constexpr uint8_t kept(const float* value, float x, uint8_t c) {
  if (keep == Keep::negative && x < 0 && c > 0 && value[c] >= 0 && value[c - 1] < 0) return static_cast<uint8_t>(c - 1);
  if (keep == Keep::positive && x > 0 && c < 255 && value[c] <= 0 && value[c + 1] > 0) return static_cast<uint8_t>(c + 1);
  return c;
}
// The same of the dynamic maps.
template <Keep keep> BNB_INLINE constexpr uint8_t kept(const Dynamic8& map, float x, uint8_t c) {
  if (c != map.zero) return c;
  return static_cast<uint8_t>(c + (keep == Keep::positive && x > 0) - (keep == Keep::negative && x < 0));
}

// The encoder of a map (256 ascending values) for about n elements. The last few are kept; any thread may call.
std::shared_ptr<const Encoder8> encoder_for(std::span<const float> code, int64_t n);

}  // namespace bnb::cpu
