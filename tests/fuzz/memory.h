// Buffers that end, or begin, at a page that cannot be touched, and what a call may have done to them.
#pragma once

#include <bnb/types.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

namespace bnb::fuzz {

// A fault that was found.
struct Fault : std::logic_error {
  using std::logic_error::logic_error;
};

// The bytes of a case, which say what is called with what. Behind their end all are 0.
class Bytes {
 public:
  explicit Bytes(std::span<const uint8_t> given) : given_(given) {}
  uint8_t byte() { return at_ < given_.size() ? given_[at_++] : uint8_t{0}; }
  template <class T> T raw() {
    T value;
    for (size_t i = 0; i < sizeof(T); ++i) reinterpret_cast<uint8_t*>(&value)[i] = byte();
    return value;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>((n <= 256 ? byte() : byte() | byte() << 8) % n); }
  bool flip() { return (byte() & 1) != 0; }
  bool rarely() { return byte() >= 248; }
  template <class T> T one_of(std::initializer_list<T> list) { return list.begin()[below(std::ssize(list))]; }
  // Any number, most often small.
  int64_t number() {
    const uint8_t kind = byte();
    return kind < 128 ? static_cast<int64_t>(byte()) - 64 : kind < 192 ? int64_t{1} << byte() % 64 : raw<int64_t>();
  }

 private:
  std::span<const uint8_t> given_;
  size_t at_ = 0;
};

class Memory {
 public:
  static constexpr size_t kSlot = size_t{64} << 10, kGuard = size_t{16} << 10;
  static constexpr int64_t kMost = int64_t{48} << 10;  // bytes of a buffer

  Memory() {
    const size_t bytes = kSlots * (kSlot + kGuard) + kGuard;
    void* all = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<std::byte*>(all) + kGuard;
    for (size_t i = 0; i < kSlots; ++i) mprotect(slot(i), kSlot, PROT_READ | PROT_WRITE);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void clear() { buffers_.clear(); }

  // n elements of T. `free_alignment`: at any address.
  template <class T> T* take(Bytes& bytes, int64_t n, bool written, bool free_alignment = false) {
    const size_t size = static_cast<size_t>(n) * sizeof(T);
    if (size > kSlot - 64 || buffers_.size() == kSlots) throw Fault("the fuzzer asks for too much memory");
    const uint8_t place = bytes.byte();
    const size_t shift = free_alignment ? place >> 1 & 31 : (place >> 1 & 31) / sizeof(T) * sizeof(T);
    std::byte* begin = slot(buffers_.size());
    std::byte* data = place & 1 ? begin + shift : begin + kSlot - size - (place & 64 ? shift : 0);
    std::memset(begin, kFill, kSlot);
    buffers_.push_back({data, size, written, dtype_or_none<T>(), {}});
    return reinterpret_cast<T*>(data);
  }
  // Before the first call: what all of them begin with.
  void keep() {
    for (auto& b : buffers_) b.before.assign(b.data, b.data + b.size);
  }
  void restore() {
    for (auto& b : buffers_) std::copy(b.before.begin(), b.before.end(), b.data);
  }
  // Outputs, one after the other; NaN has one value.
  std::vector<std::byte> results() const {
    std::vector<std::byte> all;
    for (const auto& b : buffers_) {
      if (!b.written) continue;
      const size_t begin = all.size();
      all.insert(all.end(), b.data, b.data + b.size);
      if (b.type == Kind::f32)
        for (size_t i = begin; i + 4 <= all.size(); i += 4) {
          uint32_t bits;
          std::memcpy(&bits, &all[i], 4);
          if ((bits & 0x7fffffff) > 0x7f800000) bits = 0x7fc00000, std::memcpy(&all[i], &bits, 4);
        }
      else if (b.type != Kind::other)
        for (size_t i = begin; i + 2 <= all.size(); i += 2) {
          uint16_t bits;
          std::memcpy(&bits, &all[i], 2);
          if ((bits & 0x7fff) > (b.type == Kind::f16 ? 0x7c00 : 0x7f80)) bits = 0x7fff, std::memcpy(&all[i], &bits, 2);
        }
    }
    return all;
  }
  // Where two of these differ first.
  std::string describe(const std::vector<std::byte>& a, const std::vector<std::byte>& b) const {
    const auto at = static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin());
    size_t begin = 0;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (!buffers_[i].written) continue;
      if (at < begin + buffers_[i].size) return "output " + std::to_string(i) + ", byte " + std::to_string(at - begin);
      begin += buffers_[i].size;
    }
    return "nowhere";
  }
  // Nothing but outputs has changed, and these only if the call was accepted.
  void check(bool accepted) const {
    for (size_t i = 0; i < buffers_.size(); ++i) {
      const auto& b = buffers_[i];
      const std::byte *begin = base_ + i * (kSlot + kGuard), *end = begin + kSlot;
      const auto filled = [](std::byte x) { return x == std::byte{kFill}; };
      if (!std::all_of(begin, static_cast<const std::byte*>(b.data), filled) ||
          !std::all_of(static_cast<const std::byte*>(b.data + b.size), end, filled))
        throw Fault("memory around buffer " + std::to_string(i) + " was written");
      if ((!b.written || !accepted) && !std::equal(b.before.begin(), b.before.end(), b.data))
        throw Fault((b.written ? "output " : "input ") + std::to_string(i) + " was written" + (accepted ? "" : " by a refused call"));
    }
  }

 private:
  static constexpr size_t kSlots = 40;
  static constexpr uint8_t kFill = 0xA5;
  enum class Kind { f32, f16, bf16, other };
  struct Buffer {
    std::byte* data;
    size_t size;
    bool written;
    Kind type;
    std::vector<std::byte> before;
  };
  template <class T> static Kind dtype_or_none() {
    return std::is_same_v<T, float>      ? Kind::f32
           : std::is_same_v<T, Half>     ? Kind::f16
           : std::is_same_v<T, BFloat16> ? Kind::bf16
                                         : Kind::other;
  }
  std::byte* slot(size_t i) { return base_ + i * (kSlot + kGuard); }

  std::byte* base_;
  std::vector<Buffer> buffers_;
};

}  // namespace bnb::fuzz
