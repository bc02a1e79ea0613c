// One step of an optimizer over blocks of 256 elements of one tensor, the rule from src/common/optim_rules.h.
//
// 32-bit state: reads and writes p and the states, reads g: 2 sizeof(P) + sizeof(G) + 8 states bytes an element, bound by memory.
// 8-bit state: codes to fp32, the rule, the new absmax, codes again, in one pass; 2 sizeof(P) + sizeof(G) + 2 states bytes, bound by
// arithmetic. A block is decoded and stepped while the one before it, whose absmax is known by then, is encoded.
#pragma once

#include "common/optim_rules.h"
#include "common/stochastic.h"
#include "cpu/isa/isa.h"
#include "cpu/kernels/dequantize.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/quantize.h"

namespace bnb::cpu {
namespace {

template <class Isa> struct Optimize {
  using M = Isa;
  using F32 = typename M::F32;
  static constexpr int kBlock = kOptimizerBlock, kPart = 64;

  static int64_t size_of_block(const OptimizerTensor& t, int64_t b) {
    const int64_t left = t.p.size - b * kBlock;
    return left < kBlock ? left : kBlock;
  }

  // p and g of one block as T: where they lie, or copied, widened if T is float. Behind n there are zeros.
  template <class T> class Elements {
   public:
    void open(const OptimizerTask& task, int64_t b) {
      const OptimizerTensor& t = *task.tensor;
      n_ = size_of_block(t, b), at_ = b * kBlock;
      p_ = as_it_lies(t.p) ? static_cast<T*>(t.p.data) + at_ : copied(t.p, p_copy_);
      g_ = as_it_lies(t.g) ? static_cast<const T*>(t.g.data) + at_ : copied(t.g, g_copy_);
    }
    void close(const OptimizerTask& task) const {
      if (p_ != p_copy_) return;
      const OptimizerTensor& t = *task.tensor;
      visit(t.p.dtype, [&]<class P>(P) {
        P* to = static_cast<P*>(t.p.data) + at_;
        if constexpr (std::is_same_v<P, T>) {
          __builtin_memcpy(to, p_, static_cast<size_t>(n_) * sizeof(T));
        } else if constexpr (std::is_same_v<T, float>) {
          if (task.seed) return round_stochastically(p_, to, n_, *task.seed, t.offset + at_, t.step);
          int i = 0;
          for (; i + Isa::lanes <= n_; i += Isa::lanes) Isa::store(to + i, Isa::load(p_ + i));
          for (; i < n_; ++i) write(to + i, rounded<P>(p_[i]));
        }
      });
    }
    T* p() const { return p_; }
    const T* g() const { return g_; }
    int size() const { return static_cast<int>(n_); }

   private:
    bool as_it_lies(const ConstView& x) const { return x.dtype == dtype_of<T> && n_ == kBlock; }
    template <class P> static void round_stochastically(const float* from, P* to, int64_t n, uint64_t seed, int64_t place, int64_t step) {
      Random4 random = {};
      for (int64_t i = 0; i < n; ++i, ++place) {
        if (i == 0 || place % 4 == 0) random = random_of(seed, place / 4, step);
        write(to + i, stochastically_rounded<P>(from[i], random.word[place % 4]));
      }
    }
    T* copied(const ConstView& from, T* to) const {
      visit(from.dtype, [&]<class X>(X) {
        const X* x = static_cast<const X*>(from.data) + at_;
        if constexpr (std::is_same_v<X, T>) {
          __builtin_memcpy(to, x, static_cast<size_t>(n_) * sizeof(T));
        } else if constexpr (std::is_same_v<T, float>) {
          int i = 0;
          for (; i + Isa::lanes <= n_; i += Isa::lanes) Isa::store(to + i, Isa::load(x + i));
          for (; i < n_; ++i) to[i] = read(x + i);
        }
      });
      __builtin_memset(to + n_, 0, static_cast<size_t>(kBlock - n_) * sizeof(T));
      return to;
    }
    alignas(64) T p_copy_[kBlock];
    alignas(64) T g_copy_[kBlock];
    int64_t n_ = 0, at_ = 0;
    T* p_ = nullptr;
    const T* g_ = nullptr;
  };
  // f(type of Elements): that of p and g, if kernels read it as it is; else float.
  template <class F> static void with_elements(const OptimizerTask& task, F&& f) {
    const OptimizerTensor& t = *task.tensor;
    if (t.p.dtype == DType::bf16 && t.g.dtype == DType::bf16 && !task.seed) return f(BFloat16{});
    f(float{});
  }

  // Arithmetic where nothing leaves the range of fp32.
  struct Unlimited : M {
    BNB_INLINE static F32 min(F32 a, F32) { return a; }
    BNB_INLINE static F32 max(F32 a, F32) { return a; }
  };
  // The rule on elements [i, i + lanes): moves the states at s[k] + i, gives u, and which elements take part. `quick` is for blocks that
  // are as most are: all do, nothing leaves the range of fp32, and g is the gradient as it is.
  template <class Rule, bool quick> struct Moved {
    using Math = std::conditional_t<quick, Unlimited, M>;
    F32 p, u, s[Rule::states];
    typename M::Mask takes_part;
    template <class T> BNB_INLINE Moved(const T* p_at, const T* g_at, float* const* s_at, int i, const Hyper& h) : p(M::load(p_at + i)) {
      F32 g = M::load(g_at + i), before[Rule::states];
      for (int k = 0; k < Rule::states; ++k) before[k] = s[k] = M::load(s_at[k] + i);
      if constexpr (!quick) {
        const F32 raw = M::mul(g, M::set1(h.gnorm_scale));
        g = M::fma(p, M::set1(h.coupled), raw);
        takes_part = M::finite(Rule::squares ? M::mul(g, g) : g);
        if (h.skip_zeros) takes_part = M::nonzero(takes_part, raw);
      }
      u = Rule::template direction<Math>(g, s, h);
      if constexpr (!quick)
        for (int k = 0; k < Rule::states; ++k) s[k] = M::select(takes_part, s[k], before[k]);
    }
    // rate: -lr * trust
    BNB_INLINE F32 stepped(const Hyper& h, float rate) const {
      const F32 to = M::fma(u, M::set1(rate), M::mul(p, M::set1(h.keep)));
      if constexpr (quick) return to;
      return M::select(takes_part, to, p);
    }
  };
  // Whether `quick` serves a block. Adagrad's sums know no limit.
  template <class T> static bool is_quick(const OptimizerTask& task, const Elements<T>& e) {
    const Hyper& h = task.hyper;
    if (h.skip_zeros || h.coupled != 0 || h.gnorm_scale != 1 || task.rule == Optimizer::adagrad) return false;
    return !M::any_large(e.g(), kBlock);
  }

  // One block's states in fp32 where they lie; of a last, shorter one copies with zeros behind them.
  template <class Rule> class States32 {
   public:
    void open(const OptimizerTensor& t, int64_t b, int n) {
      for (int k = 0; k < Rule::states; ++k) {
        own_[k] = (k == Rule::second_moment ? t.state2.data() : t.state1.data() + k * t.p.size) + b * kBlock;
        at[k] = own_[k];
        if (n == kBlock) continue;
        at[k] = copy_[k];
        __builtin_memset(copy_[k], 0, sizeof copy_[k]);
        __builtin_memcpy(copy_[k], own_[k], static_cast<size_t>(n) * sizeof(float));
      }
    }
    void close(int n) const {
      for (int k = 0; k < Rule::states; ++k)
        if (at[k] != own_[k]) __builtin_memcpy(own_[k], at[k], static_cast<size_t>(n) * sizeof(float));
    }
    float* at[Rule::states];

   private:
    float* own_[Rule::states];
    alignas(64) float copy_[Rule::states][kBlock];
  };

  template <class Rule, class T> static void step32(const OptimizerTask& task, Range blocks) {
    const Hyper h = task.hyper;
    const float rate = task.rate;
    Elements<T> e;
    States32<Rule> s;
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      e.open(task, b);
      s.open(*task.tensor, b, e.size());
      T* p = e.p();
      const T* g = e.g();
      float* at[Rule::states];
      for (int k = 0; k < Rule::states; ++k) at[k] = s.at[k];
      for (int i = 0; i < kBlock; i += Isa::lanes) {
        const Moved<Rule, false> x(p, g, at, i, h);
        Isa::store(p + i, x.stepped(h, rate));
        for (int k = 0; k < Rule::states; ++k) Isa::store(at[k] + i, x.s[k]);
      }
      e.close(task);
      s.close(e.size());
    }
  }

