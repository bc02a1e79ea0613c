// parallel_for: every item once, whatever the counts, the callers and the nesting.
#include "cpu/runtime/parallel.h"

#if defined(__linux__)
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

#include "cases/cases.h"

namespace bnb::test {
namespace {

class Parallel : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { set_num_threads(GetParam()); }
  void TearDown() override { set_num_threads(0); }
};
INSTANTIATE_TEST_SUITE_P(Threads, Parallel, ::testing::Values(1, 2, 3, 5, 16), ::testing::PrintToStringParamName());

// Every item exactly once; ranges of at least the grain, except possibly one.
void expect_covers(int64_t count, int64_t grain) {
  std::vector<std::atomic<int>> hits(static_cast<size_t>(count));
  std::atomic<int> small{0};
  parallel_for(count, grain, [&](int64_t begin, int64_t end) {
    if (begin >= end) ++small, ++small;
    if (end - begin < grain) ++small;
    for (int64_t i = begin; i < end; ++i) hits[static_cast<size_t>(i)].fetch_add(1, std::memory_order_relaxed);
  });
  EXPECT_LE(small, 1) << "count " << count << ", grain " << grain;
  for (const auto& h : hits) ASSERT_EQ(h, 1) << "count " << count << ", grain " << grain;
}

TEST_P(Parallel, CoversEveryCount) {
  for (const int64_t count : {0, 1, 2, 3, 7, 8, 63, 64, 65, 1000, 4097})
    for (const int64_t grain : {1, 2, 3, 5, 8, 60, 100, 5000}) expect_covers(count, grain);
}

// Threads and callers that sleep are woken, and those about to.
TEST_P(Parallel, CoversAfterAPauseAndInALongCall) {
  for (int round = 0; round < 10; ++round)
    for (const int pause : {0, 150, 195, 200, 205, 250, 1000}) {
      const std::chrono::microseconds time(pause);
      std::this_thread::sleep_for(time);
      expect_covers(100, 8);
      std::atomic<int64_t> sum{0};
      const auto caller = std::this_thread::get_id();
      parallel_for(16, 4, [&](int64_t begin, int64_t end) {
        if (std::this_thread::get_id() != caller) std::this_thread::sleep_for(time);
        sum += end - begin;
      });
      ASSERT_EQ(sum, 16);
    }
}

TEST_P(Parallel, NothingToDoCallsNothing) {
  for (const int64_t count : {int64_t{0}, int64_t{-1}, std::numeric_limits<int64_t>::min()})
    parallel_for(count, 1, [](int64_t, int64_t) { ADD_FAILURE(); });
}

TEST_P(Parallel, CountsBeyond32Bits) {
  std::atomic<int64_t> sum{0};
  const int64_t count = (int64_t{1} << 40) + 3;
  parallel_for(count, 1 << 20, [&](int64_t begin, int64_t end) { sum += end - begin; });
  EXPECT_EQ(sum, count);
}

TEST_P(Parallel, UsesNoMoreThreadsThanAsked) {
  std::mutex mutex;
  std::set<std::thread::id> threads;
  for (int round = 0; round < 50; ++round)
    parallel_for(1000, 1, [&](int64_t, int64_t) {
      const std::lock_guard lock(mutex);
      threads.insert(std::this_thread::get_id());
    });
  EXPECT_LE(threads.size(), static_cast<size_t>(GetParam()));
}

TEST_P(Parallel, Nested) {
  std::atomic<int64_t> sum{0};
  parallel_for(64, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      parallel_for(100, 7, [&](int64_t b, int64_t e) {
        for (int64_t j = b; j < e; ++j) parallel_for(3, 1, [&](int64_t b3, int64_t e3) { sum += e3 - b3; });
      });
  });
  EXPECT_EQ(sum, 64 * 100 * 3);
}

TEST_P(Parallel, AnExceptionReachesTheCaller) {
  for (int round = 0; round < 20; ++round) {
    try {
      parallel_for(1000, 1, [&](int64_t begin, int64_t end) {
        if (begin <= 500 && 500 < end) throw std::runtime_error("item 500");
      });
      FAIL() << "no exception";
    } catch (const std::runtime_error& e) { EXPECT_STREQ(e.what(), "item 500"); }
    expect_covers(1000, 1);  // the pool goes on
  }
}

