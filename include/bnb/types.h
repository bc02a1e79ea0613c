// The few types that every operation shares: element types, 4-bit formats, and flat views of caller-owned memory.
#pragma once

#include <bnb/export.h>

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

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
BNB_API std::string_view name(DType);
BNB_API std::string_view name(QuantType);

template <class T>
concept Element = std::same_as<T, float> || std::same_as<T, Half> || std::same_as<T, BFloat16>;
template <Element T>
inline constexpr DType dtype_of = std::is_same_v<T, float>  ? DType::f32
                                  : std::is_same_v<T, Half> ? DType::f16
                                                            : DType::bf16;

// What std::span takes, with such elements: vectors, arrays, spans.
template <class R>
concept ElementRange = requires(R& r) { std::span(r); } && Element<typename decltype(std::span(std::declval<R&>()))::value_type>;

// `size` contiguous elements of type `dtype`, made from a pointer or from any contiguous range of float, Half or BFloat16; the memory stays
// its owner's. No alignment is demanded. Empty views may hold a null pointer.
struct ConstView {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size = 0;

  ConstView() = default;
  ConstView(const void* p, DType t, int64_t n) : data(p), dtype(t), size(n) {}
  template <class R>
    requires ElementRange<const R>
  ConstView(const R& range) {
    const std::span s(range);
    data = s.data(), dtype = dtype_of<typename decltype(s)::value_type>, size = static_cast<int64_t>(s.size());
  }
};

struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size = 0;

  View() = default;
  View(void* p, DType t, int64_t n) : data(p), dtype(t), size(n) {}
  // Of elements that can be written; a range that owns them must have a name.
  template <class R>
    requires ElementRange<std::remove_reference_t<R>> &&
             std::constructible_from<std::span<typename decltype(std::span(std::declval<R&>()))::value_type>, R>
  View(R&& range) {
    const std::span s(range);
    data = s.data(), dtype = dtype_of<typename decltype(s)::value_type>, size = static_cast<int64_t>(s.size());
  }
  operator ConstView() const { return {data, dtype, size}; }
};

}  // namespace bnb
