// Routing of the bounded backward, on the GPU. What is computed stands in routing.cuh; this file only decides which thread does it. Deterministic: atomics are on integers, and only where they add.
#include <cuda_runtime.h>

#include "checks.h"

namespace flowrl {
namespace {

constexpr int WARP = 32;
constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr unsigned ALL = 0xffffffffu;

static_assert(BINS % THREADS == 0, "every thread of a cut takes the same number of bins");

unsigned grid_of(int64_t items, int64_t per_block) { return static_cast<unsigned>(ceil_div(items, per_block)); }

// Grids that stride: enough to fill any card, few enough that each block's histogram is flushed seldom.
unsigned strided_grid(int64_t items) {
  const int64_t wanted = ceil_div(items, THREADS * 4);
  return static_cast<unsigned>(wanted < 1 ? 1 : wanted < 512 ? wanted : 512);
}

__device__ int64_t first_item() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ int64_t item_step() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }
__device__ int64_t warp_item() { return static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP; }

int launched() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? FLOWRL_OK : FLOWRL_CUDA_ERROR + static_cast<int>(error);
}

int fill(void* memory, int value, int64_t bytes, cudaStream_t stream) {
  if (bytes == 0) return FLOWRL_OK;
  const cudaError_t error = cudaMemsetAsync(memory, value, static_cast<size_t>(bytes), stream);
  return error == cudaSuccess ? FLOWRL_OK : FLOWRL_CUDA_ERROR + static_cast<int>(error);
}

// ---- threshold

__global__ void __launch_bounds__(THREADS) histogram(
    const double* cost, const double* square, int64_t pairs, const double* budget, int level, Threshold* state) {
  __shared__ unsigned long long bins[2][BINS];
  for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) bins[i / BINS][i % BINS] = 0;
  __syncthreads();
  const Units cost_units = make_units(budget[0], pairs), square_units = make_units(budget[1], pairs);
  const int64_t base = key_base(budget[1]);
  const int broken = state->broken[0];
  for (int64_t i = first_item(); i < pairs; i += item_step()) {
    const double own = square[i];
    const int bin = bin_of(key_of(own, base), level, broken);
    if (bin < 0) continue;
    const unsigned long long own_cost = in_units(cost[i], cost_units), own_square = in_units(own, square_units);
    if (own_cost != 0) atomicAdd(&bins[0][bin], own_cost);
    if (own_square != 0) atomicAdd(&bins[1][bin], own_square);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * BINS; i += THREADS) {
    const unsigned long long sum = bins[i / BINS][i % BINS];
    if (sum != 0) atomicAdd(&state->bins[level][i / BINS][i % BINS], sum);
  }
}

// One block: the first bin at which the running sums break a budget, and what they are before it.
__global__ void __launch_bounds__(THREADS) cut(
    int64_t pairs, const double* budget, int level, double* spent, Threshold* state) {
  constexpr int OWN = BINS / THREADS;
  __shared__ int64_t sums[2][THREADS];
  __shared__ int first;
  const int t = threadIdx.x;
  const Units units[2] = {make_units(budget[0], pairs), make_units(budget[1], pairs)};
  int64_t before[2] = {state->spent[0], state->spent[1]};
  for (int which = 0; which < 2; ++which) {
    int64_t own = 0;
    for (int i = 0; i < OWN; ++i) own += state->bins[level][which][t * OWN + i];
    sums[which][t] = own;
  }
  if (t == 0) first = BINS;
  __syncthreads();
  for (int step = 1; step < THREADS; step *= 2) {  // inclusive scan
    const int64_t cost = t >= step ? sums[0][t - step] : 0, square = t >= step ? sums[1][t - step] : 0;
    __syncthreads();
    sums[0][t] += cost;
    sums[1][t] += square;
    __syncthreads();
  }
  if (t > 0) {
    before[0] += sums[0][t - 1];
    before[1] += sums[1][t - 1];
  }
  int own_first = BINS;
  for (int i = 0; i < OWN; ++i) {
    const int64_t next_cost = before[0] + static_cast<int64_t>(state->bins[level][0][t * OWN + i]);
    const int64_t next_square = before[1] + static_cast<int64_t>(state->bins[level][1][t * OWN + i]);
    if (!within(next_cost, next_square, units[0], units[1])) {
      own_first = t * OWN + i;
      break;
    }
    before[0] = next_cost;
    before[1] = next_square;
  }
  if (own_first < BINS) atomicMin(&first, own_first);
  __syncthreads();
  const bool mine = first == BINS ? t == THREADS - 1 : own_first == first;
  if (!mine) return;
  state->broken[level] = first;
  for (int which = 0; which < 2; ++which) {
    state->spent[which] = before[which];
    spent[which] = static_cast<double>(before[which]) / units[which].scale;
  }
}

