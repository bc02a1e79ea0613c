// The codes of 8 bits: any ascending map of 256 values.
//
// The code of t is the number of thresholds below t (Encoder8). Thresholds are replicated per lane, each copy in its own bank. The sign, 5
// bits of exponent and 6 of mantissa (exponents below 2^-30 are clamped to it) select a bucket, whose first code a table holds; if no
// bucket has more than one threshold, one comparison decides. Otherwise, or without that table, a binary search.
#pragma once

#include "cuda/device/span.cuh"

namespace bnb::cuda {

struct Lane8 {
  static constexpr uint32_t kBuckets = 4096, kLowest = 97 << 6, kHalf = kBuckets / 2;
  const uint8_t* first;
  const float* threshold;  // this lane's copy: the threshold above code c is threshold[c << copies]
  unsigned copies;         // as a power of two
  bool by_bucket;

  BNB_DEVICE float above(uint32_t c) const { return threshold[c << copies]; }
  BNB_DEVICE uint32_t search(float t) const {
    uint32_t c = 0;
    BNB_UNROLL
    for (uint32_t step = 128; step; step /= 2) c += t <= above(c + step - 1) ? 0 : step;
    return c;
  }
  BNB_DEVICE static uint32_t bucket_of(float t) {
    const uint32_t bits = dev::float_bits(t);
    int key = static_cast<int>((bits & 0x7fffffff) >> 17) - static_cast<int>(kLowest);
    key = key < 0 ? 0 : key;
    key = key > static_cast<int>(kHalf) - 1 ? static_cast<int>(kHalf) - 1 : key;
    return static_cast<uint32_t>(key) | (bits >> 20 & kHalf);
  }
  BNB_DEVICE uint32_t lookup(float t) const {
    const uint32_t c = first[bucket_of(t)];
    return c + (t > above(c) ? 1 : 0);
  }
  template <int n> BNB_DEVICE auto operator()(const float (&t)[n]) const {
    dev::Bits < n<4 ? 4 : n> codes = {};
    if (by_bucket) {
      BNB_UNROLL
      for (int i = 0; i < n; ++i) codes.word[i / 4] |= lookup(t[i]) << i % 4 * 8;
    } else {
      BNB_UNROLL
      for (int i = 0; i < n; ++i) codes.word[i / 4] |= search(t[i]) << i % 4 * 8;
    }
    return codes;
  }
};

// A map's tables in shared memory.
struct Tables8 {
  float threshold[256][dev::kWarp];
  float plain[256];
  uint8_t first[Lane8::kBuckets];
  float last_of_warp[8];
};

// The float before x, for x that is not NaN.
BNB_DEVICE float before(float x) {
  const uint32_t bits = dev::float_bits(x);
  if (bits == 0xff800000) return x;
  return dev::bits_float((bits & 0x7fffffff) == 0 ? 0x80000001 : bits >> 31 ? bits + 1 : bits - 1);
}

// Threshold i: the fp32 midpoint of values i and i + 1, or the float before it for odd i; never below threshold i - 1. Needs at least 256
// threads.
BNB_DEVICE void set_thresholds(Tables8& s, const float* code) {
  const unsigned i = dev::thread();
  const float infinity = dev::bits_float(0x7f800000);
  float t = -infinity;
  if (i < 255) {
    const float mid = dev::mul(dev::add(code[i], code[i + 1]), 0.5f);
    const float threshold = i % 2 == 0 ? mid : before(mid);
    if (threshold > t) t = threshold;
  }
  const auto take_greater = [&](float other) { t = other > t ? other : t; };
  BNB_UNROLL
  for (unsigned k = 1; k < dev::kWarp; k *= 2) {
    const float other = dev::shuffle(t, dev::lane() - k);
    if (dev::lane() >= k) take_greater(other);
  }
  if (i < 256 && dev::lane() == dev::kWarp - 1) s.last_of_warp[dev::warp()] = t;
  dev::barrier();
  if (i < 256) {
    for (unsigned w = 0; w < dev::warp(); ++w) take_greater(s.last_of_warp[w]);
    s.plain[i] = i == 255 ? infinity : t;
  }
  dev::barrier();
  for (unsigned k = i; k < 256 * dev::kWarp; k += dev::threads()) s.threshold[k / dev::kWarp][k % dev::kWarp] = s.plain[k / dev::kWarp];
  dev::barrier();
}

// Whether no bucket holds more than one threshold.
BNB_DEVICE bool set_buckets(Tables8& s, const Lane8& lane) {
  bool many = false;
  for (uint32_t key = dev::thread(); key < Lane8::kBuckets; key += dev::threads()) {
    const uint32_t half = key % Lane8::kHalf, sign = key / Lane8::kHalf << 31;
    const float least = dev::bits_float(sign | (half ? (half + Lane8::kLowest) << 17 : 0)),
                most = dev::bits_float(sign | (((half + 1 + Lane8::kLowest) << 17) - 1));
    const uint32_t begin = lane.search(sign ? most : least), end = lane.search(sign ? least : most);
    const bool nan = half == Lane8::kHalf - 1;  // infinity and NaN
    s.first[key] = static_cast<uint8_t>(nan ? 255 : begin);
    many |= !nan && end > begin + 1;
  }
  return !dev::barrier_or(many);
}

BNB_DEVICE Lane8 prepare8(Tables8& s, const float* code, bool want_buckets) {
  set_thresholds(s, code);
  Lane8 lane{s.first, &s.threshold[0][dev::lane()], 5, false};
  if (want_buckets) lane.by_bucket = set_buckets(s, lane);
  return lane;
}

}  // namespace bnb::cuda
