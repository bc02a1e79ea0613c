// 4-bit weights on AMX tiles in bf16 (gemm_amx.h). tdpbf16ps takes subnormals for zero, in its operands and its sums.
#pragma once

#include "cpu/gemm/gemm_4bit_dot.h"
#include "cpu/gemm/gemm_amx.h"

namespace bnb::cpu {
namespace {

template <class Isa> class Bf16Tiles4 {
  using Math = Bf16Math<Isa>;

 public:
  using D = Gemm4bit;
  using Row = cpu::Row;
  static constexpr int64_t group = kGroup, bytes = kGroup / 2;

  static int64_t pack_bytes(const D&) { return 0; }
  static void pack(const D&, void*, Range) {}
  BNB_INLINE static void load(const D& d, int64_t m, int64_t k, __m512i (&v)[2]) {
    const auto* from = static_cast<const BFloat16*>(d.a.data) + m * d.k + k;
    if (k + kGroup <= d.k) return Math::Ops::permute(from, v);
    BFloat16 end[kGroup] = {};
    std::memcpy(end, from, static_cast<size_t>(d.k - k) * sizeof(BFloat16));
    Math::Ops::permute(end, v);
  }

  Bf16Tiles4(const D& d, const void*) : d_(d), decoder_(d), layout_(layout_of(d)) {}

  static int64_t scratch_bytes(const D& d, int64_t rows) { return Decoder<Isa, Math>::scratch_floats(d, rows) * 4; }
  template <class F> void with_layout(F&& f) const { with(layout_, f); }
  template <Layout layout> void rows(int64_t n, int64_t count, void* scratch, Row* to) const {
    decoder_.template rows<layout>(n, count, static_cast<float*>(scratch), to);
  }
  const void* row(int64_t n) const { return d_.codes.data() + n * d_.k / 2; }
  BNB_INLINE static void prefetch(const Row& row, int64_t g) { __builtin_prefetch(row.codes + g * (kGroup / 2), 0, 2); }
  BNB_INLINE __m512 table() const { return decoder_.table(); }
  template <Layout layout, int count> BNB_INLINE void decode(__m512 table, const Row* rows, int64_t n, int64_t g, void* to) const {
    decoder_.template group_of_rows<layout, count>(table, rows, n, g, static_cast<uint16_t*>(to), kGroup, kGroup / 2);
  }
  template <int c, int a, int b> BNB_INLINE static void dot() { tile_dot_bf16<c, a, b>(); }

  BNB_INLINE static __m512i add(__m512i a, __m512i b) {
    return _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)));
  }

  void columns(int p, int64_t n) {
    n_[p] = n;
    load_bias(d_.bias, n, bias_[p]);
  }
  void write(int p, const __m512i (&sums)[16], int64_t m, int64_t count) const {
    const auto mask = static_cast<__mmask16>((1u << smaller(16, d_.n - n_[p])) - 1);
    auto* out = static_cast<BFloat16*>(d_.out.data) + m * d_.n + n_[p];
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) {
      if (i >= count) break;
      const __m512 y = _mm512_add_ps(_mm512_castsi512_ps(sums[i]), _mm512_load_ps(bias_[p]));
      _mm256_mask_storeu_epi16(out + i * d_.n, mask, Isa::template round16<BFloat16>(y));
    }
  }

 private:
  const D& d_;
  Decoder<Isa, Math> decoder_;
  Layout layout_;
  int64_t n_[2] = {};
  alignas(64) float bias_[2][16] = {};
};

}  // namespace
}  // namespace bnb::cpu
