"""Kernels of `linear_logprob` over listed ids; their launchers are in linear_logprob_kept.py.

An *entry* is a row and one id of its set. Entries are numbered by row, then by id; a row's are those from edges[row]
up to edges[row + 1]. Nothing here is a matrix product: each row of the head meets one row of hidden states.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowrl_kernels.triton.primitives import LN2, LOG2E, row_factor, shifted, tanh


@triton.jit(do_not_specialize=["N", "temperature_stride"])
def dots_kernel(
    x,  # [N, H]
    w,  # [V, H]
    bias,  # [V] or None
    temperature,  # [N] or [1]
    part_row,  # [programs] N where there is nothing to do
    first_part,  # [N + 1]
    edges,  # [N + 1]
    columns,  # [E]
    z,  # [E] fp32
    N,
    H,
    stride_x,
    stride_w,
    temperature_stride,
    logit_scale,
    softcap,
    PART: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The logits of up to PART entries of one row."""
    i_row = tl.load(part_row + tl.program_id(0))
    if i_row < N:
        begin = tl.load(edges + i_row) + (tl.program_id(0) - tl.load(first_part + i_row)) * PART
        i_entry = begin + tl.arange(0, PART)
        held = i_entry < tl.load(edges + i_row + 1)
        i_col = tl.load(columns + i_entry, mask=held, other=0)
        p_x = x + i_row * stride_x
        p_w = w + i_col[:, None] * stride_w
        acc = tl.zeros((PART, BLOCK_H), tl.float32)
        for h in range(0, H, BLOCK_H):
            i_h = h + tl.arange(0, BLOCK_H)
            b_x = tl.load(p_x + i_h, mask=i_h < H, other=0.0).to(tl.float32)
            b_w = tl.load(p_w + i_h[None, :], mask=held[:, None] & (i_h < H)[None, :], other=0.0).to(tl.float32)
            acc = tl.fma(b_w, b_x[None, :], acc)
        b_z = tl.sum(acc, 1)
        if bias is not None:
            b_z += tl.load(bias + i_col, mask=held, other=0.0).to(tl.float32)
        if softcap is not None:
            b_z = tanh(b_z * (logit_scale / softcap))
        b_z *= row_factor(tl.load(temperature + i_row * temperature_stride), logit_scale, softcap)
        tl.store(z + i_entry, b_z, mask=held)


@triton.jit(do_not_specialize=["N"])
def softmax_kernel(
    z,  # [E]
    edges,  # [N + 1]
    of_target,  # [N] -1 where the row has no target here
    logp,  # [N]
    lse,  # [2, N] maximum and log of the sum
    entropy,  # [N] or None
    N,
    BLOCK: tl.constexpr,
):
    """One row's log-sum-exp, target and entropy in nats, a block of its entries at a time; -inf without entries."""
    i_row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(edges + i_row), tl.load(edges + i_row + 1)
    b_max = tl.full((), float("-inf"), tl.float32)
    b_sum = tl.zeros((), tl.float32)
    b_dot = tl.zeros((), tl.float32)  # sum of (z - max) e, log2 units
    for begin in range(first, last, BLOCK):
        i_entry = begin + tl.arange(0, BLOCK)
        b_z = tl.load(z + i_entry, mask=i_entry < last, other=float("-inf"))
        new_max = tl.maximum(b_max, tl.max(b_z, 0))  # nats; the rest is log2 units
        d = shifted(b_z, new_max)
        e = tl.exp2(d)
        step = b_max * LOG2E - tl.where(new_max == float("-inf"), 0.0, new_max * LOG2E)
        scale = tl.exp2(step)
        if entropy is not None:
            step = tl.where(b_sum > 0.0, step, 0.0)
            b_dot = scale * tl.fma(step, b_sum, b_dot) + tl.sum(tl.maximum(d, -200.0) * e, 0)  # e is 0 there
        b_sum = tl.fma(b_sum, scale, tl.sum(e, 0))
        b_max = new_max
    log_sum = tl.log2(b_sum)
    tl.store(lse + i_row, b_max)
    tl.store(lse + N.to(tl.int64) + i_row, log_sum * LN2)
    place = tl.load(of_target + i_row)
    b_z = tl.load(z + place, mask=place >= 0, other=0.0)
    tl.store(logp + i_row, tl.where(place >= 0, (shifted(b_z, b_max) - log_sum) * LN2, float("-inf")))
    if entropy is not None:
        value = (log_sum - b_dot / b_sum) * LN2
        tl.store(entropy + i_row, tl.where(value < 0.0, 0.0, value))  # rounding only; keeps NaN


