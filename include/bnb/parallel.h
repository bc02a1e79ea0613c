// How the library spreads work over threads. By default a pool of its own, as large as the machine; a host program that has a pool
// (torch, TBB, OpenMP) injects it. No result depends on the choice. Threads of the own pool stay awake for 200 us after a call, if each has
// a core, since waking one takes longer than a small product does.
#pragma once

#include <bnb/export.h>

#include <cstdint>

namespace bnb {

// Calls body(context, begin, end) on disjoint ranges that cover [0, count), in any order, on any threads, and returns when all are done.
// Every range except possibly one has at least `grain` items. body does not throw.
using ParallelBody = void (*)(void* context, int64_t begin, int64_t end);
using ParallelFor = void (*)(int64_t count, int64_t grain, ParallelBody body, void* context);

// nullptr: back to the pool of the library. Not to be called while an operation runs.
BNB_API void set_parallel_for(ParallelFor);

// Threads of the library's own pool, the caller's among them; 0: BNB_NUM_THREADS, or as many as the machine has. May be called at any time,
// also while an operation runs, which goes on with the threads it has. Where the system gives fewer threads, fewer do the work. A child of
// fork() makes threads of its own.
BNB_API void set_num_threads(int);

}  // namespace bnb
