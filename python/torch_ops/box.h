// From a plain C++ function to a boxed kernel of the LibTorch stable ABI. Differs from TORCH_BOX in three points: parameter types that the
// ABI would misread are refused at compile time, `str` arguments do not leak (the header's unboxing does before torch 2.14), and a
// bnb::Error becomes the exception that Python users expect.
#pragma once

#include <bnb/error.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace bnb::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A `str` argument: owns the handle that the dispatcher passed.
class Str {
 public:
  explicit Str(StringHandle handle) : handle_(handle, &torch_delete_string) {
    const char* data = nullptr;
    size_t length = 0;
    STD_TORCH_CHECK(torch_string_length(handle, &length) == 0 && torch_string_c_str(handle, &data) == 0, "a string argument is unreadable");
    view_ = {data, length};
  }
  operator std::string_view() const { return view_; }

 private:
  std::unique_ptr<StringOpaque, decltype(&torch_delete_string)> handle_;
  std::string_view view_;
};

// A tensor that nobody else holds: as a result its handle goes to the dispatcher, where that of a Tensor is copied.
using Owned = std::unique_ptr<AtenTensorOpaque, decltype([](AtenTensorHandle t) { aoti_torch_delete_tensor_object(t); })>;

template <class T, class... Ts> inline constexpr bool is_one_of = (std::is_same_v<T, Ts> || ...);

template <class T> T unbox(StableIValue value) {
  static_assert(is_one_of<T, int64_t, double, bool, ScalarType, Tensor, Str, std::optional<Tensor>, std::optional<ScalarType>,
                          std::optional<int64_t>, std::vector<int64_t>, std::vector<double>, std::vector<Tensor>>,
                "a type that a boxed kernel can take");
  if constexpr (std::is_same_v<T, Str>)
    return Str(torch::stable::detail::to<StringHandle>(value));
  else
    return torch::stable::detail::to<T>(value);
}

template <class... Rs> void box_result(StableIValue* stack, std::tuple<Rs...>&& result) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    ((stack[I] = torch::stable::detail::from(std::get<I>(result))), ...);
  }(std::index_sequence_for<Rs...>{});
}
inline void box_result(StableIValue* stack, Owned&& result) { stack[0] = torch::stable::detail::from(result.release()); }
inline void box_result(StableIValue* stack, Tensor&& result) { stack[0] = torch::stable::detail::from(result); }
inline void box_result(StableIValue* stack, int64_t result) { stack[0] = torch::stable::detail::from(result); }

template <auto F> struct Boxed;

template <class R, class... Ps, R (*F)(Ps...)> struct Boxed<F> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t) {
    STD_TORCH_CHECK(arguments == sizeof...(Ps), "the schema has ", arguments, " arguments, its kernel ", sizeof...(Ps));
    // Braces unbox in order, so that everything taken so far is released if a later one throws.
    [&]<size_t... I>(std::index_sequence<I...>) {
      std::tuple<std::remove_cvref_t<Ps>...> values{unbox<std::remove_cvref_t<Ps>>(stack[I])...};
      try {
        if constexpr (std::is_void_v<R>)
          std::apply(F, values);
        else
          box_result(stack, std::apply(F, values));
      } catch (const bnb::Error& e) {
        if (e.code() == bnb::Errc::invalid_argument) throw std::invalid_argument(e.what());
        throw std::runtime_error(e.what());
      } catch (const std::bad_alloc&) { throw std::runtime_error("bitsandbytes: not enough memory for the lists of an operator's call"); }
    }(std::index_sequence_for<Ps...>{});
  }
};

}  // namespace bnb::torch_ops
