// parallel_for with a callable: one indirection over the injected function of bnb/parallel.h, no allocation.
#pragma once

#include <bnb/parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <type_traits>

namespace bnb {

ParallelFor current_parallel_for();

// Guards what the whole process shares. fork() waits for its holder, so that no child finds it held. Nothing is called under it.
std::mutex& process_mutex();

// The one T of the process, made by the first call and never destroyed, as other threads may still run when the process exits. The guard of
// a static variable would not do: in a child of fork() it may be held for ever, by a thread that the child does not have.
template <class T> T& process_wide() {
  static constinit std::atomic<T*> kept{nullptr};
  T* made = kept.load(std::memory_order_acquire);
  if (made) [[likely]]
    return *made;
  auto mine = std::make_unique<T>();
  if (kept.compare_exchange_strong(made, mine.get(), std::memory_order_acq_rel)) made = mine.release();
  return *made;
}

// A job of `count` units, in at most as many equal shares as there are threads, of which long ones are cut into up to four chunks; each is
// of `grain` units or more, except the last. A thread takes those of its own share first, for it may have their data in its cache since
// the last call, then what others have left, so that none waits for a thread that is late or slow.
class Chunks {
 public:
  Chunks(int64_t count, int64_t grain, int64_t threads) : count_(count) {
    const auto up = [](int64_t a, int64_t b) { return a / b + (a % b != 0); };
    share_ = std::max(grain, up(count, threads));
    chunk_ = std::max(up(share_, std::clamp<int64_t>(share_ / grain / 4, 1, 4)), up(count, kWords * 64));
    chunks_ = up(count, chunk_);
  }
  // take of the share of thread `thread`, from 0 on.
  template <class F> void take_share(int64_t thread, F&& f) {
    const int64_t begin = thread * share_;
    take(begin, std::min(begin + share_, count_), f);
  }
  // f(begin, end) for the chunks of [begin, end), some shares, and after them for others. To be called for every share.
  template <class F> void take(int64_t begin, int64_t end, F&& f) {
    if (begin >= end) return;
    if (chunk_ >= share_) return f(begin, end);
    const int64_t first = begin / chunk_ + (begin % chunk_ != 0);
    for (int64_t i = 0; i < chunks_; ++i) {
      const int64_t c = (first + i) % chunks_;
      const uint64_t bit = uint64_t{1} << c % 64;
      auto& word = taken_[c / 64];
      if ((word.load(std::memory_order_relaxed) & bit) == 0 && (word.fetch_or(bit) & bit) == 0)
        f(c * chunk_, std::min((c + 1) * chunk_, count_));
    }
  }

 private:
  static constexpr int64_t kWords = 16;
  int64_t count_, share_, chunk_, chunks_;
  std::atomic<uint64_t> taken_[kWords] = {};  // a bit a chunk
};

// f(begin, end) over [0, count) in ranges of at least `grain`. Runs inline when one range would do. The first exception of a body is
// rethrown.
template <class F> void parallel_for(int64_t count, int64_t grain, F&& f) {
  if (count <= 0) return;
  if (count <= grain) {
    f(int64_t{0}, count);
    return;
  }
  struct Context {
    std::remove_reference_t<F>* f;
    std::exception_ptr error;
    bool failed = false;
  } context{&f, nullptr, false};
  current_parallel_for()(
      count, grain,
      [](void* c, int64_t begin, int64_t end) {
        auto& x = *static_cast<Context*>(c);
        try {
          (*x.f)(begin, end);
        } catch (...) {
          if (!__atomic_test_and_set(&x.failed, __ATOMIC_ACQ_REL)) x.error = std::current_exception();
        }
      },
      &context);
  if (context.error) std::rethrow_exception(context.error);
}

}  // namespace bnb
