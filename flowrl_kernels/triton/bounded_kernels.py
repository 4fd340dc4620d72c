"""Kernels of the bounded backward; their launcher and the plan they follow are in bounded.py.

A *pair* is a row and a vocabulary tile of COLUMNS columns. The active pairs are numbered by tile, then by row: a
pair's number is its *slot*. The slots of each tile are cut into blocks of BLOCK_M, the last one padded, and the
blocks of all tiles numbered on; a slot's *place* is its row of the compact buffers: block BLOCK_M + its number in the
block. A slab of the vocabulary begins at place `base`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowrl_kernels.triton.primitives import LOG2E, activate, matmul_tile, shifted


@triton.jit
def _run_mass(tile_lse, i_row, inside, i_run, num_runs, N, b_lse, b_target, b_logp, slack, TILE: tl.constexpr):
    """`chunked.routing.run_mass`: upper bound of the non-target mass per run of TILE columns. [runs, rows]"""
    p_stat = tile_lse + i_run[:, None].to(tl.int64) * N + i_row[None, :]
    held = (i_run < num_runs)[:, None] & inside[None, :]
    stat = tl.load(p_stat, mask=held, other=float("-inf")).to(tl.float32)
    mass = tl.exp2((stat - b_lse[None, :]) * LOG2E) * (1.0 + slack)
    mass = tl.where(mass > 1.0, 1.0, mass)  # comparisons that leave NaN alone
    b_p = tl.exp2(b_logp * LOG2E)
    mass -= tl.where((b_target // TILE)[None, :] == i_run[:, None], (b_p * (1.0 - slack))[None, :], 0.0)
    mass = tl.where(mass < 0.0, 0.0, mass)
    rest = (1.0 - b_p + slack)[None, :]
    mass = tl.where(mass > rest, rest, mass)
    return tl.where(held, mass, 0.0)


@triton.jit(do_not_specialize=["N", "num_runs", "num_tiles"])
def costs_kernel(
    tile_lse,  # [runs, N] fp16
    lse,  # [N]
    target,  # [N]
    target_logp,  # [N]
    gradient,  # [N]; 0 in rows that take no part
    cost,  # [N, tiles] fp64
    square,  # [N, tiles] fp64
    N,
    num_runs,
    num_tiles,
    slack,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,
    TILE_RUNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`chunked.routing.tile_costs`."""
    num_chunks = tl.cdiv(num_tiles, TILES)
    i_row = tl.program_id(0) // num_chunks * BLOCK_M + tl.arange(0, BLOCK_M)
    tile0 = tl.program_id(0) % num_chunks * TILES
    inside = i_row < N
    b_gradient = tl.load(gradient + i_row, mask=inside, other=0.0)
    live = inside & (b_gradient != 0.0)
    b_lse = tl.load(lse + i_row, mask=inside, other=float("inf"))
    b_target = tl.load(target + i_row, mask=inside, other=0)
    b_logp = tl.load(target_logp + i_row, mask=inside, other=0.0)
    i_run = tile0 * TILE_RUNS + tl.arange(0, TILES * TILE_RUNS)
    mass = _run_mass(tile_lse, i_row, live, i_run, num_runs, N, b_lse, b_target, b_logp, slack, TILE)
    mass = tl.where(live[None, :], mass * b_gradient[None, :], 0.0).to(tl.float64)
    mass = tl.reshape(mass, (TILES, TILE_RUNS, BLOCK_M))
    i_tile = tile0 + tl.arange(0, TILES)
    p_out = i_row[None, :].to(tl.int64) * num_tiles + i_tile[:, None]
    mask = (i_tile < num_tiles)[:, None] & inside[None, :]
    tl.store(cost + p_out, tl.sum(mass, 1), mask=mask)
    tl.store(square + p_out, tl.sum(mass * mass, 1), mask=mask)