TEST_P(Parallel, EveryRangeThrows) {
  EXPECT_THROW(parallel_for(1000, 1, [](int64_t, int64_t) { throw std::logic_error("each"); }), std::logic_error);
  EXPECT_THROW(parallel_for(1, 8, [](int64_t, int64_t) { throw std::logic_error("inline"); }), std::logic_error);
}

TEST_P(Parallel, CallersFromManyThreads) {
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([t] {
      for (int round = 0; round < 50; ++round) expect_covers(500 + t, 1 + round % 9);
    });
  for (auto& c : callers) c.join();
}

// What a body wrote is seen by the caller, without atomics (the thread sanitizer looks on).
TEST_P(Parallel, WritesAreVisibleAfterwards) {
  std::vector<int64_t> items(10000);
  for (int64_t round = 1; round < 50; ++round) {
    parallel_for(10000, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) items[static_cast<size_t>(i)] += round;
    });
    EXPECT_EQ(items.front() + items[5000] + items.back(), 3 * round * (round + 1) / 2);
  }
}

// Each call goes on with the threads that it has.
TEST_P(Parallel, TheNumberOfThreadsChangesDuringCalls) {
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (int t = 0; t < 3; ++t)
    callers.emplace_back([&, t] {
      for (int round = 0; !stop; ++round) expect_covers(300 + t, 1 + round % 5);
    });
  for (int round = 0; round < 100; ++round) set_num_threads(round % (GetParam() + 1));
  stop = true;
  for (auto& c : callers) c.join();
  std::atomic<int64_t> sum{0};
  parallel_for(64, 1, [&](int64_t begin, int64_t end) {  // from within one, too
    set_num_threads(1 + static_cast<int>(begin) % 4);
    parallel_for(10, 1, [&](int64_t b, int64_t e) { sum += (end - begin) * (e - b); });
  });
  EXPECT_EQ(sum, 640);
}

TEST(ParallelEnvironment, ANumberOfThreadsThatIsNoneIsNamed) {
  for (const char* wrong : {"abc", "-2", "4 ", "1e3", "99999999999999999999"}) {
    setenv("BNB_NUM_THREADS", wrong, 1);
    set_num_threads(0);
    try {
      parallel_for(100, 1, [](int64_t, int64_t) {});
      ADD_FAILURE() << wrong << " was accepted";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), Errc::invalid_argument);
      EXPECT_EQ(std::string(e.what()).find("BNB_NUM_THREADS is \"" + std::string(wrong) + "\", expected "), 0u) << e.what();
    }
  }
  for (const char* right : {"", "0", "3", "100000"}) {
    setenv("BNB_NUM_THREADS", right, 1);
    set_num_threads(0);
    expect_covers(100, 1);
  }
  unsetenv("BNB_NUM_THREADS");
  set_num_threads(0);
}