  // One state in codes. Encode: EncodeDynamic or EncodeTable of quantize.h.
  template <class Encode, Keep keep> struct Coder {
    typename Isa::template DecodeState<Encode::of_signed_map> decode;
    Encode encode;
    const float* value;
    Coder(const Encoder8& encoder, const float* code) : decode{code}, encode{encoder}, value(code) {}
    BNB_INLINE void operator()(const float* x, float inv, uint8_t* codes) const {
      encode.finite(x, kPart, inv, codes);
      if constexpr (Encode::keeps != keep)
        for (int i = 0; i < kPart; ++i) codes[i] = kept<keep>(value, x[i], codes[i]);
    }
  };

  // One block of states in fp32, made from codes and made codes again. The block may be a copy, as in States32.
  template <class Rule> struct States8 {
    alignas(64) float value[Rule::states][kBlock];
    uint8_t* codes[Rule::states];
    float* absmax[Rule::states];
    float inv[Rule::states];
    alignas(64) uint8_t copy[Rule::states][kBlock];

    void open(const OptimizerTensor& t, int64_t b, int n) {
      const int64_t all = blocks_of(t.p.size, kBlock);
      for (int k = 0; k < Rule::states; ++k) {
        const bool second = k == Rule::second_moment;
        codes[k] = (second ? t.codes2.data() : t.codes1.data() + k * t.p.size) + b * kBlock;
        absmax[k] = (second ? t.absmax2.data() : t.absmax1.data() + k * all) + b;
        if (n == kBlock) continue;
        __builtin_memset(copy[k], 0, kBlock);
        __builtin_memcpy(copy[k], codes[k], static_cast<size_t>(n));
      }
    }
    BNB_INLINE uint8_t* at(int k, int n) { return n == kBlock ? codes[k] : copy[k]; }
    void close(int n) const {
      if (n == kBlock) return;
      for (int k = 0; k < Rule::states; ++k) __builtin_memcpy(codes[k], copy[k], static_cast<size_t>(n));
    }
  };

