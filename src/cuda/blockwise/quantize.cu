// Quantization of blocks: absmax = max |x|, t = x * (1 / max(absmax, 1e-38)), the code of t; docs/NUMERICS.md has the rules.
//
// Reads sizeof(T) bytes and writes 1/2 (4 bits) or 1 byte per element, and 4 bytes per block, each once. Lower bound: those bytes at copy
// bandwidth; bf16 to nf4 with blocks of 64 moves 2.5625 bytes per element. A span stays in registers between the maximum and the codes. 4
// loads of 16 bytes per thread are in flight.
#include <bit>

#include "common/arguments.h"
#include "common/formats.h"
#include "cuda/blockwise/encode8.cuh"

namespace bnb::cuda {
namespace {

using dev::Bits;

// ---- 4 bits: 32 buckets of t, one per lane
//
// ceil(t * 15.5) is the bucket of t, (k / 15.5, (k + 1) / 15.5], which holds at most one threshold. A shuffle is the lookup: lane `bucket`
// keeps that threshold and how many are below the bucket. Rounding up puts 0, a threshold of FP4, between two buckets.
struct Buckets {
  float threshold[32];
  uint32_t below[32];
};
inline constexpr float kScale = 15.5f, kMagic = 0x1.8p23f + 16;  // ceil + 16 in the low bits of the sum

template <class Format> constexpr Buckets make_buckets() {
  Buckets b{};
  constexpr float kInfinity = __builtin_huge_valf();
  for (int k = -15; k <= 16; ++k) {
    const int bucket = (k + 16) & 31;
    int inside = -1, below = 0;
    for (int i = 0; i < 15; ++i) {
      const double scaled = Format::thresholds[i] * double{kScale};
      below += scaled <= k - 1;
      if (scaled > k - 1 && scaled < k) inside = inside < 0 ? i : throw "two thresholds in a bucket";
    }
    // Without a threshold: all of it is above the one before (so is a NaN, whose sum ends in 31), or nothing is.
    b.threshold[bucket] = inside >= 0 ? Format::thresholds[inside] : below ? -kInfinity : kInfinity;
    b.below[bucket] = static_cast<uint32_t>(inside < 0 && below ? below - 1 : below);
  }
  return b;
}
template <class Format> BNB_TABLE Buckets kBuckets = make_buckets<Format>();

// Eight numbers of thresholds below, a nibble each, to codes.
template <class Format> BNB_HD constexpr uint32_t codes_of(uint32_t below) {
  if constexpr (Format::type == QuantType::nf4) return below;
  // fp4: magnitudes ascend away from the middle as 0 1 6 7 4 5 2 3. The upper bit: t < 0, but the zero of t > 0 has it too.
  const uint32_t negative = ~below & 0x88888888, steps = (below & 0x77777777) ^ (negative - (negative >> 3));
  const uint32_t magnitude = steps ^ (steps << 1 & 0x44444444), zero = ~(steps + 0x77777777) & 0x88888888;
  return magnitude | (negative ^ zero);
}
template <class Format> constexpr bool codes_agree() {
  for (uint32_t i = 0; i < 16; ++i)
    if (codes_of<Format>(i * 0x11111111) != Format::codes[i] * 0x11111111u) return false;
  return true;
}
static_assert(codes_agree<Nf4>() && codes_agree<Fp4>());

template <class Format> struct Encode4 {
  static constexpr Shape kShape = {.threads = 256, .per_sm = 5, .rounds = 4};
  static constexpr int kPerByte = 2;
  struct Tables {};
  struct Lane {
    float threshold;
    uint32_t below;

    // Codes of a unit, in the order of memory: the first of a pair in the upper nibble.
    template <int n> BNB_DEVICE Bits<n / 2> operator()(const float (&t)[n]) const {
      uint32_t below_all = 0;
      BNB_UNROLL
      for (int i = 0; i < n; ++i) {
        const uint32_t bucket = dev::float_bits(dev::fma_up(t[i], kScale, kMagic));
        const float at = dev::shuffle(threshold, bucket);
        below_all = dev::count_above(below_all * 16 + dev::shuffle(below, bucket), t[i], at);
      }
      const uint32_t codes = dev::permute(codes_of<Format>(below_all), 0, n == 8 ? 0x0123 : 0x4401);
      if constexpr (n == 8) return {codes};
      if constexpr (n == 4) return {static_cast<uint16_t>(codes)};
    }
  };
  BNB_DEVICE Lane prepare(Tables&) const { return {kBuckets<Format>.threshold[dev::lane()], kBuckets<Format>.below[dev::lane()]}; }
};

// ---- 8 bits: any ascending map of 256 values (encode8.cuh); for large inputs each thread block builds the table of buckets
struct Encode8 {
  static constexpr Shape kShape = {.threads = 512, .per_sm = 2, .rounds = 1};
  static constexpr int kPerByte = 1;
  static constexpr int64_t kWorthBuckets = 8192;  // elements per multiprocessor
  using Tables = Tables8;
  using Lane = Lane8;
  const float* code;
  bool want_buckets;

