"""Kernels of the bounded backward; their launcher and the plan they follow are in bounded.py.

Rows stand in the plan's order, in blocks of BLOCK_M; a *pair* is a row block and a vocabulary tile of TILE columns. The
active pairs are numbered by tile, then by row block: a pair's number is its *slot*. dz of slot s is rows
[s BLOCK_M, (s + 1) BLOCK_M) of the compact buffer, TILE wide; a slab of the vocabulary begins at slot `base`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowrl_kernels.triton.primitives import LOG2E, activate, matmul_tile, row_factor


@triton.jit(do_not_specialize=["N", "V", "temperature_stride"])
def target_kernel(
    x,  # [N, H]
    w,  # [V, H]
    bias,  # [V] or None
    target,  # [N]; V where the row has none
    temperature,  # [N] or [1]
    lse,  # [N]
    target_logp,  # [N]
    N,
    V,
    H,
    stride_x,
    stride_w,
    temperature_stride,
    logit_scale,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """log p of the targets; -inf in rows without one. By the forward's own matrix instructions, of which only the
    diagonal is used: how tensor cores round then cancels against lse, which a sum in fp32 would not."""
    i_row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i_row < N
    b_target = tl.load(target + i_row, mask=inside, other=V)
    held = inside & (b_target < V)
    i_k = tl.arange(0, BLOCK_K)
    p_x = x + i_row[:, None].to(tl.int64) * stride_x + i_k[None, :]
    p_w = w + b_target[None, :] * stride_w + i_k[:, None]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, H, BLOCK_K):
        b_x = tl.load(p_x, mask=held[:, None] & (i_k[None, :] < H - k), other=0.0)
        b_w = tl.load(p_w, mask=held[None, :] & (i_k[:, None] < H - k), other=0.0)
        acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
        p_x += BLOCK_K
        p_w += BLOCK_K
    diagonal = tl.arange(0, BLOCK)[:, None] == tl.arange(0, BLOCK)[None, :]
    z = tl.sum(tl.where(diagonal, acc, 0.0), 1)
    if bias is not None:
        z += tl.load(bias + b_target, mask=held, other=0.0).to(tl.float32)
    b_temperature = tl.load(temperature + i_row * temperature_stride, mask=inside, other=1.0)
    logp = z * row_factor(b_temperature, logit_scale, None) - tl.load(lse + i_row, mask=inside, other=0.0)
    logp = tl.where(logp > 0.0, 0.0, logp)  # keeps NaN
    tl.store(target_logp + i_row, tl.where(held, logp, float("-inf")), mask=inside)


@triton.jit
def _run_mass(tile_lse, source, inside, i_run, num_runs, N, b_lse, b_target, b_logp, slack, TILE: tl.constexpr):
    """`chunked.routing.run_mass`: upper bound of the non-target mass per run of TILE columns. [runs, rows]"""
    p_stat = tile_lse + i_run[:, None].to(tl.int64) * N + source[None, :]
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


@triton.jit(do_not_specialize=["N", "num_runs"])
def costs_kernel(
    tile_lse,  # [runs, N] fp16
    lse,  # [N]
    target,  # [N]
    target_logp,  # [N]
    gradient,  # [N]; 0 in rows that take no part
    order,  # [N]
    cost,  # [blocks, runs] fp64
    square,  # [blocks, runs] fp64
    N,
    num_runs,
    slack,
    BLOCK_M: tl.constexpr,
    RUNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """`chunked.routing.tile_costs` for tiles of one run."""
    num_chunks = tl.cdiv(num_runs, RUNS)
    i_block = tl.program_id(0) // num_chunks
    i_run = tl.program_id(0) % num_chunks * RUNS + tl.arange(0, RUNS)
    i_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i_row < N
    source = tl.load(order + i_row, mask=inside, other=0)
    b_gradient = tl.load(gradient + source, mask=inside, other=0.0)
    live = inside & (b_gradient != 0.0)
    mass = _run_mass(
        tile_lse, source, live, i_run, num_runs, N, tl.load(lse + source), tl.load(target + source),
        tl.load(target_logp + source), slack, TILE,
    )  # fmt: skip
    mass = tl.where(live[None, :], mass * b_gradient[None, :], 0.0).to(tl.float64)
    p_out = i_block.to(tl.int64) * num_runs + i_run
    tl.store(cost + p_out, tl.sum(mass, 1), mask=i_run < num_runs)
    tl.store(square + p_out, tl.sum(mass * mass, 1), mask=i_run < num_runs)


@triton.jit(do_not_specialize=["N", "num_runs", "block_rows"])
def owed_kernel(
    tile_lse,  # [runs, N] fp16
    order,  # [N]
    active,  # [blocks, runs] bool
    lse,  # [N] and the three below: in the plan's order
    target,  # [N]
    target_logp,  # [N]
    amount,  # [N] what a row has to give away
    out,  # [N, stride_out] of the inputs' dtype
    N,
    num_runs,
    block_rows,
    stride_out,
    slack,
    DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    RUNS: tl.constexpr,
    TILE: tl.constexpr,
):
    """amount x (mass of each dropped run) / (mass of all runs, or with DROPPED of all dropped ones); 0 elsewhere."""
    i_row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = i_row < N
    source = tl.load(order + i_row, mask=inside, other=0)
    b_lse = tl.load(lse + i_row, mask=inside, other=float("inf"))
    b_target = tl.load(target + i_row, mask=inside, other=0)
    b_logp = tl.load(target_logp + i_row, mask=inside, other=0.0)
    b_amount = tl.load(amount + i_row, mask=inside, other=0.0)
    live = inside & (b_amount != 0.0)
    p_active = active + (i_row // block_rows)[None, :].to(tl.int64) * num_runs
    total = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, num_runs, RUNS):
        i_run = first + tl.arange(0, RUNS)
        mass = _run_mass(tile_lse, source, live, i_run, num_runs, N, b_lse, b_target, b_logp, slack, TILE)
        if DROPPED:
            kept = tl.load(p_active + i_run[:, None], mask=(i_run < num_runs)[:, None] & inside[None, :], other=1)
            mass = tl.where(kept != 0, 0.0, mass)
        total += tl.sum(mass, 0)
    each = tl.where(total > 0.0, b_amount / total, 0.0)
    for first in range(0, stride_out, RUNS):
        i_run = first + tl.arange(0, RUNS)
        mass = _run_mass(tile_lse, source, live, i_run, num_runs, N, b_lse, b_target, b_logp, slack, TILE)
        kept = tl.load(p_active + i_run[:, None], mask=(i_run < num_runs)[:, None] & inside[None, :], other=1)
        owed = tl.where(kept != 0, 0.0, mass * each[None, :])
        p_out = out + i_row[None, :].to(tl.int64) * stride_out + i_run[:, None]
        tl.store(p_out, owed.to(out.dtype.element_ty), mask=(i_run < stride_out)[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["N", "V"])
def pairs_kernel(
    x,  # [N, H], descriptor or pointer
    w,  # [V, H], descriptor or pointer
    bias,  # [V] or None
    raster,  # [pairs] the order in which the slab's slots are taken
    slot_block,  # [pairs] row block of each slot
    slot_tile,  # [pairs] vocabulary tile of each slot
    target,  # [N]
    lse,  # [N]; inf in rows that take no part
    factor,  # [N] logit_scale / temperature
    scale,  # [N] gradient by the products of a logit's row; 0 in rows that take no part
    dz,  # [pairs BLOCK_M, TILE], descriptor or pointer
    part_rows,  # [pairs, BLOCK_M] fp32: softmax mass, target excluded
    part_columns,  # [pairs, TILE] fp32: column sums of dz
    N,
    V,
    H,
    stride_x,
    stride_w,
    BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """dz of one active pair without its target entries, rounded and stored, and its sums."""
    slot = tl.load(raster + tl.program_id(0)).to(tl.int32)
    i_block = tl.load(slot_block + slot)
    i_tile = tl.load(slot_tile + slot)
    acc = matmul_tile(
        x, w, i_block * BLOCK_M, i_tile * TILE, N, V, H, stride_x, stride_w, DESCRIPTOR, EVEN_K, BLOCK_M, TILE, BLOCK_K
    )
    i_row = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    i_col = i_tile * TILE + tl.arange(0, TILE)
    inside = i_row < N
    b_target = tl.load(target + i_row, mask=inside, other=0).to(tl.int32)
    b_lse = tl.load(lse + i_row, mask=inside, other=float("inf"))
    b_factor = tl.load(factor + i_row, mask=inside, other=1.0)
    b_scale = tl.load(scale + i_row, mask=inside, other=0.0)
    z, _ = activate(acc, bias, i_col, V, b_factor, 1.0, None)
    p = tl.exp2((z - b_lse[:, None]) * LOG2E)
    p = tl.where((i_col < V)[None, :] & (i_col[None, :] != b_target[:, None]), p, 0.0)
    i_out = slot * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(part_rows + i_out, tl.sum(p, 1))
    d = p * -b_scale[:, None]
    if BIAS:
        tl.store(part_columns + slot * TILE + tl.arange(0, TILE), tl.sum(d, 0))
    if DESCRIPTOR:
        dz.store([slot * BLOCK_M, 0], d.to(dz.dtype))
    else:
        tl.store(dz + i_out[:, None].to(tl.int64) * TILE + tl.arange(0, TILE)[None, :], d.to(dz.dtype.element_ty))


@triton.jit(do_not_specialize=["base"])
def sums_kernel(
    part,  # [pairs, WIDTH] fp32
    begin,  # [lines] first place of each line in its list
    end,  # [lines] and the one past its last
    slots,  # [places] slot of each place, or None where they are the same
    out,  # [lines, WIDTH] fp32, added to
    base,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums over the slots of each line, in the list's order."""
    line = tl.program_id(0)
    first, last = tl.load(begin + line).to(tl.int32), tl.load(end + line).to(tl.int32)
    i_width = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for place in range(first, last, BLOCK):
        i_place = place + tl.arange(0, BLOCK)
        held = i_place < last
        slot = i_place
        if slots is not None:
            slot = tl.load(slots + i_place, mask=held, other=0)
        total += tl.sum(tl.load(part + (slot - base)[:, None] * WIDTH + i_width[None, :], mask=held[:, None]), 0)
    p_out = out + line * WIDTH + i_width
    tl.store(p_out, tl.load(p_out) + total)


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


