// Enough of CUDA to run csrc/routing.cu on a CPU, for tests: every thread of a block is a fiber, blocks run one after
// the other. A barrier that not every live thread reaches ends the process. FLOWRL_EMULATE_REVERSED=1 runs the threads
// of a block from the last to the first: code without races gives the same result.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  memset(memory, value, bytes);
  return cudaSuccess;
}

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

enum class State { ready, at_block, at_warp, done };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  State state = State::ready;
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static std::function<void()> body;
static uint64_t lanes[1024];

inline void wait(State state) {
  Fiber& own = fibers[threadIdx.x];
  own.state = state;
  swapcontext(&own.context, &scheduler);
}

inline void enter() {
  body();
  fibers[threadIdx.x].state = State::done;
}

// Lets [first, last) go on if all that have not ended wait at the same kind of barrier.
inline bool release(unsigned first, unsigned last, State barrier) {
  bool any = false;
  for (unsigned i = first; i < last; ++i) {
    if (fibers[i].state == State::done) continue;
    if (fibers[i].state != barrier) return false;
    any = true;
  }
  for (unsigned i = first; any && i < last; ++i) {
    if (fibers[i].state == barrier) fibers[i].state = State::ready;
  }
  return any;
}

inline void run_block(unsigned threads) {
  const bool reversed = getenv("FLOWRL_EMULATE_REVERSED") != nullptr;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
  }
  for (unsigned ended = 0; ended < threads;) {
    bool moved = false;
    for (unsigned k = 0; k < threads; ++k) {
      const unsigned i = reversed ? threads - 1 - k : k;
      if (fibers[i].state != State::ready) continue;
      threadIdx.x = i;
      swapcontext(&scheduler, &fibers[i].context);
      ended += fibers[i].state == State::done;
      moved = true;
    }
    for (unsigned warp = 0; warp < threads; warp += 32) moved |= release(warp, warp + 32, State::at_warp);
    moved |= release(0, threads, State::at_block);
    if (!moved) {
      fprintf(stderr, "block %u: threads wait at different barriers\n", blockIdx.x);
      abort();
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(unsigned grid, unsigned threads, cudaStream_t, void (*kernel)(Parameters...), Arguments... arguments) {
  if (fibers.size() < threads) fibers.resize(threads);
  body = [=] { kernel(arguments...); };
  gridDim.x = grid;
  blockDim.x = threads;
  for (unsigned block = 0; block < grid; ++block) {
    blockIdx.x = block;
    run_block(threads);
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait(emulated::State::at_block); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int by) {
  memcpy(&emulated::lanes[threadIdx.x], &value, sizeof value);
  emulated::wait(emulated::State::at_warp);
  T other;
  memcpy(&other, &emulated::lanes[threadIdx.x % 32 + by < 32 ? threadIdx.x + by : threadIdx.x], sizeof other);
  emulated::wait(emulated::State::at_warp);
  return other;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  emulated::lanes[threadIdx.x] = vote;
  emulated::wait(emulated::State::at_warp);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= unsigned(emulated::lanes[threadIdx.x / 32 * 32 + lane]) << lane;
  emulated::wait(emulated::State::at_warp);
  return votes;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }

template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}

inline int atomicMin(int* at, int value) {
  const int before = *at;
  if (value < before) *at = value;
  return before;
}
