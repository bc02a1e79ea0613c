// Quantized tensors that own their memory, and the form that they have in a checkpoint.
//
//   const bnb::Quantized4bit w = bnb::quantize(weight, bnb::Options4bit{.nested = true, .shape = {n, k}});
//   const std::vector<float> y = bnb::gemm(x, w);           // x [m, k] -> y [m, n]
//   const std::vector<float> back = bnb::dequantize(w);     // also dequantize<bnb::BFloat16>(w)
//
// The members are plain data, to be filled and read at will; every function checks that they fit each other before it reads them. Bytes are
// those of the operations on spans (bnb/quantize.h, bnb/gemm.h, bnb/int8.h) and of the Python package. Errors: bnb::Error, whose message
// names the operation and the member.
#pragma once

#include <bnb/gemm.h>
#include <bnb/int8.h>
#include <bnb/quantize.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace bnb {

using Shape = std::vector<int64_t>;  // row-major; {} is that of a single number

// One fp32 scale per block, as it is or quantized to 8 bits around the mean ("double quantization", QLoRA section 3, arXiv 2305.14314):
//   scale[i] = fp32(code[codes[i]] * second[i / second_blocksize]) + offset, each step rounded to fp32.
struct BlockScales {
  std::vector<float> values = {};  // blocks; empty if nested

  bool nested = false;              // the rest is that of nested scales
  std::vector<uint8_t> codes = {};  // blocks
  std::vector<float> code = {};     // 256
  std::vector<float> second = {};   // blocks_of(blocks, second_blocksize)
  int64_t second_blocksize = 256;   // 1 or more
  DType second_dtype = DType::f32;  // as a checkpoint names it; scales are fp32 whatever it says
  float offset = 0;                 // the mean of the scales

  int64_t size() const { return static_cast<int64_t>(nested ? codes.size() : values.size()); }
  bool operator==(const BlockScales&) const = default;
};

// NF4 or FP4: 4 bits per element and one scale per block of the flat row of elements.
struct Quantized4bit {
  QuantType type = QuantType::nf4;
  int64_t blocksize = 64;
  DType dtype = DType::f32;  // of the tensor that was quantized
  Shape shape = {0};
  std::vector<uint8_t> codes = {};  // packed_size(n)
  BlockScales scales = {};          // blocks_of(n, blocksize)

  bool operator==(const Quantized4bit&) const = default;
};

// 8 bits per element, code numbers of a map of 256 values, and one scale per block.
struct Quantized8bit {
  int64_t blocksize = 4096;
  DType dtype = DType::f32;
  std::optional<Shape> shape = {};  // as given; the Python package has none here
  std::vector<float> code = {};     // 256
  std::vector<uint8_t> codes = {};  // n
  BlockScales scales = {};          // blocks_of(n, blocksize)

  bool operator==(const Quantized8bit&) const = default;
};

// LLM.int8(): codes of -127..127 and one scale per row; x' = code * scale / 127.
struct QuantizedInt8 {
  DType dtype = DType::f32;
  Shape shape = {0, 0};            // [rows, columns]
  std::vector<int8_t> codes = {};  // rows * columns
  std::vector<float> scale = {};   // rows

  bool operator==(const QuantizedInt8&) const = default;
};

// ---- making them. `x` holds the elements of `shape`, row-major, in fp32, fp16 or bf16.

struct Options4bit {
  QuantType type = QuantType::nf4;
  int64_t blocksize = 64;  // a power of two from 32 to 4096
  bool nested = false;     // scales in 8 bits too, in blocks of 256
  Shape shape = {};        // without one: a row of all elements
};
struct Options8bit {
  int64_t blocksize = 4096;      // 1 or more
  bool nested = false;           // scales in 8 bits too, in blocks of as many
  Shape shape = {};              // without one the result has none
  std::vector<float> code = {};  // 256 ascending values; without them create_dynamic_map()
};
struct OptionsInt8 {
  Shape shape = {};  // [rows, columns]; without one: a single row
};
BNB_API Quantized4bit quantize(ConstView x, const Options4bit&);
BNB_API Quantized8bit quantize(ConstView x, const Options8bit&);
BNB_API QuantizedInt8 quantize(ConstView x, const OptionsInt8&);

// Scales in 8 bits: codes of `scales` less their mean, by the signed dynamic map. The mean is added up as torch.mean does on one thread.
BNB_API BlockScales nest(std::span<const float> scales, int64_t blocksize = 256);
// The fp32 scale of each block.
BNB_API std::vector<float> decode(const BlockScales&);

