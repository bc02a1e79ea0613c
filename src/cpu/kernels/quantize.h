// Quantization of blocks: absmax = max |x|, t = x / absmax, the nearest code of t. docs/NUMERICS.md has the rules.
#pragma once

#include "cpu/kernels/codebook8.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/plain.h"

namespace bnb::cpu {
namespace {

// How one block is encoded, with the vectors of Isa where it has them.
template <class Isa, class Format> struct Encode4 {
  static constexpr int per_byte = 2;
  typename Isa::template Encode4<Format> fast;
  template <class T> BNB_INLINE void finite(const T* x, int64_t n, float inv, uint8_t* codes) const { fast(x, n, inv, codes); }
  template <class T> void any(const T* x, int64_t n, float inv, uint8_t* codes) const { encode4<Format>(x, n, inv, codes); }
};

// By the table of the map: t in vectors, the table one element at a time (a gather is no faster).
template <class Isa> struct EncodeTable {
  static constexpr int per_byte = 1;
  static constexpr Keep keeps = Keep::none;
  static constexpr bool of_signed_map = false;
  const Encoder8& encoder;
  template <class T> BNB_INLINE void finite(const T* x, int64_t n, float inv, uint8_t* codes) const {
    alignas(64) float t[kChunk];
    const uint8_t* first = encoder.first.get();  // in registers: for all the compiler knows, codes[i] may change the encoder
    const float* threshold = encoder.threshold;
    const bool direct = first && !encoder.many;
    for (; n > 0; n -= kChunk, x += kChunk, codes += kChunk) {
      for (int i = 0; i < kChunk; i += Isa::lanes) Isa::store(t + i, Isa::mul(Isa::load(x + i), Isa::set1(inv)));
      for (int i = 0; i < kChunk; ++i) {
        if (!direct) {
          codes[i] = encoder(t[i]);
          continue;
        }
        const uint32_t c = first[bits_of(t[i]) >> 16];
        codes[i] = static_cast<uint8_t>(c + (t[i] > threshold[c]));
      }
    }
  }
  template <class T> BNB_INLINE void any(const T* x, int64_t n, float inv, uint8_t* codes) const { finite(x, n, inv, codes); }
};

template <class Isa, bool is_signed, Keep keep = Keep::none> struct EncodeDynamic {
  static constexpr int per_byte = 1;
  static constexpr Keep keeps = keep;
  static constexpr bool of_signed_map = is_signed;
  const Encoder8& encoder;
  typename Isa::template EncodeDynamic<is_signed, keep> fast;
  explicit EncodeDynamic(const Encoder8& e) : encoder(e), fast(*e.dynamic) {}
  template <class T> BNB_INLINE void finite(const T* x, int64_t n, float inv, uint8_t* codes) const { fast(encoder, x, n, inv, codes); }
  template <class T> void any(const T* x, int64_t n, float inv, uint8_t* codes) const {
    for (int64_t i = 0; i < n; ++i) codes[i] = encoder(read(x + i) * inv);
  }
};

template <class Isa> struct Quantize {
  // Reads sizeof(T) (from memory once, from the first-level cache twice), writes 1 / per_byte bytes per element.
  template <class Encode, class T>
  static void run(const Encode& encode, const T* x, int64_t size, int64_t blocksize, uint8_t* codes, float* absmax, Range blocks) {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int64_t begin = b * blocksize, left = size - begin, count = left < blocksize ? left : blocksize,
                    whole = count / kChunk * kChunk;
      T end[kChunk];
      if (whole < count) {
        __builtin_memset(end, 0, sizeof end);
        __builtin_memcpy(end, x + begin + whole, static_cast<size_t>(count - whole) * sizeof(T));
      }
      block(encode, x + begin, whole, count - whole, end, codes + begin / Encode::per_byte, absmax + b);
    }
  }

  // `whole` elements at x, then `rest` at `end`, padded to a chunk.
  template <class Encode, class T>
  BNB_INLINE static void block(const Encode& encode, const T* x, int64_t whole, int64_t rest, const T* end, uint8_t* codes, float* absmax) {
    uint32_t bits = Isa::max_bits(x, whole);
    if (rest) [[unlikely]] {
      const uint32_t more = Isa::max_bits(end, kChunk);
      bits = more > bits ? more : bits;
    }
    constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;
    const float largest = float_of(bits > kInfinity ? kNaN : bits), inv = inverse(largest);
    *absmax = largest;
    const auto write = [&](const T* from, int64_t n, int64_t padded, uint8_t* to) {
      if (bits < kInfinity) [[likely]]
        encode.finite(from, padded, inv, to);
      else
        encode.any(from, n, inv, to);
    };
    write(x, whole, whole, codes);
    if (rest == 0) [[likely]]
      return;
    uint8_t last[kChunk];
    write(end, rest, kChunk, last);
    __builtin_memcpy(codes + whole / Encode::per_byte, last, static_cast<size_t>((rest + Encode::per_byte - 1) / Encode::per_byte));
  }

  static void run_4bit(const Quantize4bit& d, Range blocks) {
    visit(d.type, [&](auto format) {
      visit(d.x.dtype, [&](auto t) {
        run(Encode4<Isa, decltype(format)>{}, static_cast<const decltype(t)*>(d.x.data), d.x.size, d.blocksize, d.codes.data(),
            d.absmax.data(), blocks);
      });
    });
  }

  static void run_blockwise(const QuantizeBlockwise& d, const Encoder8& encoder, Range blocks) {
    visit(d.x.dtype, [&](auto t) {
      const auto with = [&](const auto& encode) {
        run(encode, static_cast<const decltype(t)*>(d.x.data), d.x.size, d.blocksize, d.codes.data(), d.absmax.data(), blocks);
      };
      if constexpr (Isa::has_dynamic8)
        if (encoder.dynamic)
          return encoder.dynamic->is_signed ? with(EncodeDynamic<Isa, true>(encoder)) : with(EncodeDynamic<Isa, false>(encoder));
      with(EncodeTable<Isa>{encoder});
    });
  }
};

}  // namespace
}  // namespace bnb::cpu
