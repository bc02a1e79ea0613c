// A GPU made of fibers. The threads of a block are fibers of one OS thread; a barrier or a collective of a warp lets the others run until
// all have arrived. Blocks run one after another. Memory of the device is memory of the host, so AddressSanitizer watches it.
//
// What a kernel must not do ends the launch with a Fault that names kernel, block, thread and source line:
//   - threads of a block at different barriers, or at none (left the kernel); lanes of a warp in different collectives, or in none
//   - misaligned vector accesses, asynchronous copies and matrix rows, and such accesses to shared memory outside of it
//   - bytes written next to the block's shared memory (under AddressSanitizer: the access itself, also a read)
// What shows as different bytes, because each launch of a test runs in all three orders (for_each_order):
//   - a missing barrier. In the forward and reversed orders one warp after another runs ahead as far as barriers allow, so that the last
//   one
//     is behind all others; in the seeded random order all warps advance together, lane by lane
//   - reading a copy before waiting for it (copies land as late as allowed, in the reversed order at once, in the random order either way)
//   - shared memory that was never written (it starts as NaN: bytes 0xff)
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>

namespace bnb::emulator {

class Fault : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class Order { forward, reversed, random };
inline constexpr Order kOrders[] = {Order::forward, Order::reversed, Order::random};
const char* name(Order);
void set_order(Order, uint64_t seed = 1);

// Calls body in each order.
void for_each_order(const std::function<void(Order)>& body);

// From now on only the last `most` blocks of each grid run: for tensors too large to process whole.
void run_last_blocks(uint64_t most);

// What has run so far.
struct Totals {
  int64_t launches = 0, blocks = 0, threads = 0, switches = 0;
};
const Totals& totals();

using Where = std::source_location;

struct Position {
  uint32_t x, y, z;
};

// ---- for the names in device.h and ptx.h

// The running thread.
struct Self {
  uint32_t thread = 0, threads = 0;
  Position block{}, grid{};
};
extern constinit Self self;

void run(const char* kernel, Position grid, uint32_t threads, uint32_t shared, const std::function<void()>& body);

void barrier(Where where);
bool barrier_or(bool mine, Where where);
std::byte* shared_memory(size_t needed, Where where);

[[noreturn]] void fail(const std::string& what, Where where);
void check_aligned(const void* at, size_t bytes, const char* what, Where where);
void check_shared(const void* at, size_t bytes, const char* what, Where where);  // inside, and aligned

// A collective of a warp: each lane brings `bytes` at `mine`; the last to arrive calls act(all); all get the slots of all lanes, which stay
// valid until the next collective. At least `needed` lanes must exist.
inline constexpr size_t kSlot = 64;
using Act = void (*)(std::byte* slots);
std::byte* meet(const char* what, const void* mine, size_t bytes, uint32_t needed, Act act, Where where);

template <class T, class F> std::span<T, 32> collective(const char* what, const T& mine, uint32_t needed, F, Where where) {
  static_assert(sizeof(T) == kSlot && std::is_trivially_copyable_v<T> && std::is_empty_v<F>);
  std::byte* slots =
      meet(what, &mine, sizeof(T), needed, [](std::byte* all) { F{}(std::span<T, 32>(reinterpret_cast<T*>(all), 32)); }, where);
  return std::span<T, 32>(reinterpret_cast<T*>(slots), 32);
}

void copy_async(void* to, const void* from, uint32_t bytes, uint32_t valid, bool may_wait);
void copy_commit();
void copy_wait(uint32_t groups_left);

}  // namespace bnb::emulator