  // A second moment above 0 stays so, or the step would be that of m over eps; a first moment below 0 keeps its sign.
  template <class Rule> static constexpr Keep keep_of(int k) { return k == Rule::root ? Keep::positive : Keep::negative; }

  template <class Rule, class First, class Second, class T> static void step8(const OptimizerTask& task, Range blocks) {
    const Coder<First, keep_of<Rule>(0)> first(*task.encoder1, task.code1);
    const Coder<Second, Keep::positive> second(*task.encoder2, task.code2);
    const Hyper h = task.hyper;
    const float rate = task.rate;
    Elements<T> elements[2];
    States8<Rule> states[2];
    for (int64_t b = blocks.begin; b <= blocks.end; ++b) {
      const bool steps = b < blocks.end;
      const bool encodes = b > blocks.begin;
      auto &now = elements[b & 1], &last = elements[~b & 1];
      auto &s = states[b & 1], &done = states[~b & 1];
      F32 most[Rule::states];
      float* at[Rule::states];
      for (int k = 0; k < Rule::states; ++k) most[k] = M::zero(), at[k] = s.value[k];
      bool quick = false;
      if (steps) now.open(task, b), s.open(*task.tensor, b, now.size()), quick = is_quick(task, now);
      for (int i = 0; i < kBlock; i += kPart) {
        if (steps) {
#pragma GCC unroll 3
          for (int k = 0; k < Rule::states; ++k) {
            const uint8_t* codes = s.at(k, now.size()) + i;
            Isa::prefetch(codes);
            k == Rule::second_moment ? second.decode(codes, kPart, *s.absmax[k], at[k] + i)
                                     : first.decode(codes, kPart, *s.absmax[k], at[k] + i);
          }
          quick ? advance<Rule, true>(now, at, i, h, rate, most) : advance<Rule, false>(now, at, i, h, rate, most);
        }
        if (encodes)
#pragma GCC unroll 3
          for (int k = 0; k < Rule::states; ++k) {
            uint8_t* codes = done.at(k, last.size()) + i;
            k == Rule::second_moment ? second(done.value[k] + i, done.inv[k], codes) : first(done.value[k] + i, done.inv[k], codes);
          }
      }
      if (encodes) done.close(last.size());
      if (!steps) break;
      now.close(task);
      for (int k = 0; k < Rule::states; ++k) {
        if (now.size() < kBlock) {  // what was decoded behind the last element does not count
          for (int i = now.size(); i < kBlock; ++i) at[k][i] = 0;
          most[k] = M::zero();
          for (int i = 0; i < kBlock; i += Isa::lanes) most[k] = M::max_magnitude(most[k], M::load(at[k] + i));
        }
        *s.absmax[k] = M::greatest(most[k]);
        s.inv[k] = inverse(*s.absmax[k]);
      }
    }
  }

