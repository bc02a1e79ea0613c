// Argument checks with one wording: "<op>: <argument> is <given>, expected <allowed>".
#pragma once

#include <bnb/error.h>
#include <bnb/quantize.h>

#include <cstdint>
#include <initializer_list>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

namespace bnb {

// Where an argument lies. Pointers into different objects have no order, numbers do.
struct Memory {
  std::string_view argument;
  uintptr_t begin = 0, bytes = 0;

  Memory(std::string_view name, const void* data, int64_t elements, int64_t size)
      : argument(name), begin(reinterpret_cast<uintptr_t>(data)), bytes(static_cast<uintptr_t>(elements) * static_cast<uintptr_t>(size)) {}

  bool meets(const Memory& o) const { return bytes != 0 && o.bytes != 0 && begin < o.begin + o.bytes && o.begin < begin + bytes; }
};

// Scratch memory of a call that could not be had (cpu/runtime/scratch.h).
struct ScratchError : std::bad_alloc {
  explicit ScratchError(int64_t size) : bytes(size) {}
  int64_t bytes;
};

// Block sizes of 4-bit weights, and of nested scales that a product takes.
constexpr bool is_blocksize(int64_t n) { return n >= kMinBlocksize && n <= kMaxBlocksize && (n & (n - 1)) == 0; }

class Checker {
 public:
  explicit Checker(std::string_view op) : op_(op) {}
  std::string op() const { return std::string(op_); }

  // f(), where memory that cannot be had is an Error of the operation.
  template <class F> void within_memory(F&& f) const {
    try {
      f();
    } catch (const ScratchError& e) {
      throw Error(Errc::out_of_memory, op() + ": " + std::to_string(e.bytes) + " bytes of scratch memory could not be allocated");
    } catch (const std::bad_alloc&) { throw Error(Errc::out_of_memory, op() + ": not enough memory for its tables"); }
  }

  // What is checked from now on belongs to entry i of lists, as messages then say; to no list if i is below 0.
  void entry(int64_t i) { entry_ = i; }
  static std::string entry_name(std::string_view argument, int64_t entry) {
    std::string name(argument);
    if (entry >= 0) name.append("[").append(std::to_string(entry)).append("]");
    return name;
  }

  template <class T> [[noreturn]] void fail(std::string_view argument, const T& given, std::string_view allowed) const {
    std::string text = op();
    text.append(": ").append(entry_name(argument, entry_)).append(" is ");
    if constexpr (std::is_arithmetic_v<T>)
      text += std::to_string(given);
    else
      text += given;
    throw Error(Errc::invalid_argument, text.append(", expected ").append(allowed));
  }

  template <class T> void that(bool ok, std::string_view argument, const T& given, std::string_view allowed) const {
    if (!ok) [[unlikely]]
      fail(argument, given, allowed);
  }

  void equal(std::string_view argument, int64_t given, int64_t expected, std::string_view meaning) const {
    if (given != expected) [[unlikely]]
      fail(argument, std::to_string(given) + " elements", std::to_string(expected) + " (" + std::string(meaning) + ")");
  }

  // A buffer of at least `needed` elements, not null unless nothing is needed. More are not looked at.
  template <class T> Memory size(std::string_view argument, std::span<T> given, int64_t needed) const {
    if (static_cast<int64_t>(given.size()) < needed || (needed > 0 && given.data() == nullptr)) [[unlikely]]
      fail(argument, std::to_string(given.data() ? given.size() : 0) + " elements", "at least " + std::to_string(needed));
    return {argument, given.data(), needed, sizeof(T)};
  }

  Memory view(std::string_view argument, const ConstView& v) const {
    that(v.size >= 0, argument, std::to_string(v.size) + " elements", "0 or more");
    that(v.size == 0 || v.data != nullptr, argument, "null", "a pointer to its elements");
    that(v.dtype == DType::f32 || v.dtype == DType::f16 || v.dtype == DType::bf16, argument, "of an unknown type", "f32, f16 or bf16");
    return {argument, v.data, v.size, size_of(v.dtype)};
  }

  // What a call writes lies neither in what it reads nor in what else it writes.
  void apart(std::initializer_list<Memory> written, std::initializer_list<Memory> read) const {
    for (const Memory& w : written) {
      for (const Memory& r : read)
        if (w.meets(r)) [[unlikely]]
          fail(w.argument, std::string("in the memory of ").append(r.argument), "memory of its own");
      for (const Memory& other : written)
        if (&other != &w && w.meets(other)) [[unlikely]]
          fail(w.argument, std::string("in the memory of ").append(other.argument), "memory of its own");
    }
  }

  int64_t product(std::string_view argument, int64_t a, int64_t b) const {
    int64_t result = 0;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &result)) [[unlikely]]
      fail(argument, std::to_string(a) + " * " + std::to_string(b), "two sizes of 0 or more whose product fits 63 bits");
    return result;
  }

  void type(QuantType given) const {
    that(given == QuantType::nf4 || given == QuantType::fp4, "type", static_cast<int>(given), "nf4 or fp4");
  }

  void blocksize(int64_t given, std::string_view argument = "blocksize") const {
    that(is_blocksize(given), argument, given, "a power of two from 32 to 4096");
  }

  void any_blocksize(int64_t given) const { that(given >= 1, "blocksize", given, "1 or more"); }

  void ascending(std::string_view argument, std::span<const float> values) const {
    for (size_t i = 1; i < values.size(); ++i)
      if (!(values[i - 1] <= values[i])) [[unlikely]]
        fail(argument, std::to_string(values[i]) + " at position " + std::to_string(i) + " after " + std::to_string(values[i - 1]),
             "values in ascending order, none of them NaN");
  }

 private:
  std::string_view op_;
  int64_t entry_ = -1;
};

}  // namespace bnb
