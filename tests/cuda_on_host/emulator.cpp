#include "cuda_on_host/emulator.h"

#include <algorithm>
#include <boost/context/fiber.hpp>
#include <boost/context/protected_fixedsize_stack.hpp>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define BNB_ASAN 1
#else
#define BNB_ASAN 0
#endif

namespace bnb::emulator {

constinit Self self;

namespace {

namespace context = boost::context;

constexpr uint32_t kLanes = 32;
constexpr size_t kStack = BNB_ASAN ? 256 << 10 : 64 << 10, kGuard = 1024, kAlign = 128;
constexpr std::byte kPoison{0xff}, kCanary{0xa5};

// Where threads wait for one another. When the last arrives, the generation changes and all continue.
struct Gate {
  uint64_t generation = 0;
  uint32_t arrived = 0, needed = 0;
  const char* what = "";
  Where where;
};

struct Copy {
  void* to;
  const void* from;
  uint32_t bytes, valid, group;
};

struct Leave {};  // unwinds a thread of a launch that has failed

struct Thread {
  context::fiber fiber;  // of the thread while it does not run
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  bool begun = false, done = true;
  const Gate* gate = nullptr;  // waits here for the end of `generation`
  uint64_t generation = 0;
  std::vector<Copy> copies;
  uint32_t groups = 0;  // closed so far
};

struct Warp {
  Gate gate;
  alignas(16) std::byte slots[2][kLanes * kSlot];  // alternate, so that a fast lane does not overwrite what a slow one has yet to read
};

struct Machine {
  Order order = Order::forward;
  uint64_t seed = 1, last_blocks = UINT64_MAX;
  std::mt19937_64 random;
  Totals totals;

  const char* kernel = "";
  const std::function<void()>* body = nullptr;
  std::deque<Thread> threads;  // as many as were ever needed
  std::vector<Warp> warps;
  Gate block_gate;     // of all threads of the block
  bool votes[2] = {};  // of barrier_or, by generation
  std::unique_ptr<std::byte[]> memory;
  size_t memory_size = 0;
  std::byte* shared = nullptr;
  uint32_t shared_size = 0, live = 0;
  std::exception_ptr fault;
  bool running = false, opened = false;  // a barrier of the block has, since the last look

  context::fiber scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;