#if defined(__linux__)
// Threads whose stacks find no room are not made, and the others do the work.
TEST_P(Parallel, ThreadsThatCannotBeMade) {
  pthread_attr_t usual, huge;
  pthread_getattr_default_np(&usual);
  pthread_getattr_default_np(&huge);
  ASSERT_EQ(pthread_attr_setstacksize(&huge, size_t{1} << 46), 0);
  ASSERT_EQ(pthread_setattr_default_np(&huge), 0);
  set_num_threads(0);
  set_num_threads(GetParam());
  std::mutex mutex;
  std::set<std::thread::id> threads;
  parallel_for(1000, 1, [&](int64_t, int64_t) {
    const std::lock_guard lock(mutex);
    threads.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(threads.size(), 1u);
  expect_covers(1000, 1);
  EXPECT_EQ(pthread_setattr_default_np(&usual), 0);
  pthread_attr_destroy(&usual), pthread_attr_destroy(&huge);
}

// f() in a child of fork(), which may not return to the test.
template <class F> void expect_in_child(F&& f) {
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(30);
    _exit(f() ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

auto tasks() { return std::distance(std::filesystem::directory_iterator("/proc/self/task"), {}); }

bool adds_up() {
  std::atomic<int64_t> sum{0};
  for (int round = 0; round < 10; ++round) parallel_for(1000, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
  return sum == 10000;
}

// Also while other threads run operations: a child has none of their locks.
TEST_P(Parallel, AChildOfForkHasAPoolOfItsOwn) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the thread sanitizer ends children that make threads";
#endif
  expect_covers(1000, 1);
  std::atomic<bool> stop{false};
  std::vector<std::thread> callers;
  for (int t = 0; t < 2; ++t)
    callers.emplace_back([&, t] {
      for (uint64_t round = 0; !stop; ++round) {
        auto map = normals(round * 2 + static_cast<uint64_t>(t), 256);
        std::ranges::sort(map);
        run_quantize_blockwise<float>(map, normals(1, 300), 32);
        if (t == 0) set_num_threads(GetParam());
      }
    });
  const std::vector<float> map = create_dynamic_map(), x = normals(3, 70000);
  for (int round = 0; round < 5; ++round)
    expect_in_child([&] {
      set_num_threads(GetParam());
      if (!adds_up() || tasks() != GetParam()) return false;
      const auto y = run_quantize_blockwise<float>(map, x, 256);
      set_num_threads(1);
      return adds_up() && tasks() == 1 && y.codes.size() == x.size();
    });
  stop = true;
  for (auto& c : callers) c.join();
  expect_in_child([] { return adds_up(); });  // without set_num_threads
  expect_covers(1000, 1);
}

TEST(ParallelThreads, SomeThatCannotBeMade) {
  if (BNB_TEST_SANITIZED) GTEST_SKIP() << "sanitizers need the address space";
  expect_in_child([] {
    pthread_attr_t attributes;
    pthread_getattr_default_np(&attributes);
    pthread_attr_setstacksize(&attributes, size_t{64} << 20);
    pthread_setattr_default_np(&attributes);
    rlim_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t room = pages * static_cast<rlim_t>(sysconf(_SC_PAGESIZE)) + (rlim_t{64 * 3 + 32} << 20);
    const rlimit limit{room, room};
    setrlimit(RLIMIT_AS, &limit);
    set_num_threads(16);
    return adds_up() && tasks() > 1 && tasks() < 16;
  });
}
#endif

TEST(ParallelInjected, IsUsedAndGivenBack) {
  static std::atomic<int> calls{0};
  set_parallel_for([](int64_t count, int64_t grain, ParallelBody body, void* context) {
    ++calls;
    reversed_parallel_for(count, grain, body, context);
  });
  expect_covers(1000, 7);
  EXPECT_EQ(calls, 1);
  expect_covers(5, 7);  // one range: no need to ask
  EXPECT_EQ(calls, 1);
  EXPECT_THROW(parallel_for(10, 1, [](int64_t, int64_t) { throw std::logic_error("injected"); }), std::logic_error);
  set_parallel_for(nullptr);
  expect_covers(1000, 7);
  EXPECT_EQ(calls, 2);
}

// Operations from several threads at once, one of them with other maps: each gets its own result.
TEST(ParallelOperations, FromManyThreads) {
  set_num_threads(3);
  const auto x = normals(1, 70000);
  const auto map = create_dynamic_map();
  const auto four = reference::quantize_4bit(QuantType::nf4, x, 64);
  const auto eight = reference::quantize_blockwise(reference::Nearest(map), x, 256);
  std::vector<std::thread> callers;
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&, t] {
      for (uint64_t round = 0; round < 5; ++round) {
        EXPECT_QUANTIZED(run_quantize_4bit(QuantType::nf4, x, 64), four);
        EXPECT_QUANTIZED(run_quantize_blockwise<float>(map, x, 256), eight);
        auto other = normals(round * 4 + static_cast<uint64_t>(t), 256);
        std::ranges::sort(other);
        const std::vector<float> part(x.begin(), x.begin() + 3000);
        EXPECT_QUANTIZED(run_quantize_blockwise<float>(other, part, 256),
                         reference::quantize_blockwise(reference::Nearest(other), part, 256));
      }
    });
  for (auto& c : callers) c.join();
  set_num_threads(0);
}

}  // namespace
}  // namespace bnb::test