  BNB_DEVICE Lane prepare(Tables& s) const { return prepare8(s, code, want_buckets); }
};

// ---- the kernel

// absmax of the block of each unit, as fp32 bits. A block, or this warp's part of it, is `group` lanes by `rows` units.
template <class T> BNB_DEVICE void largest_of_blocks(const Bits<16> (&raw)[kUnits], unsigned group, int rows, uint32_t (&largest)[kUnits]) {
  constexpr uint32_t kMagnitude = sizeof(T) == 4 ? 0x7fffffff : 0x7fff7fff;
  constexpr int kPerWord = 4 / sizeof(T), kWords = kUnits / kPerWord;  // two units of 16 bits share a word from here on
  uint32_t m[kUnits], w[kWords];
  BNB_UNROLL
  for (int u = 0; u < kUnits; ++u) {
    m[u] = raw[u].word[0] & kMagnitude;
    BNB_UNROLL
    for (int i = 1; i < 4; ++i) m[u] = greater<T>(m[u], raw[u].word[i] & kMagnitude);
  }
  BNB_UNROLL
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4)
      w[i] = m[i];
    else
      w[i] = greater<T>(dev::permute(m[2 * i], m[2 * i + 1], 0x5410), dev::permute(m[2 * i], m[2 * i + 1], 0x7632));
    if (kPerWord == 2 && rows > 1) w[i] = greater<T>(w[i], dev::permute(w[i], w[i], 0x1032));
  }
  BNB_UNROLL
  for (int k = 1; k < kWords; k *= 2)
    if (rows > k * kPerWord) {
      BNB_UNROLL
      for (int i = 0; i < kWords; ++i)
        if ((i & k) == 0) w[i] = w[i | k] = greater<T>(w[i], w[i | k]);
    }
  BNB_UNROLL
  for (unsigned k = 1; k < dev::kWarp; k *= 2)
    if (group > k) {
      BNB_UNROLL
      for (int i = 0; i < kWords; ++i) w[i] = greater<T>(w[i], dev::shuffle_xor(w[i], k));
    }
  BNB_UNROLL
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(T) == 4) {
      largest[i] = w[i];
    } else {
      float low, high;
      dev::unpack<T>(w[i], low, high);
      largest[2 * i] = dev::float_bits(low);
      largest[2 * i + 1] = dev::float_bits(high);
    }
  }
}

template <class T, bool whole, class Encode>
BNB_DEVICE void write_codes(const typename Encode::Lane& encode, const Bits<16> (&raw)[kUnits], const uint32_t (&absmax)[kUnits],
                            int64_t span, int64_t n, uint8_t* codes) {
  constexpr int kPer = kPerUnit<T>;
  BNB_UNROLL
  for (int u = 0; u < kUnits; ++u) {
    const int64_t at = unit_begin<T>(span, u);
    const float m = dev::bits_float(absmax[u]), inverse = dev::reciprocal(m < 1e-38f ? 1e-38f : m);
    float t[kPer];
    to_floats<T>(raw[u], t);
    BNB_UNROLL
    for (int i = 0; i < kPer; ++i) t[i] = whole || at + i < n ? dev::mul(t[i], inverse) : 0;
    const auto packed = encode(t);
    if constexpr (whole)
      dev::store_once(codes + at / Encode::kPerByte, packed);
    else
      store_bytes(codes, at / Encode::kPerByte, (n + Encode::kPerByte - 1) / Encode::kPerByte, packed);
  }
}

template <class Encode> struct Shared {
  typename Encode::Tables tables;
  uint32_t largest[2][Encode::kShape.warps()];  // of the warps' parts of large blocks; alternate between tiles
};

