#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace bnb {
namespace {

constexpr std::chrono::microseconds kAwake{200};  // as bnb/parallel.h says

// Waits until f() or, at most, for that long without sleeping.
template <class F> void spin_until(bool allowed, F&& f) {
  using Clock = std::chrono::steady_clock;
  if (!allowed) return;
  const auto end = Clock::now() + kAwake;
  while (!f() && Clock::now() < end)
    for (int i = 0; i < 32 && !f(); ++i)
#if defined(__x86_64__)
      __builtin_ia32_pause();
#else
      std::this_thread::yield();
#endif
}

// One job at a time: callers that find the pool busy (another thread, or a body that calls parallel_for) run their job inline.
class Pool {
 public:
  explicit Pool(int threads) : spins_(threads <= static_cast<int>(std::thread::hardware_concurrency())) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (auto& w : workers_) w.join();
  }

  void run(int64_t count, int64_t grain, ParallelBody body, void* context) {
    std::unique_lock<std::mutex> owner(busy_, std::try_to_lock);
    const auto threads = static_cast<int64_t>(workers_.size()) + 1;
    if (!owner || threads == 1) return body(context, 0, count);
    Chunks chunks(count, grain, threads);
    {
      std::lock_guard lock(mutex_);
      chunks_ = &chunks, body_ = body, context_ = context;
      left_.store(static_cast<int>(workers_.size()));
      job_.fetch_add(1);
    }
    wake_.notify_all();
    take_chunks(0);
    const auto done = [this] { return left_.load() == 0; };
    spin_until(spins_, done);
    if (done()) return;
    std::unique_lock lock(mutex_);
    done_.wait(lock, done);
  }

 private:
  void take_chunks(int thread) {
    chunks_->take_share(thread, [this](int64_t begin, int64_t end) { body_(context_, begin, end); });
  }
  void work(int index) {
    for (uint64_t seen = 0;;) {
      const auto called = [&] { return stop_.load() || job_.load() != seen; };
      spin_until(spins_, called);
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, called);
        if (stop_) return;
        seen = job_;
      }
      take_chunks(index);
      if (left_.fetch_sub(1) != 1) continue;
      std::lock_guard lock(mutex_);  // run() looks at left_ under it before it sleeps
      done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_, busy_;
  std::condition_variable wake_, done_;
  const bool spins_;  // each thread has a core
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> job_{0};
  std::atomic<int> left_{0};
  Chunks* chunks_ = nullptr;
  ParallelBody body_ = nullptr;
  void* context_ = nullptr;
};

int default_threads() {
  if (const char* text = std::getenv("BNB_NUM_THREADS"))
    if (const int n = std::atoi(text); n > 0) return std::min(n, 1024);
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

std::mutex g_pool_mutex;
Pool* g_pool = nullptr;
int g_threads = 0;

// The pool is made on first use and never destroyed at exit: joining threads from a static destructor can hang a host program.
Pool& pool() {
  std::lock_guard lock(g_pool_mutex);
  if (!g_pool) g_pool = new Pool(g_threads > 0 ? g_threads : default_threads());
  return *g_pool;
}

void own_parallel_for(int64_t count, int64_t grain, ParallelBody body, void* context) { pool().run(count, grain, body, context); }

std::atomic<ParallelFor> g_parallel_for{own_parallel_for};

}  // namespace

ParallelFor current_parallel_for() { return g_parallel_for.load(std::memory_order_acquire); }

void set_parallel_for(ParallelFor f) { g_parallel_for.store(f ? f : own_parallel_for, std::memory_order_release); }

void set_num_threads(int threads) {
  std::lock_guard lock(g_pool_mutex);
  delete g_pool;
  g_pool = nullptr;
  g_threads = threads;
}

}  // namespace bnb
