// The few types that every operation shares: element types, 4-bit formats, and flat views of caller-owned memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>

namespace bnb {

// 16-bit floats travel as their bit patterns; Half and BFloat16 only tell the two apart.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

enum class DType : uint8_t { f32, f16, bf16 };

// nf4: 4-bit NormalFloat (Dettmers et al. 2023, QLoRA, arXiv 2305.14314). fp4: sign, 2 exponent bits, 1 mantissa bit.
enum class QuantType : uint8_t { nf4, fp4 };

constexpr int64_t size_of(DType t) { return t == DType::f32 ? 4 : 2; }
std::string_view name(DType);
std::string_view name(QuantType);

template <class T>
inline constexpr DType dtype_of = [] {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>, "float, Half or BFloat16");
  return std::is_same_v<T, float> ? DType::f32 : std::is_same_v<T, Half> ? DType::f16 : DType::bf16;
}();

// `size` contiguous elements of type `dtype`. No alignment is demanded. Empty views may hold a null pointer.
struct ConstView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size = 0;

  ConstView() = default;
  ConstView(const void* p, DType t, int64_t n) : data(p), dtype(t), size(n) {}
  template <class T>
  ConstView(std::span<T> s) : data(s.data()), dtype(dtype_of<std::remove_const_t<T>>), size(static_cast<int64_t>(s.size())) {}
};

struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size = 0;

  View() = default;
  View(void* p, DType t, int64_t n) : data(p), dtype(t), size(n) {}
  template <class T> View(std::span<T> s) : data(s.data()), dtype(dtype_of<T>), size(static_cast<int64_t>(s.size())) {}
  operator ConstView() const { return {data, dtype, size}; }
};

}  // namespace bnb
