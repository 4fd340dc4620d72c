"""Kernels of `linear_logprob`; their launchers and the plan they follow are in linear_logprob.py.

In both matrix kernels a tile's epilogue runs on 128 columns at a time, the left half of a 256-wide tile and then
the right one behind a branch: the whole of it at once does not fit the registers beside the accumulators.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowrl_kernels.triton.primitives import (
    LN2,
    LOG2E,
    activate,
    matmul_tile,
    raster,
    round_up_fp16,
    row_factor,
    shifted,
)
from flowrl_kernels.triton.several_kernels import pick_ids


@triton.jit
def _store_logits(
    z, logits, i_row, num_live, i_col0, stride_logits,
    DESCRIPTOR: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, TILE] logits to memory; by descriptor also those of the block's rows that take no part."""
    if DESCRIPTOR and STORE == TILE:
        logits.store([tl.min(i_row, 0), i_col0], z)  # staged in shared memory: no registers for a second layout
    else:
        HALF: tl.constexpr = TILE // 2  # at a time: registers, or shared memory to stage them
        left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        if DESCRIPTOR:
            tl.static_assert(STORE == HALF)
            i_row0 = tl.min(i_row, 0)
            logits.store([i_row0, i_col0], left)
            logits.store([i_row0, i_col0 + HALF], right)
        else:
            p_logits = logits + i_row[:, None].to(tl.int64) * stride_logits + (i_col0 + tl.arange(0, HALF))[None, :]
            mask = (i_row < num_live)[:, None]
            tl.store(p_logits, left, mask=mask)
            tl.store(p_logits + HALF, right, mask=mask)