__global__ void __launch_bounds__(THREADS) mark(
    const double* square, int64_t pairs, const double* budget, const Threshold* state, uint8_t* active) {
  const int64_t base = key_base(budget[1]);
  for (int64_t i = first_item(); i < pairs; i += item_step()) {
    active[i] = !below(key_of(square[i], base), state->broken);
  }
}

// ---- lists: a line is a row block (CSR) or a vocabulary tile (CSC)

struct Lines {
  int64_t count;
  int64_t length;
  int64_t line_stride;
  int64_t item_stride;
};

// One warp per line: how many of its pairs are active.
__global__ void __launch_bounds__(THREADS) count_lines(const uint8_t* active, Lines lines, int64_t* offsets) {
  const int64_t line = warp_item();
  if (line >= lines.count) return;
  const int lane = threadIdx.x % WARP;
  int sum = 0;
  for (int64_t i = lane; i < lines.length; i += WARP) {
    sum += active[line * lines.line_stride + i * lines.item_stride] != 0;
  }
  for (int half = WARP / 2; half > 0; half /= 2) sum += __shfl_down_sync(ALL, sum, half);
  if (lane == 0) offsets[line] = sum;
}

// One block per array: counts become offsets, in place; the total goes to offsets[count].
__global__ void __launch_bounds__(THREADS) scan(
    int64_t* block_offsets, int64_t blocks, int64_t* tile_offsets, int64_t tiles) {
  __shared__ int64_t sums[THREADS];
  int64_t* offsets = blockIdx.x == 0 ? block_offsets : tile_offsets;
  const int64_t count = blockIdx.x == 0 ? blocks : tiles;
  const int t = threadIdx.x;
  int64_t carry = 0;
  for (int64_t start = 0; start < count; start += THREADS) {
    const int64_t i = start + t;
    const int64_t own = i < count ? offsets[i] : 0;
    sums[t] = own;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {
      const int64_t left = t >= step ? sums[t - step] : 0;
      __syncthreads();
      sums[t] += left;
      __syncthreads();
    }
    if (i < count) offsets[i] = carry + sums[t] - own;
    carry += sums[THREADS - 1];
    __syncthreads();
  }
  if (t == 0) offsets[count] = carry;
}

// One warp per line: its active items, rising. By row block it notes where each pair went (slot_of); by tile it looks
// that up (slots).
template <bool BY_BLOCK>
__global__ void __launch_bounds__(THREADS) fill_lines(
    const uint8_t* active, Lines lines, const int64_t* offsets, int32_t* list, int32_t* slot_of, int32_t* slots) {
  const int64_t line = warp_item();
  if (line >= lines.count) return;
  const int lane = threadIdx.x % WARP;
  int64_t filled = offsets[line];
  for (int64_t start = 0; start < lines.length; start += WARP) {
    const int64_t i = start + lane;
    const int64_t pair = line * lines.line_stride + i * lines.item_stride;
    const bool on = i < lines.length && active[pair] != 0;
    const unsigned votes = __ballot_sync(ALL, on);
    if (on) {
      const int64_t at = filled + __popc(votes & ((1u << lane) - 1));
      list[at] = static_cast<int32_t>(i);
      if constexpr (BY_BLOCK) slot_of[pair] = static_cast<int32_t>(at);
      else slots[at] = slot_of[pair];
    }
    filled += __popc(votes);
  }
}

}  // namespace
}  // namespace flowrl

