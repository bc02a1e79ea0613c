// The names of src/cuda/device/device.cuh on the host.
#pragma once

#include <cstring>

#include "cuda_on_host/emulator.h"

#define BNB_KERNEL(threads, blocks) void
#define BNB_DEVICE inline
#define BNB_HD inline
#define BNB_TABLE inline constexpr
#define BNB_UNROLL
#define BNB_KEEP_LOOP
#ifndef BNB_ARCH
#define BNB_ARCH 90
#endif

namespace bnb::cuda::dev {

using emulator::Where;

// The result of device(); tests may change it between launches.
extern Device emulated;

inline unsigned thread() { return emulator::self.thread; }
inline unsigned threads() { return emulator::self.threads; }
inline unsigned lane() { return thread() % kWarp; }
inline unsigned warp() { return thread() / kWarp; }
inline Dim block() { return {emulator::self.block.x, emulator::self.block.y, emulator::self.block.z}; }
inline Dim grid() { return {emulator::self.grid.x, emulator::self.grid.y, emulator::self.grid.z}; }

inline void barrier(Where where = Where::current()) { emulator::barrier(where); }
inline bool barrier_or(bool x, Where where = Where::current()) { return emulator::barrier_or(x, where); }

struct alignas(8) Word {
  uint64_t bits[8];
};
template <class T> Word word_of(const T& v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Word w{};
  std::memcpy(w.bits, &v, sizeof v);
  return w;
}
template <class T> T value_of(const Word& w) {
  T v;
  std::memcpy(&v, w.bits, sizeof v);
  return v;
}
inline void warp_barrier(Where where = Where::current()) {
  emulator::collective("warp barrier", Word{}, 1, [](std::span<Word, 32>) {}, where);
}
template <class T> T exchange(const char* what, T v, unsigned from, Where where) {
  const auto all = emulator::collective(what, word_of(v), 1, [](std::span<Word, 32>) {}, where);
  if (thread() / kWarp * kWarp + from >= threads()) emulator::fail(std::string(what) + " from a lane that does not exist", where);
  return value_of<T>(all[from]);
}
template <class T> T shuffle(T v, unsigned from, Where where = Where::current()) { return exchange("shuffle", v, from % kWarp, where); }
template <class T> T shuffle_xor(T v, unsigned mask, Where where = Where::current()) {
  const unsigned from = lane() ^ mask;
  return exchange("shuffle_xor", v, from < kWarp ? from : lane(), where);
}
inline uint32_t ballot(bool x, Where where = Where::current()) {
  const auto count = [](std::span<Word, 32> all) {
    uint32_t mask = 0;
    const unsigned first = thread() / kWarp * kWarp;
    for (unsigned i = 0; i < kWarp && first + i < threads(); ++i) mask |= static_cast<uint32_t>(all[i].bits[0]) << i;
    all[0].bits[1] = mask;
  };
  return static_cast<uint32_t>(emulator::collective("ballot", word_of(uint64_t{x}), 1, count, where)[0].bits[1]);
}
inline bool any(bool x, Where where = Where::current()) { return ballot(x, where) != 0; }

template <class T> T& shared(Where where = Where::current()) { return *reinterpret_cast<T*>(emulator::shared_memory(sizeof(T), where)); }

template <class T> T atomic_add(T* at, T v, Where where = Where::current()) {
  emulator::check_aligned(at, sizeof(T), "atomic_add", where);
  const T old = *at;
  *at = old + v;
  return old;
}
template <class T> T atomic_max(T* at, T v, Where where = Where::current()) {
  emulator::check_aligned(at, sizeof(T), "atomic_max", where);
  const T old = *at;
  *at = old < v ? v : old;
  return old;
}
template <class T> T atomic_or(T* at, T v, Where where = Where::current()) {
  emulator::check_aligned(at, sizeof(T), "atomic_or", where);
  const T old = *at;
  *at = old | v;
  return old;
}

template <class... P, class... A> void launch(const Launch& l, void (*kernel)(P...), const A&... arguments) {
  check_launch(l, device());
  [&](const P&... p) { emulator::run(l.op, {l.grid.x, l.grid.y, l.grid.z}, l.threads, l.shared, [&] { kernel(p...); }); }(arguments...);
}

}  // namespace bnb::cuda::dev
