// What an instruction set supplies: the concept InstructionSet. The kernels are templates over one (make_kernels.h), its operations are
// members of it, and what it can do beyond the least is a constant of it. CONTRIBUTING.md has the steps to add one, tests/cpu/isa the test
// of every operation. One derived from another overrides what differs.
#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>
#include <string_view>

#include "common/convert.h"
#include "common/formats.h"
#include "cpu/kernels/codebook8.h"
#include "cpu/kernels/plain.h"

namespace bnb::cpu {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

// Weights that the 4-bit product decodes at once: 32 bytes of codes, read into lanes of kGroup / lanes codes each. Vector i of a decoded
// group holds code i of every lane, so activations are brought into the same order first (`permute`).
inline constexpr int kGroup = 64;

// Where element e of a group goes: the high nibble, at shift 4, is the even element.
template <int lanes> constexpr int position(int e) {
  constexpr int per_lane = kGroup / lanes;
  return ((e % per_lane) ^ 1) * lanes + e / per_lane;
}

BNB_INLINE int32_t load_word(const void* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return word;
}

// Which product serves a single row of activations (cpu/gemm/gemm_4bit.h).
enum class SingleRow : uint8_t {
  as_many,  // that of many rows
  fp32,     // RowGemm
  digits    // IntRowGemm
};

// What an instruction set need not have. One that has it says so by a constant of the same name.
struct Capabilities {
  static constexpr bool can_stream = false;    // Decode4 and Decode8 store past the caches if told so; fence() ends that
  static constexpr bool has_dynamic8 = false;  // EncodeDynamic: the dynamic 8-bit maps in vectors
  static constexpr bool has_bf16_dot = false;  // Bf16DotOps: products of pairs of bf16
  static constexpr bool has_tiles = false;     // AMX (cpu/gemm/gemm_amx.h)
  template <class T> static constexpr SingleRow single_row = SingleRow::as_many;
  static void fence() {}
  // What lies some way past p is read soon. Called for every 64 bytes of input.
  BNB_INLINE static void prefetch(const void*) {}
};

// ---- the concept, part by part. F32 is a vector of `lanes` floats, Mask says yes or no for each; `from` and `to` need no alignment.

// Elements of T as floats and back: rounded to nearest even, subnormals kept, a NaN made quiet. n: whole chunks (kernels/plain.h).
template <class Isa, class T>
concept ConvertsElements = requires(typename Isa::F32 x, const T* from, T* to, int64_t n, float scale, uint8_t* codes,
                                    const uint8_t* read_codes, const float* map) {
  x = Isa::load(from);
  Isa::store(to, x);
  Isa::store_pair(to, x, x);                                                              // 2 lanes of elements
  { Isa::max_bits(from, n) } -> std::same_as<uint32_t>;                                   // of the greatest |x|; above infinity for a NaN
  { Isa::any_large(from, 64) } -> std::same_as<bool>;                                     // whether any is 2 or more, infinite or NaN
  (typename Isa::template Encode4<Nf4>{}(from, n, scale, codes));                         // two codes a byte, of x * scale: finite
  (typename Isa::template Decode4<Nf4, T, Isa::can_stream>{}(read_codes, n, scale, to));  // value * scale, rounded to T
  (typename Isa::template Decode8<T, Isa::can_stream>{map}(read_codes, n, scale, to));    // the same by a map of 256 values
  Isa::Gemm4bitOps::permute(from, static_cast<float*>(nullptr));                          // kGroup elements by position()
};

// Rounded to nearest; min and max give b where an operand is NaN.
template <class Isa>
concept HasArithmetic = requires(typename Isa::F32 a, typename Isa::F32 b, typename Isa::Mask mask, const int32_t* integers) {
  a = Isa::zero(), a = Isa::set1(1.0f), a = Isa::load(integers);
  a = Isa::add(a, b), a = Isa::mul(a, b), a = Isa::div(a, b), a = Isa::min(a, b), a = Isa::max(a, b);
  a = Isa::fma(a, b, b);  // a * b + c, rounded once
  a = Isa::sqrt(b);
  a = Isa::sign(b);  // -1, 0 or 1; 0 of NaN
  mask = Isa::finite(b);
  mask = Isa::nonzero(mask, b);                 // and `mask`; a NaN is not zero
  a = Isa::select(mask, a, b);                  // a where the mask says yes
  a = Isa::max_magnitude(a, b);                 // max(a, |b|) of an a that is not below 0; a where b is NaN
  { Isa::greatest(a) } -> std::same_as<float>;  // lane, of numbers
};

// The 4-bit product in fp32 (gemm/gemm_4bit_dot.h).
template <class Ops, class F32, int lanes>
concept MultipliesGroups = requires(F32 x, F32 (&w)[kGroup / lanes], const float* map, const uint8_t* codes, float scale, float* to) {
  Ops::tile_rows;  // rows of activations in a tile of 4 columns that fits the registers
  Ops::template decode<float, false>(Ops::table(map), codes, scale, 0, w);        // kGroup weights value * absmax, rounded to T
  Ops::template decode<BFloat16, true>(Ops::table(map), codes, scale, scale, w);  // the second half of them has an absmax of its own
  x = Ops::mul_add(x, x, x);                                                      // a * b + c, with one rounding or two
  Ops::add_lanes(x, x, x, x, false, to);  // to[i] += the sum of the lanes of vector i; true: to[i] =
  x = Ops::nested(map, codes, scale, 0);  // code[codes[i]] * scale, rounded, + offset
};

// The int8 product: dot products along k of rows as they are stored (gemm/gemm_int8_dot.h). Rows of a are packed as Element, `step` of them
// fill a vector. Where a dot product multiplies unsigned by signed bytes (`shifted`), one side is taken as itself + 128: 128 times the sum
// of the other comes off.
template <class Ops>
concept MultipliesInt8 = requires(typename Ops::Vec v, const typename Ops::Element* a, const int8_t* b, int64_t n, int32_t* to) {
  Ops::tile_rows;  // rows of a in a tile of 4 rows of b that fits the registers
  Ops::step;
  Ops::shifted;
  v = Ops::zero();
  v = Ops::load_a(a);
  v = Ops::load_b(b);              // `step` elements of b, shifted
  v = Ops::load_b(b, n);           // the first n of them, whatever follows (a is zero there)
  v = Ops::dot(v, v, v);           // c + b . a by lanes
  Ops::add_lanes(v, v, v, v, to);  // to[i] = the sum of the lanes of vector i
};
// Of bf16 weights and activations in pairs, `lanes` of them in a vector and summed in F32.
template <class Ops>
concept MultipliesBf16 = requires(typename Ops::Vec (&w)[kGroup / Ops::lanes], typename Ops::Sum sum, const float* map,
                                  const uint8_t* codes, const BFloat16* x, typename Ops::Element* to) {
  Ops::template decode<true>(Ops::table(map), codes, 1.0f, 1.0f, w);
  Ops::permute(x, w);
  w[0] = Ops::load(to);
  Ops::store(to, w[0]);
  sum = Ops::mul_add(w[0], w[0], sum);
};

// A row of a in each lane (gemm/gemm_int8_lanes.h): that of vectors only.
template <class Ops>
concept MultipliesInt8ByLanes = requires(typename Ops::Vec v, const void* p, int32_t* to, int64_t stride) {
  Ops::tile_sums, Ops::tile_vectors;  // vectors of sums beside up to tile_vectors vectors of a fit the registers
  v = Ops::broadcast(p);              // 4 bytes to every lane
  Ops::store(to, v);
  Ops::keep(v);                           // holds a register until here
  Ops::put_rows(v, v, v, v, to, stride);  // to[i * stride + j] = lane i of vector j
};
template <class Ops>
concept ShiftsBytes = requires(typename Ops::Vec v, const void* line) {
  v = Ops::add_bytes(line, v);  // v + the 64 bytes, some to a lane
  v = Ops::add(v, v);
};

// The dynamic 8-bit maps (kernels/codebook8.h): encode(encoder, x, n, inverse of absmax, codes) of finite numbers in whole chunks.
template <class Isa>
concept EncodesDynamic = requires(const Encoder8& encoder, const float* x, uint8_t* codes) {
  (typename Isa::template EncodeDynamic<true, Keep::negative>{*encoder.dynamic}(encoder, x, kChunk, 1.0f, codes));
  (typename Isa::template EncodeDynamic<false, Keep::positive>{*encoder.dynamic}(encoder, x, kChunk, 1.0f, codes));
};

template <class Isa>
concept InstructionSet =
    std::derived_from<Isa, Capabilities> && std::convertible_to<decltype(Isa::name), std::string_view> &&
    // A power of two up to kSumColumns.
    (Isa::lanes == 1 || Isa::lanes == 2 || Isa::lanes == 4 || Isa::lanes == 8 || Isa::lanes == 16) &&  //
    HasArithmetic<Isa> && ConvertsElements<Isa, float> && ConvertsElements<Isa, Half> && ConvertsElements<Isa, BFloat16> &&
    (!Isa::has_dynamic8 || EncodesDynamic<Isa>) &&
    // Decodes 64 codes of an optimizer's state; true: of the dynamic signed map.
    requires { typename Isa::template DecodeState<true>; } && MultipliesGroups<typename Isa::Gemm4bitOps, typename Isa::F32, Isa::lanes> &&
    (!Isa::has_bf16_dot || MultipliesBf16<typename Isa::Bf16DotOps>) && MultipliesInt8<typename Isa::GemmInt8Ops> &&
    (Isa::lanes == 1 || MultipliesInt8ByLanes<typename Isa::GemmInt8Ops>) &&
    (!Isa::GemmInt8Ops::shifted || ShiftsBytes<typename Isa::GemmInt8Ops>);

}  // namespace
}  // namespace bnb::cpu