// ---- reading them: every element, row-major

// The number of elements, which the shape says, or the codes where there is none. An Error if members do not fit each other.
BNB_API int64_t elements_of(const Quantized4bit&);
BNB_API int64_t elements_of(const Quantized8bit&);
BNB_API int64_t elements_of(const QuantizedInt8&);

// Into memory of the caller's, elements_of(q) elements of any type.
BNB_API void dequantize_into(const Quantized4bit&, View out);
BNB_API void dequantize_into(const Quantized8bit&, View out);
BNB_API void dequantize_into(const QuantizedInt8&, View out);

template <Element T = float, class Quantized> std::vector<T> dequantize(const Quantized& q) {
  std::vector<T> out(static_cast<size_t>(elements_of(q)));
  dequantize_into(q, out);
  return out;
}

// ---- multiplying: y = a * W^T + bias for a weight W of shape [n, k]; a [m, k] and y [m, n] of one type; bias: n elements of any, or none

struct Int8Product {
  ConstView bias = {};
  float threshold = 0;  // columns of `a` with an |x| of this or more are multiplied in 16 or 32 bits (6 is usual); 0: none
};
BNB_API void gemm_into(ConstView a, const Quantized4bit& w, View out, ConstView bias = {});
BNB_API void gemm_into(ConstView a, const QuantizedInt8& w, View out, const Int8Product& = {});
// m * n for this `a`. An Error if the shape of W has not two sizes, or `a` is not made of rows of k.
BNB_API int64_t product_size(ConstView a, const Shape& w);

template <class R>
  requires ElementRange<const R>
auto gemm(const R& a, const Quantized4bit& w, ConstView bias = {}) {
  std::vector<typename decltype(std::span(a))::value_type> out(static_cast<size_t>(product_size(a, w.shape)));
  gemm_into(a, w, out, bias);
  return out;
}
template <class R>
  requires ElementRange<const R>
auto gemm(const R& a, const QuantizedInt8& w, const Int8Product& options = {}) {
  std::vector<typename decltype(std::span(a))::value_type> out(static_cast<size_t>(product_size(a, w.shape)));
  gemm_into(a, w, out, options);
  return out;
}

// ---- checkpoints. Beside the codes of a tensor `weight` stand
//   weight.absmax              scales, fp32; nested: their codes, uint8
//   weight.quant_map           value of each code, fp32: 16, or 256 for 8 bits
//   weight.nested_absmax, weight.nested_quant_map        `second` and `code` of nested scales
//   weight.quant_state.bitsandbytes__nf4 (__fp4, __None)   JSON text, uint8: quant_type, blocksize, dtype, shape, nested_blocksize,
//                              nested_dtype, nested_offset
// Bytes are those of QuantState.as_dict(packed=True) of the Python package; what QuantState.from_dict refuses is refused here.

enum class ItemType : uint8_t { f32, f16, bf16, f64, u8, i8, other };

// A tensor of a checkpoint whose memory is somebody else's. The name may have any path in front ("layers.0.weight.absmax").
struct ConstItem {
  std::string_view name = {};
  ItemType type = ItemType::u8;
  const void* data = nullptr;  // contiguous, of any alignment
  int64_t size = 0;            // elements
};
struct Item {
  std::string name;
  ItemType type = ItemType::u8;
  std::vector<std::byte> bytes;

  int64_t size() const;
  operator ConstItem() const { return {name, type, bytes.data(), size()}; }
};
constexpr int64_t size_of(ItemType t) {
  return t == ItemType::f64 ? 8 : t == ItemType::f32 ? 4 : t == ItemType::f16 || t == ItemType::bf16 ? 2 : 1;
}
inline int64_t Item::size() const { return static_cast<int64_t>(bytes.size()) / size_of(type); }

// A weight from its codes and the items of its state, all of them and no others. Statistics of another floating point type become fp32.
// Errors: items lacking, unknown, twice, of a wrong type or size, JSON text that is none; the message names the item.
BNB_API Quantized4bit read_4bit(std::span<const uint8_t> codes, std::span<const ConstItem> items);
BNB_API Quantized8bit read_8bit(std::span<const uint8_t> codes, std::span<const ConstItem> items);
// The items of its state, in the order of the Python package, names with `prefix` in front ("layers.0.weight.").
BNB_API std::vector<Item> state_items(const Quantized4bit&, std::string_view prefix = {});
BNB_API std::vector<Item> state_items(const Quantized8bit&, std::string_view prefix = {});

}  // namespace bnb
