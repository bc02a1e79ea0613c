// The rules of docs/NUMERICS.md once more, as plainly as they can be written and without a line of the library: what every kernel is held
// to. Constants are spelled out again on purpose.
#pragma once

#include <bnb/types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

namespace bnb::reference {

// ---- 16-bit floats by arithmetic: sign, scale, integer
struct Layout {
  int mantissa, bias, full;  // bits, exponent of 1.0, exponent field of Inf and NaN
};
template <class T>
inline constexpr Layout layout_of = sizeof(T) == 4            ? Layout{23, 127, 255}
                                    : std::is_same_v<T, Half> ? Layout{10, 15, 31}
                                                              : Layout{7, 127, 255};

inline double to_double(float x) { return x; }
template <class T> double to_double(T x) {
  constexpr Layout f = layout_of<T>;
  const int exponent = x.bits >> f.mantissa & f.full, fraction = x.bits & ((1 << f.mantissa) - 1);
  const double sign = x.bits >> 15 ? -1 : 1;
  if (exponent == f.full) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  const int hidden = exponent ? 1 << f.mantissa : 0;
  return sign * std::ldexp(hidden + fraction, (exponent ? exponent : 1) - f.bias - f.mantissa);
}
template <class T> float to_float(T x) { return static_cast<float>(to_double(x)); }

// Nearest value of type T, ties to even.
template <class T> T rounded(double x) {
  if constexpr (std::is_same_v<T, float>) {
    return static_cast<float>(x);
  } else {
    constexpr Layout f = layout_of<T>;
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0, infinity = static_cast<uint16_t>(f.full << f.mantissa);
    if (std::isnan(x)) return {static_cast<uint16_t>(sign | infinity | 1 << (f.mantissa - 1))};
    x = std::fabs(x);
    const int least = 1 - f.bias, exponent = x == 0 || std::isinf(x) ? least : std::max(std::ilogb(x), least);
    const double steps = std::nearbyint(std::ldexp(x, f.mantissa - exponent));  // in units of the last place; exact before rounding
    const double bits = steps + std::ldexp(exponent - least, f.mantissa);       // a carry moves into the exponent by itself
    return {static_cast<uint16_t>(sign | (bits < infinity ? static_cast<uint16_t>(bits) : infinity))};
  }
}

// ---- 4 bit
inline constexpr float kNf4Values[16] = {-1.0f,
                                         -0.6961928009986877f,
                                         -0.5250730514526367f,
                                         -0.39491748809814453f,
                                         -0.28444138169288635f,
                                         -0.18477343022823334f,
                                         -0.09105003625154495f,
                                         0.0f,
                                         0.07958029955625534f,
                                         0.16093020141124725f,
                                         0.24611230194568634f,
                                         0.33791524171829224f,
                                         0.44070982933044434f,
                                         0.5626170039176941f,
                                         0.7229568362236023f,
                                         1.0f};
// As doubles: some lie halfway between two floats, where the rounded double and the rounded decimal differ.
inline constexpr double kNf4Thresholds[15] = {-0.8480964004993439,  -0.6106329262256622,  -0.4599952697753906,   -0.33967943489551544,
                                              -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
                                              0.1202552504837513,   0.2035212516784668,   0.2920137718319893,    0.3893125355243683,
                                              0.5016634166240692,   0.6427869200706482,   0.8614784181118011};
// fp4: the values of codes 0..7, and their negatives.
inline constexpr float kFp4Magnitudes[8] = {0, 0.005208333333f, 0.66666667f, 1, 0.33333333f, 0.5f, 0.16666667f, 0.25f};
// |t| above each of these takes the code beside it. Of the two zeros, t > 0 takes 8 and t <= 0 takes 0, as in the released package.
inline constexpr struct {
  float threshold;
  int code;
} kFp4Steps[7] = {{0.002604166744f, 1}, {0.0859375f, 6},  {0.20833334f, 7}, {0.29166669f, 4},
                  {0.41666669f, 5},     {0.58333337f, 2}, {0.83333337f, 3}};

inline float value_of(QuantType type, int code) {
  if (type == QuantType::nf4) return kNf4Values[code];
  return code < 8 ? kFp4Magnitudes[code] : 0 - kFp4Magnitudes[code - 8];  // 0 and 8 are both +0
}

// A NaN counts as above every threshold.
inline int code_of(QuantType type, float t) {
  if (type == QuantType::nf4) {
    int code = 0;
    for (const double threshold : kNf4Thresholds) code += !(t <= static_cast<float>(threshold));
    return code;
  }
  const bool negative = t < 0;
  const float magnitude = negative ? -t : t;
  int code = t > 0 ? 8 : 0;
  for (const auto& step : kFp4Steps) {
    const bool above = negative ? magnitude >= step.threshold : !(magnitude <= step.threshold);  // strict t > threshold, on both sides
    if (above) code = step.code + (negative ? 8 : 0);
  }
  return code;
}

// ---- blocks
struct Quantized {
  std::vector<uint8_t> codes;
  std::vector<float> absmax;
};

// Calls encode(i, t) for every element; absmax of the blocks. A block that holds a NaN has a NaN, one that holds an infinity has that.
template <class F> std::vector<float> encode_blocks(std::span<const float> x, int64_t blocksize, F&& encode) {
  std::vector<float> result;
  for (size_t begin = 0; begin < x.size(); begin += static_cast<size_t>(blocksize)) {
    const auto block = x.subspan(begin, std::min(static_cast<size_t>(blocksize), x.size() - begin));
    float absmax = 0;
    bool nan = false;
    for (const float v : block) {
      nan |= std::isnan(v);
      absmax = std::max(absmax, std::fabs(v));
    }
    if (nan) absmax = std::numeric_limits<float>::quiet_NaN();
    result.push_back(absmax);
    const float inverse = 1.0f / (absmax < 1e-38f ? 1e-38f : absmax);
    for (size_t i = 0; i < block.size(); ++i) encode(begin + i, block[i] * inverse);
  }
  return result;
}

inline Quantized quantize_4bit(QuantType type, std::span<const float> x, int64_t blocksize) {
  Quantized q;
  q.codes.assign((x.size() + 1) / 2, 0);
  if (x.size() % 2) q.codes.back() = static_cast<uint8_t>(code_of(type, 0));
  q.absmax = encode_blocks(x, blocksize, [&](size_t i, float t) {
    q.codes[i / 2] = static_cast<uint8_t>(q.codes[i / 2] | code_of(type, t) << (i % 2 ? 0 : 4));
  });
  return q;
}

// Boundary i lies at fp32((code[i] + code[i+1]) * 0.5); a t on it takes the even one of the two codes. Boundaries are asked from the first
// on, and the first that t is not above decides (which matters where a map holds equal values).
class Nearest {
 public:
  explicit Nearest(std::span<const float> code) {
    for (size_t i = 0; i + 1 < code.size(); ++i) middle_.push_back((code[i] + code[i + 1]) * 0.5f);
  }
  uint8_t operator()(float t) const {
    if (std::isnan(t)) return 255;
    auto i = static_cast<size_t>(std::ranges::lower_bound(middle_, t) - middle_.begin());  // t is above all before
    while (i < middle_.size() && (i % 2 ? t >= middle_[i] : t > middle_[i])) ++i;
    return static_cast<uint8_t>(i);
  }
  float middle(size_t i) const { return middle_[i]; }

