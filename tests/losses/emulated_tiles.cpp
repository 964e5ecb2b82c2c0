// The CUDA kernels on a CPU: the same bodies, the threads of a block in several of the orders that a GPU may choose.
// Between two barriers every order must give the same, so tests that run several of them find races: in step, where all
// threads do one part after another, and ahead, where each thread runs to its next barrier before another one starts.
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/bodies.h"

namespace tdro_tiles {

enum Order { kRising = 0, kFalling = 1, kRandom = 2, kAhead = 3, kAheadFalling = 4 };

static std::mt19937 randomness(0);
static int order = kRising;

static std::vector<int> threads_in_order() {
  std::vector<int> threads(kThreads);
  std::iota(threads.begin(), threads.end(), 0);
  if (order == kFalling || order == kAheadFalling) std::reverse(threads.begin(), threads.end());
  if (order == kRandom) std::shuffle(threads.begin(), threads.end(), randomness);
  return threads;
}

struct BlockInStep {
  template <class State>
  struct PerThread {
    std::vector<State> states = std::vector<State>(kThreads);
    State& of(int thread) { return states[thread]; }
  };

  int64_t index;
  LogSum* shared;

  template <class Each>
  void each(Each each) const {
    for (const int thread : threads_in_order()) each(thread);
  }
  void barrier() const { asm volatile("" ::: "memory"); }
};

// All threads of a block as coroutines.
struct Fibers {
  static constexpr size_t kStack = 1 << 16;
  ucontext_t outside;
  std::vector<ucontext_t> contexts = std::vector<ucontext_t>(kThreads);
  std::vector<char> stacks = std::vector<char>(kThreads * kStack);
  std::vector<bool> ended = std::vector<bool>(kThreads);
  void (*run)(Fibers&, int);
  const void* arguments;

  static void enter(unsigned high, unsigned low, int thread) {
    Fibers& fibers = *reinterpret_cast<Fibers*>(uintptr_t(high) << 32 | low);
    fibers.run(fibers, thread);
    fibers.ended[thread] = true;
  }

  void run_all(void (*function)(Fibers&, int), const void* given) {
    run = function, arguments = given;
    for (int thread = 0; thread < kThreads; ++thread) {
      ucontext_t& context = contexts[thread];
      getcontext(&context);
      context.uc_stack = {&stacks[thread * kStack], 0, kStack};
      context.uc_link = &outside;
      ended[thread] = false;
      const uintptr_t self = reinterpret_cast<uintptr_t>(this);
      makecontext(&context, reinterpret_cast<void (*)()>(enter), 3, unsigned(self >> 32), unsigned(self), thread);
    }
    while (!ended[0]) {
      for (const int thread : threads_in_order()) swapcontext(&outside, &contexts[thread]);
      if (std::count(ended.begin(), ended.end(), ended[0]) == kThreads) continue;
      std::fputs("not all threads of a block reach the same barriers\n", stderr);
      std::abort();
    }
  }
};

struct BlockAhead {
  template <class State>
  struct PerThread {
    State state;
    State& of(int) { return state; }
  };

  int64_t index;
  LogSum* shared;
  Fibers* fibers;
  int thread;

  template <class Each>
  void each(Each each) const {
    each(thread);
  }
  void barrier() const { swapcontext(&fibers->contexts[thread], &fibers->outside); }
};

template <class Body>
int launch(int64_t blocks, const Body& body, void*) {
  static Fibers fibers;
  const LogSum poison{NAN, NAN};  // shared memory is undefined at first
  for (int64_t k = 0; k < blocks; ++k) {
    const int64_t index = order == kFalling || order == kAheadFalling ? blocks - 1 - k : k;
    std::vector<LogSum> shared(Body::kShared, poison);
    if (order < kAhead) {
      BlockInStep block{index, shared.data()};
      body(block);
      continue;
    }
    struct Arguments {
      const Body& body;
      int64_t index;
      LogSum* shared;
    } arguments{body, index, shared.data()};
    fibers.run_all(
        [](Fibers& self, int thread) {
          const Arguments& given = *static_cast<const Arguments*>(self.arguments);
          BlockAhead block{given.index, given.shared, &self, thread};
          given.body(block);
        },
        &arguments);
  }
  return 0;
}

}  // namespace tdro_tiles

#include "cuda/entry.h"

extern "C" const char* tdro_cuda_error(int) { return "emulated"; }

extern "C" __attribute__((visibility("default"))) void order_threads(int order) { tdro_tiles::order = order; }
