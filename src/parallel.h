// parallel_for with a callable: one indirection over the injected function of bnb/parallel.h, no allocation.
#pragma once

#include <bnb/parallel.h>

#include <algorithm>
#include <exception>
#include <type_traits>

namespace bnb {

ParallelFor current_parallel_for();

// Units that a thread takes at once out of a share of `share` units: all of a short share, a quarter of a long one, so that none waits for
// a thread that is late or slow.
inline int64_t chunk_of(int64_t share, int64_t grain) {
  const int64_t chunks = std::clamp<int64_t>(share / grain / 4, 1, 4);
  return share / chunks + (share % chunks != 0);
}

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
