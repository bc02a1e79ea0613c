#include "cpu/runtime/parallel.h"

#include <bnb/error.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

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
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::exception&) {  // no more threads or no memory for them: fewer do the same work
    }
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

constexpr int kMostThreads = 1024;

int default_threads() {
  const char* text = std::getenv("BNB_NUM_THREADS");
  int n = 0;
  if (text && *text) {
    const char* end = text + std::strlen(text);
    const auto [last, error] = std::from_chars(text, end, n);
    if (error != std::errc() || last != end || n < 0)
      throw Error(Errc::invalid_argument,
                  "BNB_NUM_THREADS is \"" + std::string(text) + "\", expected a number of threads, 0 for all cores");
  }
  return n > 0 ? n : static_cast<int>(std::thread::hardware_concurrency());
}

// Guards the pool in use and its size. The pool is made on first use. It is never destroyed at exit, for joining threads from a static
// destructor can hang a host program: the last call that uses it destroys it, after another has taken its place.
constinit std::mutex g_mutex;
constinit union Global {
  std::shared_ptr<Pool> pool;
  constexpr Global() : pool() {}
  ~Global() {}
} g_global;
constinit int g_threads = 0;

std::shared_ptr<Pool> pool() {
  std::lock_guard lock(g_mutex);
  if (!g_global.pool) g_global.pool = std::make_shared<Pool>(std::clamp(g_threads > 0 ? g_threads : default_threads(), 1, kMostThreads));
  return g_global.pool;
}

#if defined(__unix__) || defined(__APPLE__)
// A child of fork() has the calling thread alone. It finds no mutex held by another, and makes a pool of its own: that of the parent, whose
// threads it does not have, is left as it is.
[[maybe_unused]] const int g_at_fork =
    pthread_atfork([] { process_mutex().lock(), g_mutex.lock(); }, [] { g_mutex.unlock(), process_mutex().unlock(); },
                   [] {
                     std::construct_at(&g_global.pool);
                     g_mutex.unlock(), process_mutex().unlock();
                   });
#endif

void own_parallel_for(int64_t count, int64_t grain, ParallelBody body, void* context) { pool()->run(count, grain, body, context); }

std::atomic<ParallelFor> g_parallel_for{own_parallel_for};

}  // namespace

ParallelFor current_parallel_for() { return g_parallel_for.load(std::memory_order_acquire); }

void set_parallel_for(ParallelFor f) { g_parallel_for.store(f ? f : own_parallel_for, std::memory_order_release); }

void set_num_threads(int threads) {
  std::shared_ptr<Pool> old;  // destroyed without the mutex, unless a call still uses it
  std::lock_guard lock(g_mutex);
  old = std::move(g_global.pool);
  g_threads = threads;
}

std::mutex& process_mutex() {
  static constinit std::mutex mutex;
  return mutex;
}

}  // namespace bnb
