// Compiled once for each instruction set, with its flags: BNB_ISA_HEADER and BNB_ISA name it.
#include BNB_ISA_HEADER

#include "cpu/isa/ops.h"

#include "cpu/kernels/codebook8.h"

namespace bnb::test {
namespace {  // internal linkage: nothing compiled for one instruction set is visible to another

using cpu::kGroup;

template <class Isa, auto op> void unary(const float* a, float* to) { Isa::store(to, op(Isa::load(a))); }
template <class Isa, auto op> void binary(const float* a, const float* b, float* to) { Isa::store(to, op(Isa::load(a), Isa::load(b))); }
template <class Isa, auto op> void ternary(const float* a, const float* b, const float* c, float* to) {
  Isa::store(to, op(Isa::load(a), Isa::load(b), Isa::load(c)));
}

template <class Isa, class T> struct Elements {
  static constexpr int lanes = Isa::lanes;
  static void load(const T* p, float* to) { Isa::store(to, Isa::load(p)); }
  static void store(T* p, const float* x) { Isa::store(p, Isa::load(x)); }
  static void store_pair(T* p, const float* x) { Isa::store_pair(p, Isa::load(x), Isa::load(x + lanes)); }
  static uint32_t max_bits(const T* p, int64_t n) { return Isa::max_bits(p, n); }
  static bool any_large(const T* p, int n) { return Isa::any_large(p, n); }
  template <class Format> static void encode_4bit(const T* x, int64_t n, float inv, uint8_t* codes) {
    typename Isa::template Encode4<Format>{}(x, n, inv, codes);
  }
  template <class Format, bool stream> static void decode_4bit(const uint8_t* codes, int64_t n, float absmax, T* to) {
    typename Isa::template Decode4<Format, T, stream>{}(codes, n, absmax, to);
    if (stream) Isa::fence();
  }
  template <bool stream> static void decode_8bit(const float* map, const uint8_t* codes, int64_t n, float absmax, T* to) {
    typename Isa::template Decode8<T, stream>{map}(codes, n, absmax, to);
    if (stream) Isa::fence();
  }
  template <bool is_signed, cpu::Keep keep>
  static void encode_dynamic(const cpu::Encoder8& encoder, const T* x, int64_t n, float inv, uint8_t* codes) {
    typename Isa::template EncodeDynamic<is_signed, keep>{*encoder.dynamic}(encoder, x, n, inv, codes);
  }
  static void permute(const T* x, float* to) { Isa::Gemm4bitOps::permute(x, to); }
  template <bool split> static void decode_group(const float* values, const uint8_t* codes, float first, float second, float* to) {
    typename Isa::F32 w[kGroup / lanes];
    Isa::Gemm4bitOps::template decode<T, split>(Isa::Gemm4bitOps::table(values), codes, first, second, w);
    for (int i = 0; i < kGroup / lanes; ++i) Isa::store(to + i * lanes, w[i]);
  }

  static consteval ElementOps<T> all() {
    ElementOps<T> ops = {
        .load = load,
        .store = store,
        .store_pair = store_pair,
        .max_bits = max_bits,
        .any_large = any_large,
        .encode_4bit = {encode_4bit<Nf4>, encode_4bit<Fp4>},
        .decode_4bit = {{decode_4bit<Nf4, false>, decode_4bit<Nf4, Isa::can_stream>},
                        {decode_4bit<Fp4, false>, decode_4bit<Fp4, Isa::can_stream>}},
        .decode_8bit = {decode_8bit<false>, decode_8bit<Isa::can_stream>},
        .encode_unsigned = {},
        .encode_signed = {},
        .permute = permute,
        .decode_group = {decode_group<false>, decode_group<true>},
    };
    if constexpr (Isa::has_dynamic8) {
      using enum cpu::Keep;
      ops.encode_unsigned[0] = encode_dynamic<false, none>, ops.encode_unsigned[2] = encode_dynamic<false, positive>;
      ops.encode_signed[0] = encode_dynamic<true, none>, ops.encode_signed[1] = encode_dynamic<true, negative>;
      ops.encode_signed[2] = encode_dynamic<true, positive>;
    }
    return ops;
  }
};

template <class Isa, bool is_dynamic> void decode_state(const float* map, const uint8_t* codes, float absmax, float* to) {
  typename Isa::template DecodeState<is_dynamic>{map}(codes, 64, absmax, to);
}

template <class Isa> struct Bf16 {
  using Dot = typename Isa::Bf16DotOps;
  using Vec = typename Dot::Vec;
  static constexpr int vectors = kGroup / Dot::lanes;
  template <bool split> static float dot(const float* values, const uint8_t* codes, float first, float second, const BFloat16* x) {
    Vec w[vectors], v[vectors];
    Dot::template decode<split>(Dot::table(values), codes, first, second, w);
    Dot::permute(x, v);
    auto sum = Isa::zero();
    for (int i = 0; i < vectors; ++i) sum = Dot::mul_add(w[i], v[i], sum);
    float total[4];
    Isa::Gemm4bitOps::add_lanes(sum, Isa::zero(), Isa::zero(), Isa::zero(), true, total);
    return total[0];
  }
  static void weights(const float* values, const uint8_t* codes, float first, float second, uint16_t* to) {
    Vec w[vectors];
    Dot::template decode<true>(Dot::table(values), codes, first, second, w);
    for (int i = 0; i < vectors; ++i) Dot::store(to + i * Dot::lanes, w[i]);
  }
  static void permute(const BFloat16* x, uint16_t* to) {
    Vec v[vectors];
    Dot::permute(x, v);
    for (int i = 0; i < vectors; ++i) Dot::store(to + i * Dot::lanes, v[i]);
  }
};

template <class I> void dot(const int8_t* a, const int8_t* b, int64_t stride, int64_t n, int32_t* to) {
  typename I::Element x[I::step];
  for (int i = 0; i < I::step; ++i) x[i] = a[i];
  typename I::Vec sums[4];
  for (int i = 0; i < 4; ++i)
    sums[i] = I::dot(n == I::step ? I::load_b(b + i * stride) : I::load_b(b + i * stride, n), I::load_a(x), I::zero());
  I::add_lanes(sums[0], sums[1], sums[2], sums[3], to);
}
template <class I> int32_t add_bytes(const int8_t* line) {
  int32_t sums[4];
  I::add_lanes(I::add(I::add_bytes(line, I::zero()), I::zero()), I::zero(), I::zero(), I::zero(), sums);
  return sums[0];
}
template <class I> void broadcast(const void* word, int32_t* to) { I::store(to, I::broadcast(word)); }
template <class I, int lanes> void put_rows(const int32_t* v, int32_t* to, int64_t stride) {
  I::put_rows(I::load_a(v), I::load_a(v + lanes), I::load_a(v + 2 * lanes), I::load_a(v + 3 * lanes), to, stride);
}

template <class Isa> consteval Ops make_ops() {
  using F32 = typename Isa::F32;
  using Int8 = typename Isa::GemmInt8Ops;
  constexpr int lanes = Isa::lanes;
  Ops ops = {
      .isa = Isa::name,
      .lanes = lanes,
      .f32 = Elements<Isa, float>::all(),
      .f16 = Elements<Isa, Half>::all(),
      .bf16 = Elements<Isa, BFloat16>::all(),
      .load_integers = [](const int32_t* p, float* to) { Isa::store(to, Isa::load(p)); },
      .constants = [](float x, float* zero, float* all_x) { Isa::store(zero, Isa::zero()), Isa::store(all_x, Isa::set1(x)); },
      .sqrt = unary<Isa, [](F32 a) { return Isa::sqrt(a); }>,
      .sign = unary<Isa, [](F32 a) { return Isa::sign(a); }>,
      .add = binary<Isa, [](F32 a, F32 b) { return Isa::add(a, b); }>,
      .mul = binary<Isa, [](F32 a, F32 b) { return Isa::mul(a, b); }>,
      .div = binary<Isa, [](F32 a, F32 b) { return Isa::div(a, b); }>,
      .min = binary<Isa, [](F32 a, F32 b) { return Isa::min(a, b); }>,
      .max = binary<Isa, [](F32 a, F32 b) { return Isa::max(a, b); }>,
      .max_magnitude = binary<Isa, [](F32 a, F32 b) { return Isa::max_magnitude(a, b); }>,
      .fma = ternary<Isa, [](F32 a, F32 b, F32 c) { return Isa::fma(a, b, c); }>,
      .mul_add = ternary<Isa, [](F32 a, F32 b, F32 c) { return Isa::Gemm4bitOps::mul_add(a, b, c); }>,
      .finite = ternary<Isa, [](F32 x, F32 a, F32 b) { return Isa::select(Isa::finite(x), a, b); }>,
      .finite_and_nonzero =
          [](const float* m, const float* x, const float* a, const float* b, float* to) {
            const auto mask = Isa::nonzero(Isa::finite(Isa::load(m)), Isa::load(x));
            Isa::store(to, Isa::select(mask, Isa::load(a), Isa::load(b)));
          },
      .greatest = [](const float* p) { return Isa::greatest(Isa::load(p)); },
      .decode_state = {decode_state<Isa, false>, decode_state<Isa, true>},
      .add_lanes =
          [](const float* v, bool first, float* to) {
            Isa::Gemm4bitOps::add_lanes(Isa::load(v), Isa::load(v + lanes), Isa::load(v + 2 * lanes), Isa::load(v + 3 * lanes), first, to);
          },
      .nested = [](const float* map, const uint8_t* codes, float scale, float offset,
                   float* to) { Isa::store(to, Isa::Gemm4bitOps::nested(map, codes, scale, offset)); },
      .bf16_dot = {},
      .bf16_weights = nullptr,
      .bf16_permute = nullptr,
      .step = Int8::step,
      .shifted = Int8::shifted,
      .dot = dot<Int8>,
      .add_bytes = nullptr,
      .broadcast = nullptr,
      .put_rows = nullptr,
      .next = nullptr,
  };
  if constexpr (Isa::has_bf16_dot) {
    ops.bf16_dot[0] = Bf16<Isa>::template dot<false>, ops.bf16_dot[1] = Bf16<Isa>::template dot<true>;
    ops.bf16_weights = Bf16<Isa>::weights, ops.bf16_permute = Bf16<Isa>::permute;
  }
  if constexpr (Int8::shifted) ops.add_bytes = add_bytes<Int8>;
  if constexpr (lanes > 1) ops.broadcast = broadcast<Int8>, ops.put_rows = put_rows<Int8, lanes>;
  return ops;
}

constinit Ops g_ops = make_ops<cpu::BNB_ISA>();
[[maybe_unused]] const bool entered = (enter(g_ops), true);

}  // namespace
}  // namespace bnb::test
