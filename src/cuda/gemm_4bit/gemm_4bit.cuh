// What the kernels of gemm_4bit share: the operand W, its scales, lookup tables of codes, the epilogue.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <utility>

#include "common/convert.h"
#include "common/formats.h"
#include "cuda/device/cost.h"
#include "cuda/device/ptx.cuh"
#include "cuda/gemm_4bit/gemm_4bit.h"

namespace bnb::cuda::gemm {

using dev::Bits;

// ---- operand W, n x k
struct Weight4bit {
  const uint8_t* codes;
  const float* absmax;          // per block; nested: per block of absmax_codes
  const uint8_t* absmax_codes;  // null: not nested
  const float* map;             // of absmax_codes
  const float* offset_at;       // null: offset
  float offset;
  int log2_block, log2_nested;
  int64_t n, k;
  QuantType type;
};
inline Weight4bit weight_of(const Gemm4bit& d) {
  const bool nested = d.absmax.is_nested();
  return {.codes = d.codes.data(),
          .absmax = nested ? d.absmax.nested.data() : d.absmax.values.data(),
          .absmax_codes = d.absmax.codes.data(),
          .map = d.absmax.code.data(),
          .offset_at = d.absmax.device_offset,
          .offset = d.absmax.offset,
          .log2_block = std::countr_zero(static_cast<uint64_t>(d.blocksize)),
          .log2_nested = std::countr_zero(static_cast<uint64_t>(d.absmax.nested_blocksize)),
          .n = d.n,
          .k = d.k,
          .type = d.type};
}

// absmax of blocks: `fetch` issues the load early, `decode` gives the value.
class Scales {
 public:
  BNB_DEVICE explicit Scales(const Weight4bit& w) : w_(w) {}
  BNB_DEVICE uint32_t fetch(int64_t block) const {
    return w_.absmax_codes ? uint32_t{w_.absmax_codes[block]} : dev::float_bits(w_.absmax[block]);
  }
  // `block()` is called only where scales are nested, so that no register holds it otherwise.
  template <class F> BNB_DEVICE float decode(uint32_t fetched, F&& block) const {
    if (!w_.absmax_codes) return dev::bits_float(fetched);
    return dev::add(dev::mul(w_.map[fetched], w_.absmax[block() >> w_.log2_nested]), w_.offset_at ? *w_.offset_at : w_.offset);
  }
  BNB_DEVICE float operator[](int64_t block) const {
    return decode(fetch(block), [&] { return block; });
  }

 private:
  const Weight4bit& w_;
};

// ---- codes are looked up in pairs: a byte selects a line of 256 bytes, in which each lane has its own words. One byte permute makes the
// address, (byte, lane offset), and no two lanes share a bank.
inline constexpr int kLine = 256, kLines = 256;
BNB_DEVICE uint32_t line_address(uint32_t codes, int byte, uint32_t lane_offset) {
  return dev::permute(codes, lane_offset, 0x5504 | static_cast<uint32_t>(byte) << 4);
}

// The values of a format times `prescale`, rounded to T. The factors are those that make the error of rounding least: fp4 has none left,
// nf4 6.3e-4 in bf16 (1.06e-3 without, about as much as rounding every weight) and 6e-5 in fp16, root mean square. It is divided out of
// sums.
struct Values {
  uint16_t bits[2][16];  // by QuantType
  float inverse[2];
};
template <class T> constexpr Values prescaled() {
  constexpr double kNf4 = dtype_of<T> == DType::bf16 ? 1.4370059967041016 : 1.677689552307129, kFp4 = 3;
  Values v{};
  for (int i = 0; i < 16; ++i) {
    v.bits[static_cast<int>(QuantType::nf4)][i] = rounded<T>(static_cast<float>(Nf4::values[i] * kNf4)).bits;
    v.bits[static_cast<int>(QuantType::fp4)][i] = rounded<T>(static_cast<float>(Fp4::values[i] * kFp4)).bits;
  }
  v.inverse[static_cast<int>(QuantType::nf4)] = static_cast<float>(1 / kNf4);
  v.inverse[static_cast<int>(QuantType::fp4)] = static_cast<float>(1 / kFp4);
  return v;
}
template <class T> BNB_TABLE Values kPrescaled = prescaled<T>();

struct Codebooks {
  float values[2][16];  // by QuantType
};
constexpr Codebooks make_codebooks() {
  Codebooks c{};
  for (int i = 0; i < 16; ++i) {
    c.values[static_cast<int>(QuantType::nf4)][i] = Nf4::values[i];
    c.values[static_cast<int>(QuantType::fp4)][i] = Fp4::values[i];
  }
  return c;
}
BNB_TABLE Codebooks kCodebooks = make_codebooks();

// Pairs of prescaled values in the lower half of each line, 4 bytes per lane; the upper half is free.
template <class T> struct PrescaledPairs {
  BNB_DEVICE static void fill_table(uint8_t* lines, QuantType type) {
    const uint16_t* bits = kPrescaled<T>.bits[static_cast<int>(type)];
    for (unsigned i = dev::thread(); i < kLines * 8; i += dev::threads()) {
      const unsigned byte = i / 8;
      const uint32_t pair = bits[byte >> 4] | uint32_t{bits[byte & 15]} << 16;
      dev::store_shared(lines + byte * kLine + i % 8 * 16, Bits<16>{pair, pair, pair, pair});
    }
  }
  BNB_DEVICE static uint32_t lane_offset() { return dev::lane() * 4; }
  BNB_DEVICE static uint32_t pair(const uint8_t* lines, uint32_t codes, int byte, uint32_t lane_offset) {
    return dev::load_shared<Bits<4>>(lines + line_address(codes, byte, lane_offset)).word[0];
  }
};

// ---- epilogue: y, m x n
struct Epilogue4bit {
  void* y;
  const void* bias;  // null: none
  DType bias_type;
};
inline Epilogue4bit epilogue_of(const Gemm4bit& d) { return {d.out.data, d.bias.size ? d.bias.data : nullptr, d.bias.dtype}; }

BNB_DEVICE float bias_at(const Epilogue4bit& e, int64_t column) {
  if (!e.bias) return 0;
  if (e.bias_type == DType::f32) return static_cast<const float*>(e.bias)[column];
  if (e.bias_type == DType::f16) return dev::to_float(static_cast<const Half*>(e.bias)[column]);
  return dev::to_float(static_cast<const BFloat16*>(e.bias)[column]);
}

}  // namespace bnb::cuda::gemm
