// y = value[code] * absmax of the block in fp32, rounded once to T; docs/NUMERICS.md has the rules.
//
// Reads 1/2 (4 bits) or 1 byte per element and 4 bytes per block, writes sizeof(T) bytes per element, each once. Lower bound: those bytes
// at copy bandwidth; nf4 in blocks of 64 to bf16 moves 2.5625 bytes per element. Stores are whole rows of 512 bytes per warp.
#include <array>
#include <bit>

#include "common/arguments.h"
#include "common/convert.h"
#include "common/formats.h"
#include "cuda/device/span.cuh"

namespace bnb::cuda {
namespace {

using dev::Bits;

// Lane i keeps value i % 16, and a shuffle is the lookup; only the low 4 bits of its index count.
template <class Format> BNB_TABLE std::array<float, 16> kValues = Format::values;

template <class Format> struct Decode4 {
  static constexpr Shape kShape = {.threads = 256, .per_sm = 8, .rounds = 4};
  static constexpr int kPerByte = 2;
  struct Tables {};
  struct Lane {
    float value;
    template <int n> BNB_DEVICE void operator()(const Bits<n / 2>& codes, float (&v)[n]) const {
      BNB_UNROLL
      for (int i = 0; i < n; ++i) v[i] = dev::shuffle(value, uint32_t{codes.word[0]} >> (i ^ 1) * 4);
    }
    BNB_DEVICE bool all_finite() const { return true; }
  };
  BNB_DEVICE Lane prepare(Tables&) const { return {kValues<Format>.data()[dev::lane() % 16]}; }
};

// The map is replicated per lane, each copy in its own bank of shared memory.
struct Decode8 {
  static constexpr Shape kShape = {.threads = 512, .per_sm = 3, .rounds = 1};
  static constexpr int kPerByte = 1;
  struct Tables {
    float value[256][dev::kWarp];
  };
  const float* code;

  struct Lane {
    const float* value;
    bool finite_map;
    template <int n> BNB_DEVICE void operator()(const Bits<n>& codes, float (&v)[n]) const {
      BNB_UNROLL
      for (int i = 0; i < n; ++i) v[i] = value[(codes.word[i / 4] >> i % 4 * 8 & 0xff) * dev::kWarp];
    }
    BNB_DEVICE bool all_finite() const { return finite_map; }
  };
  BNB_DEVICE Lane prepare(Tables& s) const {
    bool infinite = false;
    for (unsigned i = dev::thread(); i < 256 * dev::kWarp; i += dev::threads()) {
      const float v = code[i / dev::kWarp];
      infinite |= !finite(v);
      s.value[i / dev::kWarp][i % dev::kWarp] = v;
    }
    const bool all = !dev::barrier_or(infinite);
    return {&s.value[0][dev::lane()], all};
  }
};

template <class T> BNB_DEVICE Bits<16> scale(const float (&v)[kPerUnit<T>], float absmax, bool all_finite) {
  Bits<16> out;
  if (all_finite && finite(absmax)) {
    BNB_UNROLL
    for (int i = 0; i < 4; ++i)
      if constexpr (sizeof(T) == 4)
        out.word[i] = dev::float_bits(dev::mul(v[i], absmax));
      else
        out.word[i] = dev::pack<T>(dev::mul(v[2 * i], absmax), dev::mul(v[2 * i + 1], absmax));
  } else {
    BNB_UNROLL
    for (int i = 0; i < 4; ++i)
      if constexpr (sizeof(T) == 4)
        out.word[i] = dev::float_bits(rounded<T>(product_with_nan(v[i], absmax)));
      else
        out.word[i] =
            rounded<T>(product_with_nan(v[2 * i], absmax)).bits | uint32_t{rounded<T>(product_with_nan(v[2 * i + 1], absmax)).bits} << 16;
  }
  return out;
}

// `vectors`: codes and y are aligned for whole units.
template <class T, class Decode>
BNB_KERNEL(Decode::kShape.threads, Decode::kShape.per_sm)
dequantize(const uint8_t* codes, int64_t n, int log2_blocksize, bool vectors, const float* absmax, uint8_t* y, Decode decode) {
  constexpr int kWarps = Decode::kShape.warps(), kPer = kPerUnit<T>;
  using Codes = Bits<kPer / Decode::kPerByte>;
  const auto lane_decode = decode.prepare(dev::shared<typename Decode::Tables>());
  const int64_t code_bytes = (n + Decode::kPerByte - 1) / Decode::kPerByte, y_bytes = n * static_cast<int64_t>(sizeof(T));
  for (int64_t tile = dev::block().x; tile * kWarps * kSpan<T> < n; tile += dev::grid().x) {
    const int64_t span = (tile * kWarps + dev::warp()) * kSpan<T>;
    const bool whole = vectors && span + kSpan<T> <= n;
    Codes packed[kUnits];
    float largest[kUnits];
    if (whole) {
      BNB_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        const int64_t at = unit_begin<T>(span, u);
        packed[u] = dev::load_once<Codes>(codes + at / Decode::kPerByte);
        largest[u] = absmax[at >> log2_blocksize];
      }
    } else {
      BNB_UNROLL
      for (int u = 0; u < kUnits; ++u) {
        const int64_t at = unit_begin<T>(span, u);
        packed[u] = load_bytes<Codes>(codes, at / Decode::kPerByte, code_bytes);
        largest[u] = at < n ? absmax[at >> log2_blocksize] : 0;
      }
    }
    BNB_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      const int64_t byte = unit_begin<T>(span, u) * static_cast<int64_t>(sizeof(T));
      float v[kPer];
      lane_decode(packed[u], v);
      const auto out = scale<T>(v, largest[u], lane_decode.all_finite());
      if (whole)
        dev::store_once(y + byte, out);
      else
        store_bytes(y, byte, y_bytes, out);
    }
  }
}

template <class Decode>
void launch_dequantize(const char* op, const uint8_t* codes, const float* absmax, int64_t blocksize, const View& out, Decode decode,
                       Stream stream) {
  if (out.size == 0) return;
  visit(out.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr Shape shape = Decode::kShape;
    const bool vectors = dev::aligned(out.data, 16) && dev::aligned(codes, kPerUnit<T> / Decode::kPerByte);
    dev::launch({.op = op,
                 .dtype = out.dtype,
                 .shape = {out.size},
                 .grid = shape.template grid<T>(out.size),
                 .threads = shape.threads,
                 .shared = sizeof(typename Decode::Tables),
                 .stream = stream},
                dequantize<T, Decode>, codes, out.size, std::countr_zero(static_cast<uint64_t>(blocksize)), vectors, absmax,
                static_cast<uint8_t*>(out.data), decode);
  });
}

}  // namespace

void dequantize_4bit(const Dequantize4bit& d, Stream stream) {
  check_arguments(d);
  visit(d.type, [&](auto format) {
    launch_dequantize("dequantize_4bit", d.codes.data(), d.absmax.data(), d.blocksize, d.out, Decode4<decltype(format)>{}, stream);
  });
}

void dequantize_blockwise(const DequantizeBlockwise& d, Stream stream) {
  check_arguments(d).blocksize(d.blocksize, "blocksize on a CUDA device");
  launch_dequantize("dequantize_blockwise", d.codes.data(), d.absmax.data(), d.blocksize, d.out, Decode8{d.code.data()}, stream);
}

}  // namespace bnb::cuda
