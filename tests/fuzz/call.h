// One call in the making, as the targets of the fuzzer make them.
#pragma once

#include <bnb/bnb.h>

#include <bit>
#include <optional>

#include "fuzz/memory.h"

namespace bnb::fuzz {

// Lengths are right ones, but now and then.
struct Call {
  Memory& memory;
  Bytes& bytes;

  int64_t length(int64_t right) {
    if (!bytes.rarely()) return right;
    const int64_t wrong = bytes.flip() ? bytes.below(std::max<int64_t>(1, right + 1)) : right + bytes.below(9) - 4;
    return std::clamp<int64_t>(wrong, 0, Memory::kMost / 8);
  }
  int64_t size(int64_t right) { return bytes.rarely() ? bytes.number() : right; }
  DType dtype() { return bytes.rarely() ? static_cast<DType>(bytes.byte()) : static_cast<DType>(bytes.below(3)); }
  QuantType format() { return bytes.rarely() ? static_cast<QuantType>(bytes.byte()) : static_cast<QuantType>(bytes.below(2)); }
  int64_t blocksize() { return bytes.rarely() ? bytes.number() : int64_t{32} << bytes.below(8); }

  // Any bits at all, or numbers around 1.
  template <class T> void fill(T* data, int64_t n) {
    const uint8_t kind = bytes.byte();
    auto state = bytes.raw<uint64_t>() | 1;
    for (int64_t i = 0; i < n; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const uint64_t r = state >> 13 ^ state >> 40;
      T value;
      std::memcpy(&value, &r, sizeof(T));
      if constexpr (std::is_same_v<T, float> || std::is_same_v<T, Half> || std::is_same_v<T, BFloat16>) {
        // Exponents from 2^-8 to 2^7, and one in 32 zero.
        const uint32_t e = static_cast<uint32_t>(r >> 32 & 15);
        uint32_t tame = static_cast<uint32_t>(r) & 0x807fffff;
        tame = (r >> 40 & 31) == 0 ? 0 : tame | (119 + e) << 23;
        const uint32_t half = (tame >> 16 & 0x8000) | (tame ? (7 + e) << 10 | (tame >> 13 & 0x3ff) : 0);
        if (kind < 160) {
          if constexpr (std::is_same_v<T, float>)
            value = std::bit_cast<float>(tame);
          else
            value.bits = static_cast<uint16_t>(std::is_same_v<T, Half> ? half : tame >> 16);
        }
      }
      std::memcpy(static_cast<void*>(data + i), &value, sizeof(T));
    }
  }
  // Without memory, now and then.
  template <class T> std::span<T> place(T* data, int64_t n) {
    return {bytes.rarely() && bytes.flip() ? nullptr : data, static_cast<size_t>(n)};
  }
  template <class T> std::span<const T> in(int64_t right) {
    const int64_t n = length(right);
    T* data = memory.take<T>(bytes, n, false);
    fill(data, n);
    return place<const T>(data, n);
  }
  template <class T> std::span<T> out(int64_t right) {
    const int64_t n = length(right);
    T* data = memory.take<T>(bytes, n, true);
    fill(data, n);
    return place(data, n);
  }
  std::span<const float> map(bool signed_map) {
    const int64_t n = length(256);
    float* data = memory.take<float>(bytes, n, false);
    if (bytes.byte() < 64) {
      fill(data, n);
      if (bytes.flip()) std::sort(data, data + n, [](float a, float b) { return std::bit_cast<int32_t>(a) < std::bit_cast<int32_t>(b); });
    } else {
      const auto values = create_dynamic_map(signed_map);
      std::copy_n(values.begin(), std::min<int64_t>(n, 256), data);
    }
    return place<const float>(data, n);
  }
  // A size that is not that of the memory is one that no other buffer can have.
  View elements(int64_t right, DType type, bool written) {
    const int64_t n = length(right);
    void* data = nullptr;
    if (type == DType::f16)
      fill(static_cast<Half*>(data = memory.take<Half>(bytes, n, written, true)), n);
    else if (type == DType::bf16)
      fill(static_cast<BFloat16*>(data = memory.take<BFloat16>(bytes, n, written, true)), n);
    else
      fill_floats(data = memory.take<float>(bytes, n, written, true), n);
    if (bytes.rarely())
      return {bytes.flip() ? nullptr : data, type, bytes.flip() ? -bytes.below(100) : int64_t{1} << (40 + bytes.below(23))};
    return {data, type, n};
  }
  void fill_floats(void* data, int64_t n) {
    std::vector<float> values(static_cast<size_t>(n));
    fill(values.data(), n);
    if (n) std::memcpy(data, values.data(), values.size() * 4);
  }
  // No elements, or n of any type.
  ConstView bias(int64_t n) { return bytes.flip() ? ConstView{} : elements(n, dtype(), false); }

  // `call` on every instruction set; `exact`: with equal bytes.
  template <class F> void run(std::string_view op, bool exact, F&& call) {
    memory.keep();
    std::optional<std::string> refused;
    std::vector<std::byte> results;
    bool first = true;
    for (const auto isa : supported_isas()) {
      force_isa(isa);
      memory.restore();
      std::optional<std::string> message;
      try {
        call();
      } catch (const Error& e) {
        message = e.what();
        if (!message->starts_with(std::string(op) + ": ")) throw Fault("a message that does not name " + std::string(op) + ": " + *message);
      }
      const auto where = std::string(op) + " on " + std::string(isa);
      try {
        memory.check(!message);
      } catch (const Fault& f) { throw Fault(where + ": " + f.what()); }
      auto now = memory.results();
      if (!first && refused != message)
        throw Fault(where + ": " + message.value_or("accepted") + "; before: " + refused.value_or("accepted"));
      if (!first && exact && !message && now != results)
        throw Fault(where + ": other bytes than on the instruction set before, " + memory.describe(now, results));
      refused = message, results = std::move(now), first = false;
    }
    force_isa("");
  }
};

// The target in values.cpp.
void values(Memory& memory, Bytes& bytes);

}  // namespace bnb::fuzz