using namespace flowrl;

FLOWRL_API const char* flowrl_error_string(int code) {
  return code >= FLOWRL_CUDA_ERROR ? cudaGetErrorString(static_cast<cudaError_t>(code - FLOWRL_CUDA_ERROR))
                                   : describe(code);
}

FLOWRL_API int flowrl_drop_lightest(
    const double* cost, const double* square, int64_t pairs, const double* budget, uint8_t* active, double* spent,
    void* workspace, size_t workspace_bytes, void* stream) {
  const int code = check_drop_lightest(cost, square, pairs, budget, active, spent, workspace, workspace_bytes);
  if (code != FLOWRL_OK) return code;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  Threshold* state = static_cast<Threshold*>(workspace);
  if (int failed = fill(state, 0, sizeof *state, on)) return failed;
  const unsigned grid = strided_grid(pairs);
  for (int level = 0; level < 2; ++level) {
    histogram<<<grid, THREADS, 0, on>>>(cost, square, pairs, budget, level, state);
    if (int failed = launched()) return failed;
    cut<<<1, THREADS, 0, on>>>(pairs, budget, level, spent, state);
    if (int failed = launched()) return failed;
  }
  mark<<<grid, THREADS, 0, on>>>(square, pairs, budget, state, active);
  return launched();
}

FLOWRL_API int flowrl_block_lists(
    const uint8_t* active, int64_t blocks, int64_t tiles, int64_t* block_offsets, int32_t* block_tiles,
    int64_t* tile_offsets, int32_t* tile_blocks, int32_t* tile_slots, void* workspace, size_t workspace_bytes,
    void* stream) {
  const int code = check_block_lists(
      active, blocks, tiles, block_offsets, block_tiles, tile_offsets, tile_blocks, tile_slots, workspace,
      workspace_bytes);
  if (code != FLOWRL_OK) return code;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  if (blocks == 0 || tiles == 0) {
    if (int failed = fill(block_offsets, 0, (blocks + 1) * sizeof(int64_t), on)) return failed;
    return fill(tile_offsets, 0, (tiles + 1) * sizeof(int64_t), on);
  }
  int32_t* slot_of = static_cast<int32_t*>(workspace);
  const Lines by_block = {blocks, tiles, tiles, 1}, by_tile = {tiles, blocks, 1, tiles};
  for (int32_t* list : {block_tiles, tile_blocks, tile_slots}) {
    if (int failed = fill(list, 0xff, blocks * tiles * sizeof(int32_t), on)) return failed;
  }
  count_lines<<<grid_of(blocks, WARPS), THREADS, 0, on>>>(active, by_block, block_offsets);
  if (int failed = launched()) return failed;
  count_lines<<<grid_of(tiles, WARPS), THREADS, 0, on>>>(active, by_tile, tile_offsets);
  if (int failed = launched()) return failed;
  scan<<<2, THREADS, 0, on>>>(block_offsets, blocks, tile_offsets, tiles);
  if (int failed = launched()) return failed;
  fill_lines<true><<<grid_of(blocks, WARPS), THREADS, 0, on>>>(
      active, by_block, block_offsets, block_tiles, slot_of, nullptr);
  if (int failed = launched()) return failed;
  fill_lines<false><<<grid_of(tiles, WARPS), THREADS, 0, on>>>(
      active, by_tile, tile_offsets, tile_blocks, slot_of, tile_slots);
  return launched();
}