 private:
  std::vector<float> middle_;
};

inline Quantized quantize_blockwise(const Nearest& nearest, std::span<const float> x, int64_t blocksize) {
  Quantized q;
  q.codes.resize(x.size());
  q.absmax = encode_blocks(x, blocksize, [&](size_t i, float t) { q.codes[i] = nearest(t); });
  return q;
}

inline int nibble(std::span<const uint8_t> codes, size_t i) { return codes[i / 2] >> (i % 2 ? 0 : 4) & 15; }

template <class T>
std::vector<T> dequantize_4bit(QuantType type, std::span<const uint8_t> codes, std::span<const float> absmax, size_t n, int64_t blocksize) {
  std::vector<T> out(n);
  for (size_t i = 0; i < n; ++i) {
    const float product = value_of(type, nibble(codes, i)) * absmax[i / static_cast<size_t>(blocksize)];
    out[i] = rounded<T>(product);
  }
  return out;
}

template <class T>
std::vector<T> dequantize_blockwise(std::span<const float> code, std::span<const uint8_t> codes, std::span<const float> absmax,
                                    int64_t blocksize) {
  std::vector<T> out(codes.size());
  for (size_t i = 0; i < codes.size(); ++i) {
    const float product = code[codes[i]] * absmax[i / static_cast<size_t>(blocksize)];
    out[i] = rounded<T>(product);
  }
  return out;
}

}  // namespace bnb::reference