  ~Machine() {
    for (auto& t : threads) release(t);
  }
  void release(Thread& t);
  void switch_to(uint32_t id);
  void resume(Thread& t);
  void yield(Thread& t);
  void start(uint32_t id);
  void run_block(std::vector<uint32_t>& turn);
  bool run_some(std::span<const uint32_t> some);
  void lay_shared();
  void check_canary();
  std::string stuck() const;
};

Machine machine;

std::string text(Position p) {
  return std::string("(").append(std::to_string(p.x) + ", " + std::to_string(p.y) + ", " + std::to_string(p.z) + ")");
}
std::string text(Where w) {
  const std::string_view path = w.file_name();
  return std::string(path.substr(path.rfind('/') + 1)) + ":" + std::to_string(w.line());
}
std::string heading() { return std::string("kernel ") + machine.kernel + ", block " + text(self.block); }
Thread& current() { return machine.threads[self.thread]; }

void Machine::switch_to(uint32_t id) {
  Thread& t = threads[id];
  self.thread = id;
  ++totals.switches;
  resume(t);
}

void Machine::resume(Thread& t) {
#if BNB_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t.stack, t.stack_size);
#endif
  t.fiber = std::move(t.fiber).resume();
#if BNB_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void Machine::yield([[maybe_unused]] Thread& t) {
#if BNB_ASAN
  __sanitizer_start_switch_fiber(&t.fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  scheduler = std::move(scheduler).resume();
#if BNB_ASAN
  __sanitizer_finish_switch_fiber(t.fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

// Fibers live on: between blocks each waits for the next body.
void Machine::start(uint32_t id) {
  context::protected_fixedsize_stack allocator(kStack);
  const auto stack = allocator.allocate();
  Thread& t = threads[id];
  t.stack = static_cast<std::byte*>(stack.sp) - stack.size;
  t.stack_size = stack.size;
  t.fiber =
      context::fiber(std::allocator_arg, context::preallocated(stack.sp, stack.size, stack), allocator, [this, &t](context::fiber&& from) {
        scheduler = std::move(from);
#if BNB_ASAN
        __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
        while (body) {
          try {
            (*body)();
          } catch (const Leave&) {
          } catch (...) {
            if (!fault) fault = std::current_exception();
          }
          t.done = true;
          --live;
          yield(t);
        }
#if BNB_ASAN
        __sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size);
#endif
        return std::move(scheduler);
      });
}

// With no body a fiber returns.
void Machine::release(Thread& t) {
  body = nullptr;
  if (t.fiber) resume(t);
}

// | guard | shared memory | guard |
void Machine::lay_shared() {
  const size_t need = kAlign + kGuard + shared_size + kGuard;
  if (memory_size < need) {
    memory.reset(new std::byte[need]);
    memory_size = need;
  }
#if BNB_ASAN
  __asan_unpoison_memory_region(memory.get(), memory_size);
#endif
  const auto base = reinterpret_cast<uintptr_t>(memory.get()) + kGuard;
  shared = reinterpret_cast<std::byte*>((base + kAlign - 1) / kAlign * kAlign);
  std::memset(shared - kGuard, static_cast<int>(kCanary), kGuard);
  std::memset(shared, static_cast<int>(kPoison), shared_size);
  std::memset(shared + shared_size, static_cast<int>(kCanary), kGuard);
#if BNB_ASAN
  __asan_poison_memory_region(shared - kGuard, kGuard);
  __asan_poison_memory_region(shared + shared_size, kGuard);
#endif
}

void Machine::check_canary() {
#if !BNB_ASAN
  const auto intact = [](std::byte b) { return b == kCanary; };
  for (const auto* zone : {shared - kGuard, shared + shared_size})
    if (const auto* at = std::find_if_not(zone, zone + kGuard, intact); at != zone + kGuard)
      throw Fault(heading() + ": wrote outside its " + std::to_string(shared_size) + " bytes of shared memory, at byte " +
                  std::to_string(at - shared));
#endif
}

// Which threads wait where, when none can continue.
std::string Machine::stuck() const {
  std::string result = ": divergent: ";
  const uint32_t none = self.threads;
  const auto place = [&](uint32_t i) {
    const Thread& t = threads[i];
    return t.done ? std::string("has ended") : std::string("waits at ") + t.gate->what + " " + text(t.gate->where);
  };
  uint32_t begin = 0;
  int parts = 0;
  for (uint32_t i = 1; i <= none; ++i) {
    if (i < none && place(i) == place(begin)) continue;
    if (parts++ == 6) return result + ", ...";
    result += (parts > 1 ? ", thread " : "thread ") + std::to_string(begin) + (i - begin > 1 ? ".." + std::to_string(i - 1) : "") + " " +
              place(begin);
    begin = i;
  }
  return result;
}

// Runs each thread that can continue until it next waits, or until a barrier opens. Returns whether one could.
bool Machine::run_some(std::span<const uint32_t> some) {
  bool moved = false;
  for (const uint32_t i : some) {
    Thread& t = threads[i];
    if (t.done || (!fault && t.gate && t.gate->generation == t.generation)) continue;
    if (fault && !t.begun) {
      t.done = true;
      --live;
      continue;
    }
    t.begun = true;
    switch_to(i);
    moved = true;
    if (opened) break;
  }
  return moved;
}

void Machine::run_block(std::vector<uint32_t>& turn) {
  lay_shared();
  for (auto& warp : warps) warp.gate.arrived = 0;
  block_gate.arrived = 0;
  votes[0] = votes[1] = false;
  live = self.threads;
  for (uint32_t i = 0; i < self.threads; ++i) {
    Thread& t = threads[i];
    t.begun = t.done = false;
    t.gate = nullptr;
    t.copies.clear();
    t.groups = 0;
  }
  while (live) {
    bool moved = false;
    if (order == Order::random) {
      std::shuffle(turn.begin(), turn.end(), random);
      moved = run_some(turn);
    } else {
      // A warp runs until it must wait; when a barrier opens, the first warp of the order starts again.
      for (size_t begin = 0, end = 0; begin < turn.size(); begin = end) {
        while (end < turn.size() && turn[end] / kLanes == turn[begin] / kLanes) ++end;
        while (!opened && run_some(std::span(turn).subspan(begin, end - begin))) moved = true;
        if (std::exchange(opened, false)) break;
      }
    }
    if (!moved && !fault) fault = std::make_exception_ptr(Fault(heading() + stuck()));
  }
  if (fault) std::rethrow_exception(std::exchange(fault, nullptr));
  check_canary();
}

// Waits until `needed` have arrived; the last to arrive runs act and gets true.
template <class F> bool arrive(Gate& gate, uint32_t needed, const char* what, Where where, F&& act) {
  Thread& t = current();
  if (machine.fault) throw Leave{};
  if (gate.arrived == 0) {
    gate.needed = needed;
    gate.what = what;
    gate.where = where;
  } else if (gate.needed != needed || std::strcmp(gate.what, what) != 0 || gate.where.line() != where.line() ||
             std::strcmp(gate.where.file_name(), where.file_name()) != 0) {
    fail(std::string("divergent: at ") + what + " " + text(where) + " while others wait at " + gate.what + " " + text(gate.where), where);
  }
  if (++gate.arrived == needed) {
    act();
    gate.arrived = 0;
    ++gate.generation;
    return true;
  }
  t.gate = &gate;
  t.generation = gate.generation;
  machine.yield(t);
  if (machine.fault) throw Leave{};
  t.gate = nullptr;
  return false;
}

// The thread that opens a barrier of the block does not continue first: the order decides.
void arrive_in_block(const char* what, Where where) {
  Gate& gate = machine.block_gate;
  const auto forget = [&] { machine.votes[(gate.generation + 1) % 2] = false; };
  if (!arrive(gate, self.threads, what, where, forget) || machine.order == Order::random) return;
  machine.opened = true;
  machine.yield(current());
  if (machine.fault) throw Leave{};
}

void land(const Copy& c) {
  std::memcpy(c.to, c.from, c.valid);
  std::memset(static_cast<std::byte*>(c.to) + c.valid, 0, c.bytes - c.valid);
}

}  // namespace

const char* name(Order order) { return order == Order::forward ? "forward" : order == Order::reversed ? "reversed" : "random"; }

void set_order(Order order, uint64_t seed) {
  machine.order = order;
  machine.seed = seed;
}

void run_last_blocks(uint64_t most) { machine.last_blocks = most; }

void for_each_order(const std::function<void(Order)>& body) {
  for (const auto order : kOrders) {
    set_order(order);
    body(order);
  }
  set_order(Order::forward);
}

const Totals& totals() { return machine.totals; }

void fail(const std::string& what, Where where) {
  throw Fault(heading() + ", thread " + std::to_string(self.thread) + ": " + what + " at " + text(where));
}

void run(const char* kernel, Position grid, uint32_t threads, uint32_t shared, const std::function<void()>& body) {
  if (machine.running) throw Fault(std::string("kernel ") + kernel + " launched by kernel " + machine.kernel);
  struct Running {
    Running() { machine.running = true; }
    ~Running() { machine.running = false; }
  } running;
  machine.kernel = kernel;
  machine.body = &body;
  machine.shared_size = shared;
  machine.random.seed(machine.seed);
  while (machine.threads.size() < threads) {
    machine.threads.emplace_back();
    machine.start(static_cast<uint32_t>(machine.threads.size() - 1));
  }
  machine.warps.resize((threads + kLanes - 1) / kLanes);
  self = {.thread = 0, .threads = threads, .block = {}, .grid = grid};
  const auto in_order = [&](uint64_t count) {
    std::vector<uint32_t> turn(count);
    for (uint32_t i = 0; i < count; ++i) turn[i] = machine.order == Order::reversed ? static_cast<uint32_t>(count) - 1 - i : i;
    return turn;
  };
  const uint64_t all = uint64_t{grid.x} * grid.y * grid.z, count = std::min(all, machine.last_blocks);
  auto blocks = in_order(count);
  auto turn = in_order(threads);
  if (machine.order == Order::random) std::shuffle(blocks.begin(), blocks.end(), machine.random);
  ++machine.totals.launches;
  for (const uint32_t i : blocks) {
    const uint64_t b = all - count + i, row = b / grid.x;
    self.block = {static_cast<uint32_t>(b % grid.x), static_cast<uint32_t>(row % grid.y), static_cast<uint32_t>(row / grid.y)};
    machine.run_block(turn);
    ++machine.totals.blocks;
    machine.totals.threads += threads;
  }
}

void barrier(Where where) { arrive_in_block("barrier", where); }

bool barrier_or(bool mine, Where where) {
  const uint64_t now = machine.block_gate.generation;
  machine.votes[now % 2] |= mine;
  arrive_in_block("barrier_or", where);
  return machine.votes[now % 2];
}

std::byte* shared_memory(size_t needed, Where where) {
  if (needed > machine.shared_size)
    fail("asks for " + std::to_string(needed) + " bytes of shared memory, launched with " + std::to_string(machine.shared_size), where);
  return machine.shared;
}

void check_aligned(const void* at, size_t bytes, const char* what, Where where) {
  if (reinterpret_cast<uintptr_t>(at) % bytes) [[unlikely]]
    fail(std::string("misaligned ") + what + " of " + std::to_string(bytes) + " bytes", where);
}

void check_shared(const void* at, size_t bytes, const char* what, Where where) {
  const auto* p = static_cast<const std::byte*>(at);
  if (p < machine.shared || p + bytes > machine.shared + machine.shared_size) [[unlikely]]
    fail(std::string(what) + " outside shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(p - machine.shared) +
             " of " + std::to_string(machine.shared_size),
         where);
  check_aligned(at, bytes, what, where);
}

std::byte* meet(const char* what, const void* mine, size_t bytes, uint32_t needed, Act act, Where where) {
  const uint32_t w = self.thread / kLanes, lanes = std::min(kLanes, self.threads - w * kLanes);
  if (lanes < needed) fail(std::string(what) + " in a warp of " + std::to_string(lanes) + " lanes", where);
  Warp& warp = machine.warps[w];
  std::byte* slots = warp.slots[warp.gate.generation % 2];
  std::memcpy(slots + self.thread % kLanes * kSlot, mine, bytes);
  arrive(warp.gate, lanes, what, where, [&] { act(slots); });
  return slots;
}

void copy_async(void* to, const void* from, uint32_t bytes, uint32_t valid, bool may_wait) {
  const Copy copy{to, from, bytes, valid, current().groups};
  if (!may_wait || machine.order == Order::reversed || (machine.order == Order::random && machine.random() % 2))
    land(copy);
  else
    current().copies.push_back(copy);
}

void copy_commit() { ++current().groups; }

void copy_wait(uint32_t groups_left) {
  Thread& t = current();
  const auto waits = [&](const Copy& c) { return c.group + groups_left < t.groups; };
  for (const Copy& c : t.copies)
    if (waits(c)) land(c);
  std::erase_if(t.copies, waits);
}

}  // namespace bnb::emulator
