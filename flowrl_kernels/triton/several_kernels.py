"""Several ids a row in `linear_logprob`: their logits out of the forward's tiles, and their entries into dz."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick_ids(z, ids, id_logit, K, source, live, i_col0, N, TILE: tl.constexpr):
    """The logits of a row's ids among [BLOCK_M, TILE] ones, stored where the ids stand in the row's rising list."""
    low = tl.zeros_like(source).to(tl.int32)
    high = low + K
    while tl.max(high - low, 0) > 0:  # the first id that is not below the tile
        middle = (low + high) // 2
        b_id = tl.load(ids + middle.to(tl.int64) * N + source, mask=live & (low < high), other=0)
        below = (b_id < i_col0) & (low < high)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    i_col = i_col0 + tl.arange(0, TILE)
    more = live & (low < K)
    b_id = tl.load(ids + low.to(tl.int64) * N + source, mask=more, other=2147483647)
    while tl.min(b_id, 0) < i_col0 + TILE:  # one of every row at a time
        here = b_id < i_col0 + TILE
        value = tl.sum(tl.where(i_col[None, :] == b_id[:, None], z, 0.0), 1)
        tl.store(id_logit + low.to(tl.int64) * N + source, value, mask=here)
        low += here.to(tl.int32)
        b_id = tl.load(ids + low.to(tl.int64) * N + source, mask=live & (low < K), other=2147483647)


@triton.jit(do_not_specialize=["N", "K", "col_begin", "col_end"])
def put_ids_kernel(
    order,  # [N]
    count,  # [1]
    ids,  # [rows, K]
    values,  # [rows, K]
    dz,  # [N, columns of the slab] compact rows
    N,
    K,
    stride_dz,
    col_begin,
    col_end,
    BLOCK: tl.constexpr,
    IDS: tl.constexpr,
):
    """Entries of dz at a row's ids, over what is there: those of equal ids are equal."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (i_row < N) & (i_row < tl.load(count))
    source = tl.load(order + i_row, mask=live, other=0)
    for k in range(0, K, IDS):
        i_k = k + tl.arange(0, IDS)
        inside = live[:, None] & (i_k < K)[None, :]
        p_id = source[:, None] * K + i_k[None, :]
        b_id = tl.load(ids + p_id, mask=inside, other=-1)
        here = inside & (b_id >= col_begin) & (b_id < col_end)
        value = tl.load(values + p_id, mask=here, other=0.0)
        p_dz = dz + i_row[:, None].to(tl.int64) * stride_dz + (b_id - col_begin)
        tl.store(p_dz, value.to(dz.dtype.element_ty), mask=here)
