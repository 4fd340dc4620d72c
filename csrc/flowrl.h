/* The C interface of the compiled library. Plain C: no torch, no exceptions, no globals.
 *
 * Every function enqueues its work on `stream` (a cudaStream_t) and returns at once: nothing is allocated, nothing
 * waits. Pointers are device pointers on the current device. Sizes are int64. `workspace` is scratch memory, 16-byte
 * aligned, of at least `*_workspace_size()` bytes; its content before and after means nothing. The result is
 * FLOWRL_OK, one of the codes below, or FLOWRL_CUDA_ERROR + a cudaError_t. Results do not depend on scheduling: sums
 * are taken in a fixed order or over integers, never with floating-point atomics.
 *
 * host.cpp builds the same functions for a CPU, named flowrl_host_*, from the same inline functions (routing.cuh).
 */
#ifndef FLOWRL_H
#define FLOWRL_H

#include <stddef.h>
#include <stdint.h>

#ifndef FLOWRL_NAME
#define FLOWRL_NAME(name) flowrl_##name
#endif

#define FLOWRL_ABI_VERSION 3

#ifdef __cplusplus
#define FLOWRL_API extern "C" __attribute__((visibility("default")))
#else
#define FLOWRL_API
#endif

enum {
  FLOWRL_OK = 0,
  FLOWRL_BAD_SIZE = 1,       /* a negative size */
  FLOWRL_NULL_POINTER = 2,   /* a pointer is null whose array is not empty */
  FLOWRL_SMALL_WORKSPACE = 3,
  FLOWRL_UNALIGNED = 4,      /* the workspace is not 16-byte aligned */
  FLOWRL_TOO_LARGE = 5,      /* more than 2^31 - 1 pairs */
  FLOWRL_CUDA_ERROR = 1000   /* + the cudaError_t of a launch */
};

FLOWRL_API int FLOWRL_NAME(abi_version)(void);

/* A sentence for a code; never null. */
FLOWRL_API const char* FLOWRL_NAME(error_string)(int code);

/* Drop the pairs with the least `square` while the sums of both arrays stay within their budgets (routing.cuh). */
FLOWRL_API int64_t FLOWRL_NAME(drop_lightest_workspace_size)(int64_t pairs); /* bytes, or -code */
FLOWRL_API int FLOWRL_NAME(drop_lightest)(
    const double* cost,   /* [pairs] */
    const double* square, /* [pairs] */
    int64_t pairs,
    const double* budget, /* [2] for the sums of cost and of square */
    uint8_t* active,      /* out [pairs] 0 where the pair is dropped, else 1 */
    double* spent,        /* out [2] what the dropped pairs add up to, rounded up */
    void* workspace,
    size_t workspace_bytes,
    void* stream);

/* The active pairs as lists: by row block (CSR) and by vocabulary tile (CSC). Unused ends of the lists hold -1. */
FLOWRL_API int64_t FLOWRL_NAME(block_lists_workspace_size)(int64_t blocks, int64_t tiles); /* bytes, or -code */
FLOWRL_API int FLOWRL_NAME(block_lists)(
    const uint8_t* active,  /* [blocks, tiles] 0 or not */
    int64_t blocks,
    int64_t tiles,
    int64_t* block_offsets, /* out [blocks + 1]; the last one is the number of active pairs */
    int32_t* block_tiles,   /* out [blocks * tiles] tiles of each row block, rising */
    int64_t* tile_offsets,  /* out [tiles + 1] */
    int32_t* tile_blocks,   /* out [blocks * tiles] row blocks of each tile, rising */
    int32_t* tile_slots,    /* out [blocks * tiles] where the same pair stands in block_tiles */
    void* workspace,
    size_t workspace_bytes,
    void* stream);

#endif