  template <class Rule, bool quick, class T>
  BNB_INLINE static void advance(const Elements<T>& e, float* const (&at)[Rule::states], int i, const Hyper& h, float rate,
                                 F32 (&most)[Rule::states]) {
    T* p = e.p();
    for (int j = 0; j < kPart; j += 64 / static_cast<int>(sizeof(T))) Isa::prefetch(p + i + j);
    for (const int end = i + kPart; i < end; i += 2 * Isa::lanes) {
      F32 to[2];
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        const int from = i + j * Isa::lanes;
        const Moved<Rule, quick> x(p, e.g(), at, from, h);
        to[j] = x.stepped(h, rate);
        for (int k = 0; k < Rule::states; ++k) {
          most[k] = M::max_magnitude(most[k], x.s[k]);
          Isa::store(at[k] + from, x.s[k]);
        }
      }
      M::store_pair(p + i, to[0], to[1]);
    }
  }

  static void step(const OptimizerTask& task, Range blocks) {
    visit(task.rule, [&]<class Rule>(Rule) {
      with_elements(task, [&]<class T>(T) {
        if (!task.encoder1) return step32<Rule, T>(task, blocks);
        if constexpr (Isa::has_dynamic8) {
          const auto dynamic = [](const Encoder8& e, bool is_signed) { return e.dynamic && e.dynamic->is_signed == is_signed; };
          if (dynamic(*task.encoder1, true) && (Rule::second_moment < 0 || dynamic(*task.encoder2, false)))
            return step8<Rule, EncodeDynamic<Isa, true, keep_of<Rule>(0)>, EncodeDynamic<Isa, false, Keep::positive>, T>(task, blocks);
        }
        step8<Rule, EncodeTable<Isa>, EncodeTable<Isa>, T>(task, blocks);
      });
    });
  }

  // sums += {|p|^2, |u|^2} over the blocks, in an order that is the same for every instruction set: eight sums over the elements of a
  // block, added in pairs, then the blocks in order.
  // load(b, n, at): lets at[k] be state k of block b, which has n elements.
  template <class Rule, class Load> static void norms_of(const OptimizerTask& task, Range blocks, double (&sums)[2], Load&& load) {
    const Hyper h = task.hyper;
    Elements<float> e;
    float* at[Rule::states];
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      alignas(64) float u[kBlock];
      e.open(task, b);
      load(b, e.size(), at);
      for (int i = 0; i < kBlock; i += Isa::lanes) {
        const Moved<Rule, false> x(e.p(), e.g(), at, i, h);
        Isa::store(u + i, M::select(x.takes_part, x.u, M::zero()));
      }
      for (int i = e.size(); i < kBlock; ++i) u[i] = 0;
      sums[0] += squares(e.p());
      sums[1] += squares(u);
    }
  }
  static double squares(const float* x) {
    double sum[8] = {};
    for (int i = 0; i < kBlock; i += 8)
      for (int j = 0; j < 8; ++j) sum[j] += static_cast<double>(x[i + j]) * static_cast<double>(x[i + j]);
    return ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
  }
  static void norms(const OptimizerTask& task, Range blocks, double (&sums)[2]) {
    visit(task.rule, [&]<class Rule>(Rule) {
      if (!task.encoder1) {
        States32<Rule> s;
        return norms_of<Rule>(task, blocks, sums, [&](int64_t b, int n, float** at) {
          s.open(*task.tensor, b, n);
          for (int k = 0; k < Rule::states; ++k) at[k] = s.at[k];
        });
      }
      using Decode = typename Isa::template Decode8<float, false>;
      const Decode first{task.code1}, second{task.code2};
      States8<Rule> s;
      norms_of<Rule>(task, blocks, sums, [&](int64_t b, int n, float** at) {
        s.open(*task.tensor, b, n);
        for (int k = 0; k < Rule::states; ++k)
          (k == Rule::second_moment ? second : first)(s.at(k, n), kBlock, *s.absmax[k], at[k] = s.value[k]);
      });
    });
  }
};

}  // namespace
}  // namespace bnb::cpu
