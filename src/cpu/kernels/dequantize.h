// y[i] = value[code[i]] * absmax[i / blocksize] in fp32, rounded once to T. A NaN in absmax is the result, whatever the value: which of two
// NaN a multiplication passes on, and what becomes of one that is multiplied by a constant, differs between instruction sets.
#pragma once

#include "common/formats.h"
#include "cpu/kernels/kernels.h"
#include "cpu/kernels/quantize.h"

namespace bnb::cpu {
namespace {

template <class Isa> struct Dequantize {
  // Reads 1 / per_byte, writes sizeof(T) per element. decode(codes, n, absmax, out) takes whole chunks.
  template <int per_byte, class Decode, class T>
  static void run(const Decode& decode, const uint8_t* codes, const float* absmax, T* out, int64_t size, int64_t blocksize, Range blocks) {
    for (int64_t b = blocks.begin; b < blocks.end; ++b) {
      const int64_t begin = b * blocksize, left = size - begin, count = left < blocksize ? left : blocksize,
                    whole = count / kChunk * kChunk;
      const uint8_t* from = codes + begin / per_byte;
      if (absmax[b] != absmax[b]) [[unlikely]] {
        const T nan = rounded<T>(float_of(bits_of(absmax[b]) | kQuiet));
        for (int64_t i = begin; i < begin + count; ++i) write(out + i, nan);
        continue;
      }
      decode(from, whole, absmax[b], out + begin);
      if (whole == count) [[likely]]
        continue;
      uint8_t end[kChunk] = {};
      alignas(64) T last[kChunk];
      __builtin_memcpy(end, from + whole / per_byte, static_cast<size_t>((count - whole + per_byte - 1) / per_byte));
      decode(end, kChunk, absmax[b], last);
      __builtin_memcpy(out + begin + whole, last, static_cast<size_t>(count - whole) * sizeof(T));
    }
  }
  static constexpr uint32_t kQuiet = 0x400000;  // the bit that makes a NaN a quiet one

  template <bool stream> static void blocks_4bit(const Dequantize4bit& d, Range blocks) {
    visit(d.type, [&](auto format) {
      visit(d.out.dtype, [&](auto t) {
        using T = decltype(t);
        run<2>(typename Isa::template Decode4<decltype(format), T, stream>{}, d.codes.data(), d.absmax.data(), static_cast<T*>(d.out.data),
               d.out.size, d.blocksize, blocks);
      });
    });
  }
  static void run_4bit(const Dequantize4bit& d, Stores stores, Range blocks) {
    if (!streams(d.out, stores)) return blocks_4bit<false>(d, blocks);
    blocks_4bit<true>(d, blocks);
    Isa::fence();
  }

  template <bool stream> static void blocks_blockwise(const DequantizeBlockwise& d, Range blocks) {
    visit(d.out.dtype, [&](auto t) {
      using T = decltype(t);
      run<1>(typename Isa::template Decode8<T, stream>{d.code.data()}, d.codes.data(), d.absmax.data(), static_cast<T*>(d.out.data),
             d.out.size, d.blocksize, blocks);
    });
  }
  static void run_blockwise(const DequantizeBlockwise& d, Stores stores, Range blocks) {
    if (d.blocksize % kChunk || !streams(d.out, stores)) return blocks_blockwise<false>(d, blocks);
    blocks_blockwise<true>(d, blocks);
    Isa::fence();
  }

  static bool streams(const View& out, Stores stores) {
    return Isa::can_stream && stores == Stores::streaming && reinterpret_cast<uintptr_t>(out.data) % 64 == 0;
  }
};

}  // namespace
}  // namespace bnb::cpu