@triton.jit
def _absorb(
    acc, b_max, b_sum, b_dot, b_logit, b_top, b_total, bias, tile_lse, logits, order, i_row, num_live, i_col0, N, V,
    stride_logits, b_target, b_factor, logit_scale, softcap, ids, id_logit, K, STATISTICS: tl.constexpr,
    ENTROPY: tl.constexpr, STATS: tl.constexpr, EVEN_V: tl.constexpr,
    DESCRIPTOR: tl.constexpr, STORE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Take [BLOCK_M, TILE] products into a row's running max, sum, entropy sum, target logit, argmax and logit sum."""
    i_col = i_col0 + tl.arange(0, TILE)
    z, _ = activate(acc, bias, i_col, V, b_factor, logit_scale, softcap)
    held = (b_target >= i_col0) & (b_target < i_col0 + TILE)
    if tl.max(held.to(tl.int32), 0) > 0:
        b_logit += tl.sum(tl.where(i_col[None, :] == b_target[:, None], z, 0.0), 1)
    if ids is not None:
        live = i_row < num_live
        pick_ids(z, ids, id_logit, K, tl.load(order + i_row, mask=live, other=0), live, i_col0, N, TILE)
    if STATISTICS:
        b_total += tl.sum(tl.where((i_col < V)[None, :], z, 0.0), 1)

    # against the tile's own maximum, so that its mass is known however small it is beside the row's
    if not EVEN_V:
        z = tl.where((i_col < V)[None, :], z, float("-inf"))
    # the last split may end before its last tile: no mass there, and nothing is stored
    inside = i_col0 < V
    t_max = tl.where(inside, tl.max(z, 1), float("-inf"))
    t_ref = tl.where(t_max == float("-inf"), 0.0, t_max * LOG2E)
    d = tl.fma(z, LOG2E, -t_ref[:, None])
    e = tl.exp2(d)
    t_sum = tl.where(inside, tl.sum(e, 1), 0.0)
    t_dot = t_sum
    if ENTROPY:
        t_dot = tl.where(inside, tl.sum(tl.maximum(d, -200.0) * e, 1), 0.0)  # e is 0 there: keeps 0 * -inf out
    if STATS:
        lse = tl.fma(tl.log2(t_sum), LN2, t_max)
        # covers the rounding of the fp32 logits; then up to fp16: an upper bound
        lse += (tl.abs(t_ref) + 1.0) * 3.8e-6
        live = (i_row < num_live) & inside
        source = tl.load(order + i_row, mask=live, other=0)
        tl.store(tile_lse + (i_col0 // TILE).to(tl.int64) * N + source, round_up_fp16(lse), mask=live)

    new_max = tl.maximum(b_max, t_max)
    if STATISTICS:
        t_top = tl.min(tl.where(z == t_max[:, None], i_col[None, :], 2147483647), 1)  # the lowest of equal ones
        b_top = tl.where(t_max > b_max, t_top, b_top)
    # maxima are nats and the rest log2 units relative to LOG2E times them, as rounded: the backward does the same
    ref = tl.where(new_max == float("-inf"), 0.0, new_max * LOG2E)
    t_step, b_step = t_max * LOG2E - ref, b_max * LOG2E - ref
    t_scale = tl.exp2(t_step)
    scale = tl.exp2(b_step)
    if ENTROPY:
        t_shift = tl.where(t_sum > 0.0, t_step, 0.0)
        shift = tl.where(b_sum > 0.0, b_step, 0.0)
        b_dot = scale * tl.fma(shift, b_sum, b_dot) + t_scale * tl.fma(t_shift, t_sum, t_dot)
    b_sum = tl.fma(b_sum, scale, t_sum * t_scale)
    if logits is not None:
        _store_logits(
            z, logits, i_row, tl.where(inside, num_live, 0), i_col0, stride_logits, DESCRIPTOR, STORE, BLOCK_M, TILE
        )  # fmt: skip
    return new_max, b_sum, b_dot, b_logit, b_top, b_total


@triton.jit(do_not_specialize=["N", "V", "K", "num_splits", "tiles_per_split", "group_rows", "temperature_stride"])
def forward_kernel(
    x,  # [N, H] compact rows, descriptor or pointer
    w,  # [V, H], descriptor or pointer
    bias,  # [V] or None
    order,  # [N]
    count,  # [1]
    target,  # [N]
    temperature,  # [N] or [1]
    target_logit,  # [N]
    part_max,  # [splits, N] compact rows, nats
    part_sum,  # [splits, N]
    part_dot,  # [splits, N]: sum of (z - max) e, log2 units
    tile_lse,  # [V/128, N] fp16
    logits,  # [N, V rounded up to 128] fp32 compact rows, descriptor, pointer or None: z itself
    ids,  # [K, N] int32, each row's rising, or None
    id_logit,  # [K, N]
    part_top,  # [splits, N] int32 the likeliest id, or None
    part_total,  # [splits, N] sum of the logits
    N,
    V,
    K,
    H,
    stride_x,
    stride_w,
    stride_logits,
    temperature_stride,
    logit_scale,
    softcap,
    num_splits,
    tiles_per_split,
    group_rows,
    ENTROPY: tl.constexpr,
    STATS: tl.constexpr,
    EVEN_V: tl.constexpr,
    STORE: tl.constexpr,  # columns of logits that a descriptor stores at a time
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    num_live = tl.load(count).to(tl.int32)
    num_row_blocks = tl.cdiv(num_live, BLOCK_M)
    num_tiles = tl.cdiv(V, BLOCK_N)
    mine = tl.cdiv(tl.maximum(num_row_blocks * num_splits - tl.program_id(0), 0), tl.num_programs(0))
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_dot = tl.zeros((BLOCK_M,), tl.float32)
    b_logit = tl.zeros((BLOCK_M,), tl.float32)
    b_top = tl.zeros((BLOCK_M,), tl.int32)
    b_total = tl.zeros((BLOCK_M,), tl.float32)
    # items and their tiles in one loop, and that one with the product's: Triton flattens two levels and no third
    for step in tl.range(0, mine * tiles_per_split, flatten=FLATTEN):
        item = tl.program_id(0) + step // tiles_per_split * tl.num_programs(0)
        i_tile = step % tiles_per_split
        i_block, i_split = raster(item, num_row_blocks, num_splits, group_rows)
        first, fresh, done = i_split * tiles_per_split, i_tile == 0, i_tile == tiles_per_split - 1
        col0 = (first + i_tile) * BLOCK_N
        acc = matmul_tile(
            x, w, i_block * BLOCK_M, col0, N, V, H, stride_x, stride_w,
            False, DESCRIPTOR, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        i_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = i_row < num_live
        source = tl.load(order + i_row, mask=live, other=0)
        b_target = tl.load(target + source, mask=live, other=-1).to(tl.int32)
        b_temperature = tl.load(temperature + source * temperature_stride, mask=live, other=1.0)
        b_factor = row_factor(b_temperature, logit_scale, softcap)
        b_max = tl.where(fresh, float("-inf"), b_max)
        b_sum = tl.where(fresh, 0.0, b_sum)
        b_dot = tl.where(fresh, 0.0, b_dot)
        b_logit = tl.where(fresh, 0.0, b_logit)
        if part_top is not None:
            b_top = tl.where(fresh, 2147483647, b_top)
            b_total = tl.where(fresh, 0.0, b_total)
        if BLOCK_N == 2 * TILE:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, TILE)), (0, 2, 1)))
            b_max, b_sum, b_dot, b_logit, b_top, b_total = _absorb(
                left, b_max, b_sum, b_dot, b_logit, b_top, b_total, bias, tile_lse, logits, order, i_row, num_live,
                col0, N, V, stride_logits, b_target, b_factor, logit_scale, softcap, ids, id_logit, K,
                part_top is not None, ENTROPY, STATS, EVEN_V, DESCRIPTOR, STORE, BLOCK_M, TILE,
            )  # fmt: skip
            if col0 + TILE < V:
                b_max, b_sum, b_dot, b_logit, b_top, b_total = _absorb(
                    right, b_max, b_sum, b_dot, b_logit, b_top, b_total, bias, tile_lse, logits, order, i_row,
                    num_live, col0 + TILE, N, V, stride_logits, b_target, b_factor, logit_scale, softcap, ids,
                    id_logit, K, part_top is not None, ENTROPY, STATS, EVEN_V, DESCRIPTOR, STORE, BLOCK_M, TILE,
                )  # fmt: skip
        else:
            tl.static_assert(BLOCK_N == TILE)
            b_max, b_sum, b_dot, b_logit, b_top, b_total = _absorb(
                acc, b_max, b_sum, b_dot, b_logit, b_top, b_total, bias, tile_lse, logits, order, i_row, num_live,
                col0, N, V, stride_logits, b_target, b_factor, logit_scale, softcap, ids, id_logit, K,
                part_top is not None, ENTROPY, STATS, EVEN_V, DESCRIPTOR, STORE, BLOCK_M, TILE,
            )  # fmt: skip

        # masked, not behind a branch: one that does nothing but store keeps the loops from being flattened
        last = tl.minimum(first + tiles_per_split, num_tiles)
        held = (b_target >= first * BLOCK_N) & (b_target < tl.minimum(last * BLOCK_N, V))
        tl.store(target_logit + source, b_logit, mask=live & held & done)
        p_part = i_split.to(tl.int64) * N + i_row
        tl.store(part_max + p_part, b_max, mask=live & done)
        tl.store(part_sum + p_part, b_sum, mask=live & done)
        if ENTROPY:
            tl.store(part_dot + p_part, b_dot, mask=live & done)
        if part_top is not None:
            tl.store(part_top + p_part, b_top, mask=live & done)
            tl.store(part_total + p_part, b_total, mask=live & done)


@triton.jit(do_not_specialize=["N", "V", "K", "num_splits"])
def merge_kernel(
    part_max,
    part_sum,
    part_dot,
    order,
    count,
    target,  # [N]
    logp,  # [N] the target's logit; becomes its log p, -inf where the row has no target here
    lse,  # [2, N] maximum and log of the sum
    entropy,  # [N]
    ids,  # [K, N], or None
    id_logp,  # [K, N] logits; become log p, as logp does, and 0 where ids are below 0
    part_top,  # [splits, N], or None
    part_total,
    argmax,  # [N] int64; -1 for rows that take no part
    mean_logits,  # [N]
    N,
    V,
    K,
    num_splits,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The splits of a row, in one fixed tree: logp, lse and entropy in nats; 0 for rows that take no part."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i_row < N
    live = i_row < tl.load(count)
    source = tl.load(order + i_row, mask=inside, other=0)
    i_split = tl.arange(0, SPLITS)
    held = (i_split < num_splits)[:, None] & live[None, :]
    p_part = i_split[:, None].to(tl.int64) * N + i_row[None, :]
    b_max = tl.load(part_max + p_part, mask=held, other=float("-inf"))  # [SPLITS, BLOCK]
    b_sum = tl.load(part_sum + p_part, mask=held, other=0.0)
    top = tl.max(b_max, 0)
    ref = tl.where(top == float("-inf"), 0.0, top * LOG2E)
    step = b_max * LOG2E - ref[None, :]
    scale = tl.exp2(step)
    total = tl.sum(b_sum * scale, 0)
    log_total = tl.log2(total)
    tl.store(lse + source, tl.where(live, top, 0.0), mask=inside)
    tl.store(lse + N.to(tl.int64) + source, tl.where(live, log_total * LN2, 0.0), mask=inside)
    b_target = tl.load(target + source, mask=inside, other=-1)
    b_logp = (shifted(tl.load(logp + source, mask=inside, other=0.0), top) - log_total) * LN2
    b_logp = tl.where(b_target < V, b_logp, float("-inf"))
    tl.store(logp + source, tl.where(live, b_logp, 0.0), mask=inside)
    if ids is not None:
        for k in range(K):
            p_id = k * N.to(tl.int64) + source
            b_id = tl.load(ids + p_id, mask=inside, other=-1)
            b_logp = (shifted(tl.load(id_logp + p_id, mask=inside, other=0.0), top) - log_total) * LN2
            b_logp = tl.where(b_id < V, b_logp, float("-inf"))
            tl.store(id_logp + p_id, tl.where(live & (b_id >= 0), b_logp, 0.0), mask=inside)
    if part_top is not None:
        b_top = tl.load(part_top + p_part, mask=held, other=2147483647)
        b_top = tl.min(tl.where(b_max == top[None, :], b_top, 2147483647), 0)  # splits by rising columns
        b_top = tl.where(b_top == 2147483647, 0, b_top)  # every logit -inf, or a NaN
        tl.store(argmax + source, tl.where(live, b_top, -1).to(tl.int64), mask=inside)
        mean = tl.sum(tl.load(part_total + p_part, mask=held, other=0.0), 0) / V
        tl.store(mean_logits + source, tl.where(live, mean, 0.0), mask=inside)
    if ENTROPY:
        b_dot = tl.load(part_dot + p_part, mask=held, other=0.0)
        shift = tl.where(b_sum > 0.0, step, 0.0)
        dot = tl.sum(scale * tl.fma(shift, b_sum, b_dot), 0)
        value = (log_total - dot / total) * LN2
        value = tl.where(value < 0.0, 0.0, value)  # rounding only; keeps NaN
        tl.store(entropy + source, tl.where(live, value, 0.0), mask=inside)


@triton.jit
def _store_dlogits(
    acc, dz, part_bias, bias, i_block, i_col0, i_out0, N, V, stride_dz, b_target, b_factor, b_max,
    b_at_target, b_p, b_entropy, logit_scale, softcap,
    ENTROPY: tl.constexpr, BIAS: tl.constexpr, DESCRIPTOR: tl.constexpr, BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[g (1{v=y} - p_v) - g_H p_v (log p_v + H)] dz/d(h W^T + b) of [BLOCK_M, COLUMNS] products, rounded and stored.

    With e_v = 2^x_v the exponential before it is divided by the sum, every factor of the row folded into it:
    e_v (b_p + b_entropy x_v), and b_at_target where v is the target.
    """
    i_col = i_col0 + tl.arange(0, COLUMNS)
    z, bend = activate(acc, bias, i_col, V, b_factor, logit_scale, softcap)
    x = shifted(z, b_max[:, None])
    e = tl.exp2(x)
    d = e * b_p[:, None]
    if ENTROPY:
        d = e * tl.fma(tl.maximum(x, -200.0), b_entropy[:, None], b_p[:, None])  # e is 0 below
    held = (b_target >= i_col0) & (b_target < i_col0 + COLUMNS)
    if tl.max(held.to(tl.int32), 0) > 0:  # rare: a comparison and a choice an element less
        d = tl.where(i_col[None, :] == b_target[:, None], b_at_target[:, None], d)
    if softcap is not None:
        d *= 1.0 - bend * bend
    if BIAS:
        tl.store(part_bias + i_block.to(tl.int64) * stride_dz + i_out0 + tl.arange(0, COLUMNS), tl.sum(d, 0))
    if DESCRIPTOR:
        dz.store([i_block * BLOCK_M, i_out0], d.to(dz.dtype))
    else:
        i_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        p_dz = dz + i_row[:, None].to(tl.int64) * stride_dz + (i_out0 + tl.arange(0, COLUMNS))[None, :]
        tl.store(p_dz, d.to(dz.dtype.element_ty), mask=(i_row < N)[:, None])


@triton.jit(do_not_specialize=["N", "temperature_stride", "stride_lse", "stride_terms"])
def row_terms_kernel(
    order,  # [N]
    count,  # [1]
    target,  # [N]
    temperature,  # [N] or [1]
    lse,  # [2, N] maximum and log of the sum
    at_target,  # [N] gradient of the target's logit, before the row's factor
    entropy,  # [N]
    grad_logp,  # [N]
    grad_entropy,  # [N] or None
    factor,  # [1] power of two, or None
    columns,  # [rows of whole blocks] int32, compact
    terms,  # [4 or 5, rows of whole blocks] compact
    N,
    temperature_stride,
    stride_lse,  # `N` may be a part of the rows
    stride_terms,
    logit_scale,
    softcap,
    BLOCK: tl.constexpr,
):
    """All that dz takes from a row beside its products, once for all of its tiles; of rows that take no part, 0."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = (i_row < N) & (i_row < tl.load(count))
    source = tl.load(order + i_row, mask=live, other=0)
    b_temperature = tl.load(temperature + source * temperature_stride, mask=live, other=1.0)
    b_max = tl.load(lse + source, mask=live, other=float("inf"))  # p = 0 in rows that take no part
    b_log_sum = tl.load(lse + stride_lse.to(tl.int64) + source, mask=live, other=0.0)
    b_scale = row_factor(b_temperature, logit_scale, None)
    if factor is not None:
        b_scale *= tl.load(factor)
    b_at_target = b_scale * tl.load(at_target + source, mask=live, other=0.0)
    b_scale *= tl.exp2(b_log_sum * -LOG2E)
    b_p = tl.load(grad_logp + source, mask=live, other=0.0) * -b_scale
    if grad_entropy is not None:
        b_entropy = tl.load(grad_entropy + source, mask=live, other=0.0) * -b_scale
        b_p += b_entropy * (tl.load(entropy + source, mask=live, other=0.0) - b_log_sum)
        tl.store(terms + 4 * stride_terms + i_row, b_entropy * LN2)
    tl.store(columns + i_row, tl.load(target + source, mask=live, other=-1).to(tl.int32))
    tl.store(terms + i_row, b_max)
    tl.store(terms + stride_terms + i_row, row_factor(b_temperature, logit_scale, softcap))
    tl.store(terms + 2 * stride_terms + i_row, b_at_target)
    tl.store(terms + 3 * stride_terms + i_row, b_p)


@triton.jit
def _row_terms(columns, terms, i_row, stride_terms, ENTROPY: tl.constexpr):
    """What `row_terms_kernel` wrote, of a block of rows."""
    b_p = tl.load(terms + 3 * stride_terms + i_row)
    b_entropy = b_p
    if ENTROPY:  # one vector more than without: registers are full
        b_entropy = tl.load(terms + 4 * stride_terms + i_row)
    b_max, b_factor = tl.load(terms + i_row), tl.load(terms + stride_terms + i_row)
    return tl.load(columns + i_row), b_max, b_factor, tl.load(terms + 2 * stride_terms + i_row), b_p, b_entropy


@triton.jit(do_not_specialize=["N", "V", "group_rows", "col_begin", "col_end"])
def dlogits_kernel(
    x,  # [N, H] compact rows, descriptor or pointer
    w,  # [V, H], descriptor or pointer
    bias,  # [V] or None
    count,  # [1]
    columns,  # [row blocks of BLOCK_M] int32: the target
    terms,  # [4 or 5, row blocks of BLOCK_M] maximum, factor of the logit, of e at the target, of e, of x e
    dz,  # [N, columns of the slab, a multiple of BLOCK_N] compact rows, descriptor or pointer
    part_bias,  # [row blocks, columns of the slab] fp32
    N,
    V,
    H,
    stride_x,
    stride_w,
    logit_scale,
    softcap,
    group_rows,
    col_begin,
    col_end,
    stride_dz,
    stride_terms,
    ENTROPY: tl.constexpr,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """dz of one slab of the vocabulary; rows that take no part get 0, columns past the slab anything."""
    num_row_blocks = tl.cdiv(tl.minimum(tl.load(count).to(tl.int32), N), BLOCK_M)  # N may be a part of the rows
    num_tiles = tl.cdiv(col_end - col_begin, BLOCK_N)
    for item in tl.range(tl.program_id(0), num_row_blocks * num_tiles, tl.num_programs(0), flatten=FLATTEN):
        i_block, i_tile = raster(item, num_row_blocks, num_tiles, group_rows)
        i_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        col0 = col_begin + i_tile * BLOCK_N
        # ahead of the product, where its steps are in the same loop and hide them, and registers are left
        if FLATTEN and softcap is None:
            b_target, b_max, b_factor, b_at_target, b_p, b_entropy = _row_terms(
                columns, terms, i_row, stride_terms, ENTROPY
            )  # fmt: skip
        acc = matmul_tile(
            x, w, i_block * BLOCK_M, col0, N, V, H, stride_x, stride_w,
            False, DESCRIPTOR, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if not FLATTEN or softcap is not None:
            b_target, b_max, b_factor, b_at_target, b_p, b_entropy = _row_terms(
                columns, terms, i_row, stride_terms, ENTROPY
            )  # fmt: skip
        if BLOCK_N == 2 * TILE:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, TILE)), (0, 2, 1)))
            _store_dlogits(
                left, dz, part_bias, bias, i_block, col0, i_tile * BLOCK_N, N, V, stride_dz,
                b_target, b_factor, b_max, b_at_target, b_p, b_entropy, logit_scale, softcap,
                ENTROPY, BIAS, DESCRIPTOR, BLOCK_M, TILE,
            )  # fmt: skip
            _store_dlogits(
                right, dz, part_bias, bias, i_block, col0 + TILE, i_tile * BLOCK_N + TILE, N, V, stride_dz,
                b_target, b_factor, b_max, b_at_target, b_p, b_entropy, logit_scale, softcap,
                ENTROPY, BIAS, DESCRIPTOR, BLOCK_M, TILE,
            )  # fmt: skip
        else:
            tl.static_assert(BLOCK_N == TILE)
            _store_dlogits(
                acc, dz, part_bias, bias, i_block, col0, i_tile * BLOCK_N, N, V, stride_dz,
                b_target, b_factor, b_max, b_at_target, b_p, b_entropy, logit_scale, softcap,
                ENTROPY, BIAS, DESCRIPTOR, BLOCK_M, TILE,
            )  # fmt: skip
    # blocks of rows that take no part: no product
    begin = num_row_blocks * num_tiles
    for item in range(begin + tl.program_id(0), tl.cdiv(N, BLOCK_M) * num_tiles, tl.num_programs(0)):
        i_row = item // num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        i_col = item % num_tiles * BLOCK_N
        zeros = tl.zeros((BLOCK_M, TILE), tl.float32)
        for i_half in tl.static_range(BLOCK_N // TILE):
            i_out = i_col + i_half * TILE + tl.arange(0, TILE)
            if DESCRIPTOR:
                dz.store([item // num_tiles * BLOCK_M, i_col + i_half * TILE], zeros.to(dz.dtype))
            else:
                p_dz = dz + i_row[:, None].to(tl.int64) * stride_dz + i_out[None, :]
                tl.store(p_dz, zeros.to(dz.dtype.element_ty), mask=(i_row < N)[:, None])
            if BIAS:
                tl.store(part_bias + (item // num_tiles).to(tl.int64) * stride_dz + i_out, tl.sum(zeros, 0))