@triton.jit(do_not_specialize=["base", "N", "V", "num_heights"])
def rows_kernel(
    dz,  # [pairs BLOCK_M, TILE], descriptor or pointer
    w,  # [V, H], descriptor or pointer
    lines,  # [row blocks] longest list first
    begin,  # [row blocks] first place of each row block in the lists
    end,  # [row blocks] and the one past its last
    place_tile,  # [places] vocabulary tile
    place_slot,  # [places]
    out,  # [N, H] fp32
    base,
    N,
    V,
    H,
    stride_w,
    num_heights,
    ADD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """dhidden (+)= dz @ weight over the active pairs of one row block, in rising order of tiles."""
    STEPS: tl.constexpr = TILE // BLOCK_K
    i_block = tl.load(lines + tl.program_id(0) // num_heights).to(tl.int32)
    h0 = tl.program_id(0) % num_heights * BLOCK_H
    i_h = h0 + tl.arange(0, BLOCK_H)
    first, last = tl.load(begin + i_block).to(tl.int32), tl.load(end + i_block).to(tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for step in range(first * STEPS, last * STEPS):
        i_tile = tl.load(place_tile + step // STEPS)
        row0 = (tl.load(place_slot + step // STEPS) - base) * BLOCK_M
        k = step % STEPS * BLOCK_K
        if DESCRIPTOR:
            b_dz = dz.load([row0, k])
            b_w = w.load([i_tile * TILE + k, h0])
        else:
            i_k = k + tl.arange(0, BLOCK_K)
            i_col = tl.minimum(i_tile * TILE + i_k, V - 1).to(tl.int64)  # dz is 0 past the last column
            i_out = (row0 + tl.arange(0, BLOCK_M)).to(tl.int64)
            b_dz = tl.load(dz + i_out[:, None] * TILE + i_k[None, :])
            b_w = tl.load(w + i_col[:, None] * stride_w + i_h[None, :], mask=(i_h < H)[None, :], other=0.0)
        acc = tl.dot(b_dz, b_w, acc, input_precision="ieee")
    _put_halves(acc, out, i_block * BLOCK_M, N, h0, H, H, None, 1.0, None, ADD, BLOCK_M, BLOCK_H)


@triton.jit(do_not_specialize=["base", "N", "V", "num_heights", "num_parts"])
def columns_kernel(
    dz,  # [pairs BLOCK_M, TILE], descriptor or pointer
    x,  # [N, H], descriptor or pointer
    x_rows,  # [N, H], pointer
    lines,  # [tiles of the slab] longest list first
    offsets,  # [tiles + 1] first slot of each tile
    slot_block,  # [slots] row block of each slot
    by_target,  # [N] rows by rising target
    cuts,  # [tiles + 1] first place in by_target of each tile
    target,  # [N]
    target_gradient,  # [N] entry of dlogits at the target
    spread,  # [tiles, H] fp32: what the dropped pairs of each tile owe, or None
    inverse,  # [1] or None
    out,  # [V, H] written, or with ADD added to
    base,
    N,
    V,
    H,
    stride_out,
    num_heights,
    num_parts,
    ADD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """dweight of BLOCK_C columns: dz^T @ hidden over the active pairs of their tile, in rising order of row blocks,
    then the rows whose target they are, then what the dropped pairs owe."""
    STEPS: tl.constexpr = BLOCK_M // BLOCK_K
    item = tl.program_id(0) // num_heights
    i_tile = tl.load(lines + item // num_parts).to(tl.int32)
    c0 = item % num_parts * BLOCK_C
    h0 = tl.program_id(0) % num_heights * BLOCK_H
    i_c = tl.arange(0, BLOCK_C)
    i_h = h0 + tl.arange(0, BLOCK_H)
    i_k = tl.arange(0, BLOCK_K)
    first, last = tl.load(offsets + i_tile).to(tl.int32), tl.load(offsets + i_tile + 1).to(tl.int32)
    acc = tl.zeros((BLOCK_C, BLOCK_H), tl.float32)
    for step in range(first * STEPS, last * STEPS):
        slot = step // STEPS
        k = step % STEPS * BLOCK_K
        row0 = tl.load(slot_block + slot) * BLOCK_M + k
        out0 = (slot - base) * BLOCK_M + k
        if DESCRIPTOR:
            b_dz = dz.load([out0, c0])
            b_x = x.load([row0, h0])
            acc = tl.dot(b_dz.T, b_x, acc, input_precision="ieee")
        else:
            i_row = tl.minimum(row0 + i_k, N - 1).to(tl.int64)  # dz is 0 past the last row
            i_out = (out0 + i_k).to(tl.int64)
            b_dz = tl.load(dz + i_out[None, :] * TILE + (c0 + i_c)[:, None])
            b_x = tl.load(x_rows + i_row[:, None] * H + i_h[None, :], mask=(i_h < H)[None, :], other=0.0)
            acc = tl.dot(b_dz, b_x, acc, input_precision="ieee")
    col0 = i_tile * TILE + c0
    last = tl.load(cuts + i_tile + 1).to(tl.int32)
    for place in tl.range(tl.load(cuts + i_tile).to(tl.int32), last, BLOCK_K, num_stages=2):  # saves registers
        held = place + i_k < last
        i_row = tl.load(by_target + place + i_k, mask=held, other=0)
        b_target = tl.load(target + i_row, mask=held, other=-1)
        b_gradient = tl.load(target_gradient + i_row, mask=held, other=0.0)
        b_d = tl.where((col0 + i_c)[:, None] == b_target[None, :], b_gradient[None, :], 0.0)
        mask = held[:, None] & (i_h < H)[None, :]
        b_x = tl.load(x_rows + i_row[:, None] * H + i_h[None, :], mask=mask, other=0.0)
        acc = tl.dot(b_d.to(b_x.dtype), b_x, acc, input_precision="ieee")
    p_spread = spread
    if spread is not None:
        p_spread += i_tile.to(tl.int64) * H
    width = tl.minimum(V - i_tile * TILE, TILE).to(tl.float32)
    _put_halves(acc, out, col0, V, h0, H, stride_out, p_spread, width, inverse, ADD, BLOCK_C, BLOCK_H)


@triton.jit(do_not_specialize=["V"])
def finish_kernel(
    acc,  # [N, H] fp32, in the plan's order
    w,  # [V, H]
    order,  # [N]
    count,  # [1]
    target,  # [N] in the plan's order
    target_gradient,  # [N] likewise
    inverse,  # [1] or None
    out,  # [N, H]
    V,
    H,
    stride_w,
    BLOCK: tl.constexpr,
):
    """dhidden of one row: the target's entry added, in its own place and dtype; 0 in rows that take no part."""
    i = tl.program_id(0).to(tl.int64)
    live = i < tl.load(count)
    b_target = tl.load(target + i)
    b_gradient = tl.load(target_gradient + i)
    p_out = out + tl.load(order + i) * H
    for h in range(0, H, BLOCK):
        i_h = h + tl.arange(0, BLOCK)
        value = tl.load(acc + i * H + i_h, mask=(i_h < H) & live, other=0.0)
        b_w = tl.load(w + b_target * stride_w + i_h, mask=(i_h < H) & live & (b_target < V), other=0.0)
        value += b_gradient * b_w.to(tl.float32)
        if inverse is not None:
            value *= tl.load(inverse)
        tl.store(p_out + i_h, value.to(out.dtype.element_ty), mask=i_h < H)