@triton.jit(do_not_specialize=["N", "temperature_stride"])
def entry_gradients_kernel(
    z,  # [E]
    edges,  # [N + 1]
    of_target,  # [N]
    at_target,  # [N] g (1 - p) of the target
    lse,  # [2, N]
    entropy,  # [N] or None
    grad_logp,  # [N]
    grad_entropy,  # [N] or None
    temperature,  # [N] or [1]
    dz,  # [E] fp32
    N,
    temperature_stride,
    logit_scale,
    softcap,
    BLOCK: tl.constexpr,
):
    """[g (1{v=y} - p_v) - g_H p_v (log p_v + H)] dz/d(h W^T + b) of one row's entries; 0 without a gradient."""
    i_row = tl.program_id(0).to(tl.int64)
    first, last = tl.load(edges + i_row), tl.load(edges + i_row + 1)
    b_max, b_log_sum = tl.load(lse + i_row), tl.load(lse + N.to(tl.int64) + i_row)
    b_grad, b_at_target = tl.load(grad_logp + i_row), tl.load(at_target + i_row)
    place = tl.load(of_target + i_row)
    b_temperature = tl.load(temperature + i_row * temperature_stride)
    b_scale = row_factor(b_temperature, logit_scale, None)
    live = b_grad != 0.0
    if grad_entropy is not None:
        b_grad_entropy, b_entropy = tl.load(grad_entropy + i_row), tl.load(entropy + i_row)
        live |= b_grad_entropy != 0.0
    over_sum = tl.exp2(b_log_sum * -LOG2E)
    for begin in range(first, last, BLOCK):
        i_entry = begin + tl.arange(0, BLOCK)
        held = i_entry < last
        b_z = tl.load(z + i_entry, mask=held, other=float("-inf"))
        d = shifted(b_z, b_max)
        p = tl.exp2(d) * over_sum
        b_dz = tl.where(i_entry == place, b_at_target, -b_grad * p)
        if grad_entropy is not None:
            b_logp = tl.fma(tl.maximum(d, -200.0), LN2, -b_log_sum)  # p is 0 below
            b_dz -= b_grad_entropy * p * (b_logp + b_entropy)
        b_dz *= b_scale
        if softcap is not None:
            bend = b_z * (b_temperature / softcap)
            b_dz *= 1.0 - bend * bend
        tl.store(dz + i_entry, tl.where(live, b_dz, 0.0), mask=held)


@triton.jit
def dhidden_kernel(
    w,  # [V, H]
    edges,  # [N + 1]
    columns,  # [E]
    dz,  # [E]
    out,  # [N, H] fp32
    H,
    stride_w,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dz times the head's rows over one row's entries, in their order: BLOCK sums, then one tree."""
    num_heights = tl.cdiv(H, BLOCK_H)
    i_row = (tl.program_id(0) // num_heights).to(tl.int64)
    i_h = tl.program_id(0) % num_heights * BLOCK_H + tl.arange(0, BLOCK_H)
    first, last = tl.load(edges + i_row), tl.load(edges + i_row + 1)
    acc = tl.zeros((BLOCK, BLOCK_H), tl.float32)
    for begin in range(first, last, BLOCK):
        i_entry = begin + tl.arange(0, BLOCK)
        held = i_entry < last
        b_dz = tl.load(dz + i_entry, mask=held, other=0.0)
        held &= b_dz != 0.0
        i_col = tl.load(columns + i_entry, mask=held, other=0)
        mask = held[:, None] & (i_h < H)[None, :]
        b_w = tl.load(w + i_col[:, None] * stride_w + i_h[None, :], mask=mask, other=0.0).to(tl.float32)
        acc = tl.fma(b_w, b_dz[:, None], acc)
    tl.store(out + i_row * H + i_h, tl.sum(acc, 0), mask=i_h < H)


@triton.jit(do_not_specialize=["E", "V"])
def dweight_kernel(
    x,  # [N, H]
    first_entry,  # [segments + 1] of the entries by column; their number where there is no such segment
    order,  # [E] where each entry by column stands among the entries by row
    by_column,  # [E] rising; V behind them
    rows,  # [E] by row
    dz,  # [E] by row
    dbias,  # [V] fp32 or None
    out,  # [V, H] or None: written, or with ADD added to; other rows are left as they are
    E,
    V,
    H,
    stride_x,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """dz times the hidden states over one column's entries, in rising order of rows: BLOCK sums, then one tree."""
    num_heights = tl.cdiv(H, BLOCK_H)
    i_segment = tl.program_id(0) // num_heights
    i_height = tl.program_id(0) % num_heights
    first, last = tl.load(first_entry + i_segment), tl.load(first_entry + i_segment + 1)
    i_col = tl.load(by_column + first, mask=first < E, other=V)
    if i_col < V:
        i_h = i_height * BLOCK_H + tl.arange(0, BLOCK_H)
        acc = tl.zeros((BLOCK, BLOCK_H), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for begin in range(first, last, BLOCK):
            i_place = begin + tl.arange(0, BLOCK)
            held = i_place < last
            i_entry = tl.load(order + i_place, mask=held, other=0)
            b_dz = tl.load(dz + i_entry, mask=held, other=0.0)
            total += b_dz
            if out is not None:
                held &= b_dz != 0.0
                i_row = tl.load(rows + i_entry, mask=held, other=0)
                mask = held[:, None] & (i_h < H)[None, :]
                b_x = tl.load(x + i_row[:, None] * stride_x + i_h[None, :], mask=mask, other=0.0).to(tl.float32)
                acc = tl.fma(b_x, b_dz[:, None], acc)
        if out is not None:
            p_out = out + i_col * H + i_h
            b_out = tl.sum(acc, 0)
            if ADD:
                b_out += tl.load(p_out, mask=i_h < H, other=0.0)
            tl.store(p_out, b_out.to(out.dtype.element_ty), mask=i_h < H)
        if dbias is not None:
            if i_height == 0:
                tl.store(dbias + i_col, tl.sum(total, 0))