// `vectors`: x and codes are aligned for whole units.
template <class T, class Encode>
BNB_KERNEL(Encode::kShape.threads, Encode::kShape.per_sm)
quantize(const uint8_t* x, int64_t n, int log2_blocksize, bool vectors, uint8_t* codes, float* absmax, Encode encode) {
  constexpr int kWarps = Encode::kShape.warps(), kPer = kPerUnit<T>, kRow = kPer * dev::kWarp;
  auto& s = dev::shared<Shared<Encode>>();
  const auto lane_encode = encode.prepare(s.tables);

  const int blocksize = 1 << log2_blocksize;
  const unsigned group = blocksize < kRow ? blocksize / kPer : dev::kWarp, warps = blocksize > kSpan<T> ? blocksize / kSpan<T> : 1;
  const int rows = blocksize < kRow ? 1 : blocksize < kSpan<T> ? blocksize / kRow : kUnits;
  const int64_t blocks = (n + blocksize - 1) >> log2_blocksize;
  unsigned turn = 0;
  for (int64_t tile = dev::block().x; tile * kWarps * kSpan<T> < n; tile += dev::grid().x, turn ^= 1) {
    const int64_t span = (tile * kWarps + dev::warp()) * kSpan<T>;
    const bool whole = vectors && span + kSpan<T> <= n;
    Bits<16> raw[kUnits];
    if (whole) {
      BNB_UNROLL
      for (int u = 0; u < kUnits; ++u) raw[u] = dev::load_once<Bits<16>>(x + unit_begin<T>(span, u) * sizeof(T));
    } else {
      BNB_UNROLL
      for (int u = 0; u < kUnits; ++u) raw[u] = load_bytes<Bits<16>>(x, unit_begin<T>(span, u) * sizeof(T), n * sizeof(T));
    }

    uint32_t largest[kUnits];
    largest_of_blocks<T>(raw, group, rows, largest);
    if (warps > 1) {
      if (dev::lane() == 0) s.largest[turn][dev::warp()] = largest[0];
      dev::barrier();
      for (unsigned w = 0; w < warps; ++w) {
        const uint32_t other = s.largest[turn][dev::warp() / warps * warps + w];
        largest[0] = other > largest[0] ? other : largest[0];
      }
      BNB_UNROLL
      for (int u = 1; u < kUnits; ++u) largest[u] = largest[0];
    }

    // Lane j of a group writes the absmax of its j-th block: one store for the whole span.
    const unsigned first_unit = dev::lane() % group * static_cast<unsigned>(rows);
    uint32_t mine = 0;
    BNB_UNROLL
    for (int u = 0; u < kUnits; ++u) {
      constexpr uint32_t kInfinity = 0x7f800000, kNaN = 0x7fc00000;
      largest[u] = largest[u] > kInfinity ? kNaN : largest[u];
      if (first_unit == static_cast<unsigned>(u)) mine = largest[u];
    }
    const int64_t b = (span >> log2_blocksize) + dev::lane() % group * (dev::kWarp / group) + dev::lane() / group;
    if (first_unit < kUnits && b < blocks && dev::warp() % warps == 0) absmax[b] = dev::bits_float(mine);

    if (whole)
      write_codes<T, true, Encode>(lane_encode, raw, largest, span, n, codes);
    else
      write_codes<T, false, Encode>(lane_encode, raw, largest, span, n, codes);
  }
}

template <class Encode>
void launch_quantize(const char* op, const ConstView& x, int64_t blocksize, uint8_t* codes, float* absmax, Encode encode, Stream stream) {
  if (x.size == 0) return;
  visit(x.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr Shape shape = Encode::kShape;
    const bool vectors = dev::aligned(x.data, 16) && dev::aligned(codes, kPerUnit<T> / Encode::kPerByte);
    dev::launch({.op = op,
                 .dtype = x.dtype,
                 .shape = {x.size},
                 .grid = shape.template grid<T>(x.size),
                 .threads = shape.threads,
                 .shared = sizeof(Shared<Encode>),
                 .stream = stream},
                quantize<T, Encode>, static_cast<const uint8_t*>(x.data), x.size, std::countr_zero(static_cast<uint64_t>(blocksize)),
                vectors, codes, absmax, encode);
  });
}

}  // namespace

void quantize_4bit(const Quantize4bit& d, Stream stream) {
  check_arguments(d);
  visit(d.type, [&](auto format) {
    launch_quantize("quantize_4bit", d.x, d.blocksize, d.codes.data(), d.absmax.data(), Encode4<decltype(format)>{}, stream);
  });
}

void quantize_blockwise(const QuantizeBlockwise& d, Stream stream) {
  check_arguments(d).blocksize(d.blocksize, "blocksize on a CUDA device");
  launch_quantize("quantize_blockwise", d.x, d.blocksize, d.codes.data(), d.absmax.data(),
                  Encode8{d.code.data(), d.x.size / Encode8::kWorthBuckets >= dev::device().sms}, stream);
}

}  // namespace bnb::cuda
