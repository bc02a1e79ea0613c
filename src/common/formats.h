// The constants of every format, each once: code values and decision thresholds. Thresholds are data, never derived from the values:
// several differ from the fp32 midpoints (docs/NUMERICS.md).
#pragma once

#include <bnb/types.h>

#include <array>
#include <cstdint>

namespace bnb {

// The code of t is codes[number of thresholds below t]: strict t > threshold. Decimals are exact fp32 values: the reference's doubles lie
// halfway between two floats, where a float literal and a cast double need not round alike.
struct Nf4 {
  static constexpr QuantType type = QuantType::nf4;
  static constexpr std::array<float, 16> values = {-1.0f,
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
  static constexpr std::array<float, 15> thresholds = {
      -0.8480963706970215f,  -0.6106328964233398f,   -0.4599952697753906f, -0.33967941999435425f, -0.23460739850997925f,
      -0.13791173696517944f, -0.045525018125772476f, 0.03979014977812767f, 0.120255246758461f,    0.2035212516784668f,
      0.2920137643814087f,   0.3893125355243683f,    0.5016634464263916f,  0.6427869200706482f,   0.8614784479141235f};
  static constexpr std::array<uint8_t, 16> codes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

struct Fp4 {
  static constexpr QuantType type = QuantType::fp4;
  static constexpr std::array<float, 16> values = {
      0.0f, 0.0052083334885537624f,  0.66666667f,  1.0f,  0.33333333f,  0.5f,  0.16666667f,  0.25f,
      0.0f, -0.0052083334885537624f, -0.66666667f, -1.0f, -0.33333333f, -0.5f, -0.16666667f, -0.25f};
  // The released package's on the CPU, symmetric. A tiny t > 0 takes code 8, a tiny t <= 0 code 0 (docs/NUMERICS.md).
  static constexpr std::array<float, 15> thresholds = {
      -0.8333333730697632f,   -0.5833333730697632f, -0.4166666865348816f,    -0.2916666865348816f,
      -0.2083333432674408f,   -0.0859375f,          -0.0026041667442768812f, 0.0f,
      0.0026041667442768812f, 0.0859375f,           0.2083333432674408f,     0.2916666865348816f,
      0.4166666865348816f,    0.5833333730697632f,  0.8333333730697632f};
  static constexpr std::array<uint8_t, 16> codes = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
};

// f(Nf4{}) or f(Fp4{}): the one place where a format becomes a type.
template <class F> constexpr decltype(auto) visit(QuantType type, F&& f) {
  if (type == QuantType::nf4) return f(Nf4{});
  return f(Fp4{});
}

// f(float{}), f(Half{}) or f(BFloat16{}): the one place where a dtype becomes a type.
template <class F> constexpr decltype(auto) visit(DType dtype, F&& f) {
  if (dtype == DType::f32) return f(float{});
  if (dtype == DType::f16) return f(Half{});
  return f(BFloat16{});
}

}  // namespace bnb