@triton.jit(do_not_specialize=["N", "num_runs", "num_tiles"])
def owed_kernel(
    tile_lse,  # [runs, N] fp16
    active,  # [N, tiles] bool
    lse,  # [N]; inf in rows that take no part
    target,  # [N]
    target_logp,  # [N]
    amount,  # [N] what a row has to give away
    out,  # [N, stride_out] of the inputs' dtype
    N,
    num_runs,
    num_tiles,
    stride_out,
    slack,
    DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RUNS: tl.constexpr,
    TILE_RUNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """amount x (mass of each dropped run) / (mass of all runs, or with DROPPED of all dropped ones); 0 elsewhere."""
    i_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i_row < N
    b_lse = tl.load(lse + i_row, mask=inside, other=float("inf"))
    b_target = tl.load(target + i_row, mask=inside, other=0)
    b_logp = tl.load(target_logp + i_row, mask=inside, other=0.0)
    b_amount = tl.load(amount + i_row, mask=inside, other=0.0)
    live = inside & (b_amount != 0.0)
    p_active = active + i_row[None, :].to(tl.int64) * num_tiles
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, num_runs, RUNS):
        i_run = first + tl.arange(0, RUNS)
        mass = _run_mass(tile_lse, i_row, live, i_run, num_runs, N, b_lse, b_target, b_logp, slack, TILE)
        if DROPPED:
            held = (i_run < num_runs)[:, None] & inside[None, :]
            kept = tl.load(p_active + (i_run // TILE_RUNS)[:, None], mask=held, other=1)
            mass = tl.where(kept != 0, 0.0, mass)
        total += tl.sum(mass, 0)
    each = tl.where(total > 0.0, b_amount / total, 0.0)
    for first in range(0, stride_out, RUNS):
        i_run = first + tl.arange(0, RUNS)
        mass = _run_mass(tile_lse, i_row, live, i_run, num_runs, N, b_lse, b_target, b_logp, slack, TILE)
        held = (i_run < num_runs)[:, None] & inside[None, :]
        kept = tl.load(p_active + (i_run // TILE_RUNS)[:, None], mask=held, other=1)
        owed = tl.where(kept != 0, 0.0, mass * each[None, :])
        p_out = out + i_row[None, :].to(tl.int64) * stride_out + i_run[:, None]
        tl.store(p_out, owed.to(out.dtype.element_ty), mask=(i_run < stride_out)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["V", "stride_factor"])
def pairs_kernel(
    x,  # [N, H]
    w,  # [V, H], descriptor or pointer
    bias,  # [V] or None
    block_tile,  # [blocks of the slab] vocabulary tile
    block_slot,  # [blocks of the slab] first slot
    offsets,  # [tiles + 1] first slot of each tile
    slot_row,  # [slots]
    target,  # [N]
    maximum,  # [N] of a row's logits
    over_sum,  # [N] 1 / sum of its exponentials relative to the maximum
    factor,  # [N] logit_scale / temperature
    scale,  # [N] gradient by the products of a logit's row
    pair_factor,  # [N, tiles] what dz of a pair is multiplied by, or None
    dz,  # [places of the slab, COLUMNS], descriptor or pointer
    part_mass,  # [places of the slab, COLUMNS / TILE] fp32: softmax mass, target excluded
    part_bias,  # [blocks of the slab, COLUMNS] fp32: column sums of dz
    V,
    H,
    stride_factor,  # None without pair_factor
    stride_x,
    stride_w,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dz of TILE columns of one block without target entries, rounded and stored, and its sums; 0 where padded.
    What lies wholly past the last column is left as it is."""
    PARTS: tl.constexpr = COLUMNS // TILE
    i_block = tl.program_id(0) // PARTS
    i_part = tl.program_id(0) % PARTS
    i_tile = tl.load(block_tile + i_block).to(tl.int32)
    col0 = i_tile * COLUMNS + i_part * TILE
    if col0 < V:
        i_slot = tl.load(block_slot + i_block) + tl.arange(0, BLOCK_M)
        held = i_slot < tl.load(offsets + i_tile + 1)
        i_row = tl.load(slot_row + i_slot, mask=held, other=0)
        acc = matmul_tile(
            x, w, i_row, col0, 0, V, H, stride_x, stride_w, True, DESCRIPTOR, EVEN_K, BLOCK_M, TILE, BLOCK_K
        )  # fmt: skip
        b_target = tl.load(target + i_row, mask=held, other=0).to(tl.int32)
        b_max = tl.load(maximum + i_row, mask=held, other=float("inf"))
        b_over_sum = tl.load(over_sum + i_row, mask=held, other=0.0)
        b_factor = tl.load(factor + i_row, mask=held, other=1.0)
        b_scale = tl.load(scale + i_row, mask=held, other=0.0)
        if pair_factor is not None:
            b_scale *= tl.load(pair_factor + i_row.to(tl.int64) * stride_factor + i_tile, mask=held, other=0.0)
        i_col = col0 + tl.arange(0, TILE)
        z, _ = activate(acc, bias, i_col, V, b_factor, 1.0, None)
        p = tl.exp2(shifted(z, b_max[:, None])) * b_over_sum[:, None]
        p = tl.where((i_col < V)[None, :] & (i_col[None, :] != b_target[:, None]), p, 0.0)
        i_place = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(part_mass + i_place.to(tl.int64) * PARTS + i_part, tl.sum(p, 1))
        d = p * -b_scale[:, None]
        i_out = i_part * TILE
        if BIAS:
            tl.store(part_bias + i_block.to(tl.int64) * COLUMNS + i_out + tl.arange(0, TILE), tl.sum(d, 0))
        if DESCRIPTOR:
            dz.store([i_block * BLOCK_M, i_out], d.to(dz.dtype))
        else:
            p_dz = dz + i_place[:, None].to(tl.int64) * COLUMNS + (i_out + tl.arange(0, TILE))[None, :]
            tl.store(p_dz, d.to(dz.dtype.element_ty))


@triton.jit
def sums_kernel(
    part,  # [blocks of the slab, WIDTH] fp32
    first_block,  # [tiles of the slab + 1]
    out,  # [tiles of the slab, WIDTH] fp32
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the blocks of each tile, in their order."""
    i_tile = tl.program_id(0)
    begin = tl.load(first_block)
    first, last = tl.load(first_block + i_tile) - begin, tl.load(first_block + i_tile + 1) - begin
    i_width = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for block in range(first, last, BLOCK):
        i_block = block + tl.arange(0, BLOCK)
        p_part = part + i_block[:, None] * WIDTH + i_width[None, :]
        total += tl.sum(tl.load(p_part, mask=(i_block < last)[:, None], other=0.0), 0)
    tl.store(out + i_tile.to(tl.int64) * WIDTH + i_width, total)


@triton.jit
def _put(
    acc, out, row0, num_rows, h0, H, stride_out, spread, width, inverse,
    ADD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """out[row0:, h0:] (+)= (acc - spread / width) inverse."""
    i_row = row0 + tl.arange(0, BLOCK)
    i_h = h0 + tl.arange(0, BLOCK_H)
    if spread is not None:
        acc -= (tl.load(spread + i_h, mask=i_h < H, other=0.0) / width)[None, :]
    if inverse is not None:
        acc *= tl.load(inverse)
    mask = (i_row < num_rows)[:, None] & (i_h < H)[None, :]
    p_out = out + i_row[:, None].to(tl.int64) * stride_out + i_h[None, :]
    if ADD:
        acc += tl.load(p_out, mask=mask, other=0.0)
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _put_halves(
    acc, out, row0, num_rows, h0, H, stride_out, spread, width, inverse,
    ADD: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """`_put`, the right half of a 256-wide tile behind a branch: all at once does not fit the registers."""
    if BLOCK_H == 256:
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK, 2, 128)), (0, 2, 1)))
        _put(left, out, row0, num_rows, h0, H, stride_out, spread, width, inverse, ADD, BLOCK, 128)
        if h0 + 128 < H:
            _put(right, out, row0, num_rows, h0 + 128, H, stride_out, spread, width, inverse, ADD, BLOCK, 128)
    else:
        _put(acc, out, row0, num_rows, h0, H, stride_out, spread, width, inverse, ADD, BLOCK, BLOCK_H)


@triton.jit(do_not_specialize=["V", "num_places", "num_heights"])
def products_kernel(
    dz,  # [places of the slab, COLUMNS], descriptor or pointer
    w,  # [V, H], descriptor or pointer
    block_tile,  # [blocks of the slab]
    out,  # [places of the slab, H] fp32
    num_places,
    V,
    H,
    stride_w,
    num_heights,
    DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dz @ weight of one block over its tile: what each of its pairs adds to dhidden."""
    i_block = tl.program_id(0) // num_heights
    h0 = tl.program_id(0) % num_heights * BLOCK_H
    row0 = i_block * BLOCK_M
    col0 = tl.load(block_tile + i_block).to(tl.int32) * COLUMNS
    i_h = h0 + tl.arange(0, BLOCK_H)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for k in range(0, tl.minimum(V - col0, COLUMNS), BLOCK_K):
        if DESCRIPTOR:
            b_dz = dz.load([row0, k])
            b_w = w.load([col0 + k, h0])
        else:
            i_k = k + tl.arange(0, BLOCK_K)
            i_col = tl.minimum(col0 + i_k, V - 1).to(tl.int64)  # dz is 0 past the last column
            i_place = (row0 + tl.arange(0, BLOCK_M)).to(tl.int64)
            b_dz = tl.load(dz + i_place[:, None] * COLUMNS + i_k[None, :])
            b_w = tl.load(w + i_col[:, None] * stride_w + i_h[None, :], mask=(i_h < H)[None, :], other=0.0)
        acc = tl.dot(b_dz, b_w, acc, input_precision="ieee")
    _put_halves(acc, out, row0, num_places, h0, H, H, None, 1.0, None, False, BLOCK_M, BLOCK_H)


@triton.jit(do_not_specialize=["base", "V"])
def combine_kernel(
    part,  # [places of the slab, H] fp32
    part_mass,  # [places of the slab, COLUMNS / TILE] fp32
    begin,  # [N] first entry of each row in the lists
    end,  # [N] and the one past its last
    entry_tile,  # [entries]
    entry_slot,  # [entries]
    shift,  # [tiles] place of a slot minus the slot
    out,  # [N, H] fp32
    mass,  # [N] fp32
    base,
    V,
    H,
    ADD: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (+)= the parts of a row's pairs, in rising order of tiles; likewise their masses."""
    PARTS: tl.constexpr = COLUMNS // TILE
    num_heights = tl.cdiv(H, BLOCK)
    i_row = (tl.program_id(0) // num_heights).to(tl.int64)
    i_height = tl.program_id(0) % num_heights
    i_h = i_height * BLOCK + tl.arange(0, BLOCK)
    i_part = tl.arange(0, PARTS)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((PARTS,), tl.float32)
    for entry in range(tl.load(begin + i_row).to(tl.int32), tl.load(end + i_row).to(tl.int32)):
        i_tile = tl.load(entry_tile + entry).to(tl.int32)
        place = tl.load(entry_slot + entry) + tl.load(shift + i_tile) - base
        total += tl.load(part + place * H + i_h, mask=i_h < H, other=0.0)
        sums += tl.load(part_mass + place * PARTS + i_part, mask=i_part * TILE < V - i_tile * COLUMNS, other=0.0)
    p_out = out + i_row * H + i_h
    if ADD:
        total += tl.load(p_out, mask=i_h < H, other=0.0)
    tl.store(p_out, total, mask=i_h < H)
    if i_height == 0:
        p_mass = mass + i_row
        b_mass = tl.sum(sums, 0)
        if ADD:
            b_mass += tl.load(p_mass)
        tl.store(p_mass, b_mass)


@triton.jit(do_not_specialize=["base", "V", "num_heights"])
def columns_kernel(
    dz,  # [places of the slab, COLUMNS], descriptor or pointer
    x,  # [N, H]
    lines,  # [tiles of the slab] the longest first
    offsets,  # [tiles + 1] first slot of each tile
    shift,  # [tiles] place of a slot minus the slot
    slot_row,  # [slots]
    by_target,  # [N] rows by rising target
    cuts,  # [runs of TILE + 1] first place in by_target of each run
    target,  # [N]
    target_gradient,  # [N] entry of dlogits at the target
    spread,  # [runs of TILE, H] fp32: what the dropped pairs of each run owe, or None
    inverse,  # [1] or None
    out,  # [V, H] written, or with ADD added to
    base,
    V,
    H,
    stride_x,
    stride_out,
    num_heights,
    ADD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """dweight of BLOCK_C columns: dz^T @ hidden over the active pairs of their tile, in rising order of rows, then
    the rows whose target they are, then what the dropped pairs owe."""
    PARTS: tl.constexpr = COLUMNS // BLOCK_C
    item = tl.program_id(0) // num_heights
    i_tile = tl.load(lines + item // PARTS).to(tl.int32)
    c0 = item % PARTS * BLOCK_C
    col0 = i_tile * COLUMNS + c0
    h0 = tl.program_id(0) % num_heights * BLOCK_H
    i_c = tl.arange(0, BLOCK_C)
    i_h = h0 + tl.arange(0, BLOCK_H)
    i_k = tl.arange(0, BLOCK_K)
    if col0 < V:
        first, last = tl.load(offsets + i_tile).to(tl.int32), tl.load(offsets + i_tile + 1).to(tl.int32)
        place0 = (tl.load(shift + i_tile) - base).to(tl.int32)
        acc = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
        for slot in range(first, last, BLOCK_K):
            # dz is 0 in places without a slot
            i_row = tl.load(slot_row + slot + i_k, mask=slot + i_k < last, other=0).to(tl.int64)
            b_x = tl.load(x + i_row[:, None] * stride_x + i_h[None, :], mask=(i_h < H)[None, :], other=0.0)
            if DESCRIPTOR:
                b_dz = dz.load([place0 + slot, c0])
                acc = tl.dot(b_dz.T, b_x, acc, input_precision="ieee")
            else:
                i_place = (place0 + slot + i_k).to(tl.int64)
                b_dz = tl.load(dz + i_place[None, :] * COLUMNS + (c0 + i_c)[:, None])
                acc = tl.dot(b_dz, b_x, acc, input_precision="ieee")
        i_run = col0 // TILE
        last = tl.load(cuts + i_run + 1).to(tl.int32)
        for place in tl.range(tl.load(cuts + i_run).to(tl.int32), last, BLOCK_K, num_stages=1):  # few; saves registers
            held = place + i_k < last
            i_row = tl.load(by_target + place + i_k, mask=held, other=0)
            b_target = tl.load(target + i_row, mask=held, other=-1)
            b_gradient = tl.load(target_gradient + i_row, mask=held, other=0.0)
            b_d = tl.where((col0 + i_c)[:, None] == b_target[None, :], b_gradient[None, :], 0.0)
            mask = held[:, None] & (i_h < H)[None, :]
            b_x = tl.load(x + i_row[:, None] * stride_x + i_h[None, :], mask=mask, other=0.0)
            acc = tl.dot(b_d.to(b_x.dtype), b_x, acc, input_precision="ieee")
        p_spread = spread
        if spread is not None:
            p_spread += i_run.to(tl.int64) * H
        width = tl.minimum(V - i_run * TILE, TILE).to(tl.float32)
        _put_halves(acc, out, col0, V, h0, H, stride_out, p_spread, width, inverse, ADD, BLOCK_C, BLOCK_H)


@triton.jit(do_not_specialize=["V"])
def finish_kernel(
    acc,  # [N, H] fp32
    w,  # [V, H]
    target,  # [N]; V where the row has none
    target_gradient,  # [N]
    inverse,  # [1] or None
    out,  # [N, H]
    V,
    H,
    stride_w,
    BLOCK: tl.constexpr,
):
    """dhidden of one row: the target's entry added, in its own dtype."""
    i = tl.program_id(0).to(tl.int64)
    b_target = tl.load(target + i)
    b_gradient = tl.load(target_gradient + i)
    width = tl.where(b_target < V, H, 0)
    for h in range(0, H, BLOCK):
        i_h = h + tl.arange(0, BLOCK)
        value = tl.load(acc + i * H + i_h, mask=i_h < H, other=0.0)
        b_w = tl.load(w + b_target * stride_w + i_h, mask=i_h < width, other=0.0)
        value += b_gradient * b_w.to(tl.float32)
        if inverse is not None:
            value *= tl.load(inverse)
        tl.store(out + i * H + i_h, value.to(out.dtype.element_ty), mask=i_h < H)
