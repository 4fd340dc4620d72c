// The C interface on a CPU, named flowrl_host_*: one thread, the kernels' own inline functions. It proves their logic
// where there is no GPU; nothing calls it outside the tests.
#define FLOWRL_NAME(name) flowrl_host_##name
#include "checks.h"

using namespace flowrl;

FLOWRL_API const char* flowrl_host_error_string(int code) { return describe(code); }

FLOWRL_API int flowrl_host_drop_lightest(
    const double* cost, const double* square, int64_t pairs, const double* budget, uint8_t* active, double* spent,
    void* workspace, size_t workspace_bytes, void*) {
  const int code = check_drop_lightest(cost, square, pairs, budget, active, spent, workspace, workspace_bytes);
  if (code != FLOWRL_OK) return code;
  const Units cost_units = make_units(budget[0], pairs), square_units = make_units(budget[1], pairs);
  const int64_t base = key_base(budget[1]);
  Threshold* state = static_cast<Threshold*>(workspace);
  memset(state, 0, sizeof *state);
  for (int level = 0; level < 2; ++level) {
    for (int64_t i = 0; i < pairs; ++i) {
      const int bin = bin_of(key_of(square[i], base), level, state->broken[0]);
      if (bin < 0) continue;
      state->bins[level][0][bin] += in_units(cost[i], cost_units);
      state->bins[level][1][bin] += in_units(square[i], square_units);
    }
    int bin = 0;
    for (; bin < BINS; ++bin) {
      const int64_t next_cost = state->spent[0] + state->bins[level][0][bin];
      const int64_t next_square = state->spent[1] + state->bins[level][1][bin];
      if (!within(next_cost, next_square, cost_units, square_units)) break;
      state->spent[0] = next_cost;
      state->spent[1] = next_square;
    }
    state->broken[level] = bin;
  }
  for (int64_t i = 0; i < pairs; ++i) active[i] = !below(key_of(square[i], base), state->broken);
  spent[0] = static_cast<double>(state->spent[0]) / cost_units.scale;
  spent[1] = static_cast<double>(state->spent[1]) / square_units.scale;
  return FLOWRL_OK;
}

FLOWRL_API int flowrl_host_block_lists(
    const uint8_t* active, int64_t blocks, int64_t tiles, int64_t* block_offsets, int32_t* block_tiles,
    int64_t* tile_offsets, int32_t* tile_blocks, int32_t* tile_slots, void* workspace, size_t workspace_bytes, void*) {
  const int code = check_block_lists(
      active, blocks, tiles, block_offsets, block_tiles, tile_offsets, tile_blocks, tile_slots, workspace,
      workspace_bytes);
  if (code != FLOWRL_OK) return code;
  int32_t* slot_of = static_cast<int32_t*>(workspace);
  int64_t filled = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    block_offsets[block] = filled;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (!active[block * tiles + tile]) continue;
      slot_of[block * tiles + tile] = static_cast<int32_t>(filled);
      block_tiles[filled++] = static_cast<int32_t>(tile);
    }
  }
  block_offsets[blocks] = filled;
  filled = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    tile_offsets[tile] = filled;
    for (int64_t block = 0; block < blocks; ++block) {
      if (!active[block * tiles + tile]) continue;
      tile_slots[filled] = slot_of[block * tiles + tile];
      tile_blocks[filled++] = static_cast<int32_t>(block);
    }
  }
  tile_offsets[tiles] = filled;
  for (; filled < blocks * tiles; ++filled) block_tiles[filled] = tile_blocks[filled] = tile_slots[filled] = -1;
  return FLOWRL_OK;
}
