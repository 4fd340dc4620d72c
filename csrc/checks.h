// Argument checks and workspace sizes, the same for the GPU and the CPU build.
#pragma once

#include "flowrl.h"
#include "routing.cuh"

namespace flowrl {

inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

inline int check_product(int64_t a, int64_t b) {
  if (a < 0 || b < 0) return FLOWRL_BAD_SIZE;
  return a > MAX_COUNT || b > MAX_COUNT || (a > 0 && b > MAX_COUNT / a) ? FLOWRL_TOO_LARGE : FLOWRL_OK;
}

inline int check_workspace(int64_t wanted, const void* workspace, size_t bytes) {
  if (wanted < 0) return static_cast<int>(-wanted);
  if (wanted == 0) return FLOWRL_OK;
  if (workspace == nullptr) return FLOWRL_NULL_POINTER;
  if (bytes < static_cast<size_t>(wanted)) return FLOWRL_SMALL_WORKSPACE;
  return reinterpret_cast<uintptr_t>(workspace) % 16 != 0 ? FLOWRL_UNALIGNED : FLOWRL_OK;
}

template <typename... Pointers>
inline int check_pointers(Pointers... pointers) {
  return ((pointers == nullptr) || ...) ? FLOWRL_NULL_POINTER : FLOWRL_OK;
}

inline int64_t drop_lightest_bytes(int64_t pairs) {
  const int code = check_product(pairs, 1);
  return code != FLOWRL_OK ? -code : static_cast<int64_t>(sizeof(Threshold));
}

inline int64_t block_lists_bytes(int64_t blocks, int64_t tiles) {
  const int code = check_product(blocks, tiles);
  return code != FLOWRL_OK ? -code : blocks * tiles * static_cast<int64_t>(sizeof(int32_t));
}

inline int check_drop_lightest(
    const void* cost, const void* square, int64_t pairs, const void* budget, const void* active, const void* spent,
    const void* workspace, size_t bytes) {
  if (int code = check_product(pairs, 1)) return code;
  if (int code = check_pointers(budget, spent)) return code;
  if (pairs > 0) {
    if (int code = check_pointers(cost, square, active)) return code;
  }
  return check_workspace(drop_lightest_bytes(pairs), workspace, bytes);
}

inline int check_block_lists(
    const void* active, int64_t blocks, int64_t tiles, const void* block_offsets, const void* block_tiles,
    const void* tile_offsets, const void* tile_blocks, const void* tile_slots, const void* workspace, size_t bytes) {
  if (int code = check_product(blocks, tiles)) return code;
  if (int code = check_pointers(block_offsets, tile_offsets)) return code;
  if (blocks > 0 && tiles > 0) {
    if (int code = check_pointers(active, block_tiles, tile_blocks, tile_slots)) return code;
  }
  return check_workspace(block_lists_bytes(blocks, tiles), workspace, bytes);
}

inline const char* describe(int code) {
  switch (code) {
    case FLOWRL_OK: return "no error";
    case FLOWRL_BAD_SIZE: return "a size is negative";
    case FLOWRL_NULL_POINTER: return "a pointer is null whose array is not empty";
    case FLOWRL_SMALL_WORKSPACE: return "the workspace is smaller than its *_workspace_size()";
    case FLOWRL_UNALIGNED: return "the workspace is not 16-byte aligned";
    case FLOWRL_TOO_LARGE: return "more than 2^31 - 1 pairs";
    default: return "unknown error code";
  }
}

}  // namespace flowrl

FLOWRL_API int FLOWRL_NAME(abi_version)(void) { return FLOWRL_ABI_VERSION; }

FLOWRL_API int64_t FLOWRL_NAME(drop_lightest_workspace_size)(int64_t pairs) {
  return flowrl::drop_lightest_bytes(pairs);
}

FLOWRL_API int64_t FLOWRL_NAME(block_lists_workspace_size)(int64_t blocks, int64_t tiles) {
  return flowrl::block_lists_bytes(blocks, tiles);
}
