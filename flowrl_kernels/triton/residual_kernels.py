"""The residual's kernels: one program per sequence, then one over the sequences (docs/maths.md, eq. 5-12).

`sequence_kernel` sums a sequence's tokens and, where nothing is wanted from other sequences, writes its gradient at
once; rows that centre by groups, or divide by a count of tokens, take `coupled_kernel` for that. `total_kernel` in
`residual_totals` adds up the loss and the metrics.

Everything is summed in float64 and in a fixed order: lane i of a block takes tokens i, i + BLOCK, ... of the sequence,
counted from its own start, so padded and packed tokens give the same bits. The kernels are bound by memory; the
float64 units have the time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flowrl_kernels.triton.residual_totals import (
    COUNT,
    HIGH,
    LOG_RATIO,
    LOG_Z,
    LOSS,
    LOW,
    OPEN,
    RAW,
    RESIDUAL,
    STEP,
    SURROGATE,
    TO_REF,
    WEIGHT,
    field_sum,
)

BOUND = tl.constexpr(60.0)


@triton.jit
def exp_bounded(x):
    """exp of x clamped to +-BOUND; NaN for an infinite x."""
    c = tl.where(x > BOUND, BOUND, x)
    c = tl.where(c < -BOUND, -BOUND, c)
    return tl.where(tl.abs(x) == float("inf"), float("nan"), tl.exp(c))


@triton.jit
def clipped(ratio, low, high):
    if low is not None:
        ratio = tl.where(ratio < low, low, ratio)
    if high is not None:
        ratio = tl.where(ratio > high, high, ratio)
    return ratio


@triton.jit
def l_alpha(d, K: tl.constexpr):
    """(e^(K d) - K d - 1) / K^2 and its slope, K = alpha - 1: a series near 0, straight beyond |K d| = BOUND."""
    if K == 0.0:
        value = 0.5 * d * d
        slope = d
    else:
        k = tl.full((), K, tl.float64)
        u = k * d
        u = tl.where(u > BOUND, BOUND, u)
        u = tl.where(u < -BOUND, -BOUND, u)
        c = tl.where(tl.abs(k * d) > BOUND, u / k, d)
        e = tl.exp(u)
        series = tl.full(u.shape, 1.0, tl.float64)
        for i in tl.static_range(12):
            series = 1.0 + u * series / (14 - i)
        near = tl.abs(u) < 0.5
        slope = tl.where(near, c * (1.0 + 0.5 * u * series), (e - 1.0) / k)
        value = tl.where(near, 0.5 * c * c * series, (e - 1.0 - u) / k / k) + slope * (d - c)
    return value, slope


@triton.jit
def penalty(d, PHI: tl.constexpr):
    """phi(d) and phi'(d); PHI is a word, or alpha - 1."""
    if PHI == "square":
        value = d * d
        slope = 2.0 * d
    elif PHI == "abs":
        value = tl.abs(d)
        slope = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    elif PHI == "cosh":
        value, slope = l_alpha(d, 1.0)
        other, other_slope = l_alpha(d, -1.0)
        value += other
        slope += other_slope
    else:
        value, slope = l_alpha(d, PHI)
    return value, slope


@triton.jit
def load_tokens(pointer, i_token, on):
    if pointer is not None:
        return tl.load(pointer + i_token, mask=on, other=0.0).to(tl.float64)
    else:
        return tl.zeros(i_token.shape, tl.float64)


@triton.jit
def load_block(logp, anchor, old, mask, i_token, inside, b_reward, drop_low, drop_high):
    """logp - anchor, logp - old and whether the token counts. Tokens that do not are never read."""
    on = tl.load(mask + i_token, mask=inside, other=0) != 0
    x = load_tokens(logp, i_token, on)
    move = tl.zeros(i_token.shape, tl.float64)
    if old is not None:
        move = x - load_tokens(old, i_token, on)
        if drop_high is not None:
            ratio = exp_bounded(move)
            most = tl.where(b_reward > 0.0, drop_high, float("inf"))
            least = tl.where(b_reward < 0.0, drop_low, float("-inf"))
            on = on & ((ratio > most) == 0) & ((ratio < least) == 0)  # NaN stays
            x = tl.where(on, x, 0.0)
            move = tl.where(on, move, 0.0)
    difference = x - load_tokens(anchor, i_token, on)
    return difference, move, on


@triton.jit
def span(cu_seqlens, b, slots):
    """First token of sequence b and its number of slots."""
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + b)
        length = tl.load(cu_seqlens + b + 1) - start
    else:
        start = b * slots
        length = slots + tl.zeros_like(b)
    return start, length


@triton.jit
def group_mean(record, groups, b_group, num, centre, SLOPE: tl.constexpr, PHI: tl.constexpr, LANES: tl.constexpr):
    """Mean over the group's members that have tokens: of their raw residuals, or of w phi'(raw - centre) if SLOPE."""
    total = tl.zeros((LANES,), tl.float64)
    members = tl.zeros((LANES,), tl.float64)
    for first in range(0, num, LANES):
        i = first + tl.arange(0, LANES)
        inside = i < num
        mine = inside & (tl.load(groups + i, mask=inside, other=0) == b_group)
        mine = mine & (tl.load(record + COUNT * num + i, mask=inside, other=0.0) > 0.0)
        value = tl.load(record + RAW * num + i, mask=mine, other=0.0)
        if SLOPE:
            _, slope = penalty(value - centre, PHI)
            value = tl.load(record + WEIGHT * num + i, mask=mine, other=0.0) * slope
        total += tl.where(mine, value, 0.0)
        members += tl.where(mine, 1.0, 0.0)
    return tl.sum(total, 0) / tl.maximum(tl.sum(members, 0), 1.0)


@triton.jit
def write_gradient(
    logp, anchor, old, mask, dlogp, start, length, b_reward, target, factor, low, high, drop_low, drop_high,
    coefficient, d, eps, surrogate_scale,
    TOKEN: tl.constexpr, TOKEN_WEIGHT: tl.constexpr, PHI: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogp of a sequence: `coefficient` at every token that counts, at token level times the token's own slope.

    Returns the sum of the PPO surrogate's terms, whose gradient is added where there is one.
    """
    surrogate = tl.zeros((BLOCK,), tl.float64)
    for t in range(0, length, BLOCK):
        inside = t + tl.arange(0, BLOCK) < length
        i_token = start + t + tl.arange(0, BLOCK)
        if TOKEN or eps is not None or drop_high is not None:
            difference, move, on = load_block(logp, anchor, old, mask, i_token, inside, b_reward, drop_low, drop_high)
        else:
            on = tl.load(mask + i_token, mask=inside, other=0) != 0
        step = coefficient + tl.zeros((BLOCK,), tl.float64)
        if TOKEN:
            _, slope = penalty(factor * difference - target, PHI)
            step *= factor * slope
            if TOKEN_WEIGHT:
                step *= clipped(exp_bounded(move), low, high)
        if eps is not None:
            ratio = exp_bounded(move)
            plain = -d * ratio
            bounded = -d * clipped(ratio, 1.0 - eps, 1.0 + eps)
            moves = (plain > bounded) | ((ratio >= 1.0 - eps) & (ratio <= 1.0 + eps))
            moves = (moves & (tl.abs(move) < BOUND)) | (plain != plain)
            surrogate += tl.where(on, tl.where(plain < bounded, bounded, plain), 0.0)
            step += tl.where(moves, plain * surrogate_scale, 0.0)
        step = tl.where(on, step, 0.0)
        tl.store(dlogp + i_token, step.to(tl.float32).to(dlogp.dtype.element_ty), mask=inside)
    return tl.sum(surrogate, 0)


@triton.jit(do_not_specialize=["num", "slots", "first"])
def sequence_kernel(
    logp,  # [N] or [B * T]
    anchor,  # the same, or None
    old,  # the same, or None
    sampler,  # the same, or None
    reward,  # [B]
    log_z,  # [B] or None
    mask,  # uint8, the layout of logp
    cu_seqlens,  # [B+1] int64 or None
    divisor,  # [1] float64: what the row divides by; None for the number of sequences
    token_divisor,  # [1] float64 beside a PPO term
    record,  # [FIELDS, B] float64
    residual,  # [B]
    weights,  # [B]
    dlogp,  # the layout of logp
    dlog_z,  # [B]
    num,
    slots,
    first,  # the sequence of the first program
    beta,
    scale,
    low,
    high,
    tis_cap,
    length_power,
    gate_low,
    gate_high,
    drop_low,
    drop_high,
    eps,
    TOKEN: tl.constexpr,
    TOKEN_WEIGHT: tl.constexpr,
    RATIO: tl.constexpr,
    TIS: tl.constexpr,
    GATE: tl.constexpr,
    PHI: tl.constexpr,
    COUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything about a sequence that needs no other sequence; its gradient too unless COUPLED."""
    b = first + tl.program_id(0).to(tl.int64)
    start, length = span(cu_seqlens, b, slots)
    b_reward = tl.load(reward + b).to(tl.float64)
    partition = tl.zeros_like(b_reward)
    if log_z is not None:
        partition = tl.load(log_z + b).to(tl.float64)
    target = beta * b_reward - partition
    factor = tl.full((), 1.0, tl.float64)
    if scale is not None:
        factor = factor * scale
    count = tl.zeros((BLOCK,), tl.float64)
    flow = tl.zeros((BLOCK,), tl.float64)
    moved = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    values = tl.zeros((BLOCK,), tl.float64)
    steps = tl.zeros((BLOCK,), tl.float64)
    bounds = tl.zeros((BLOCK,), tl.float64)
    lows = tl.zeros((BLOCK,), tl.float64)
    highs = tl.zeros((BLOCK,), tl.float64)
    for t in range(0, length, BLOCK):
        inside = t + tl.arange(0, BLOCK) < length
        i_token = start + t + tl.arange(0, BLOCK)
        difference, move, on = load_block(logp, anchor, old, mask, i_token, inside, b_reward, drop_low, drop_high)
        count += tl.where(on, 1.0, 0.0)
        flow += difference
        moved += move
        if TIS is not None:
            off = load_tokens(old, i_token, on) - load_tokens(sampler, i_token, on)
            if TIS == "token":
                off = tl.where(on, exp_bounded(off), 0.0)
            second += off
        if TOKEN:
            value, slope = penalty(factor * difference - target, PHI)
            if TOKEN_WEIGHT:
                ratio = exp_bounded(move)
                bounded = clipped(ratio, low, high)
                value *= bounded
                slope *= bounded
                bounds += tl.where(on, bounded, 0.0)
                if low is not None:
                    lows += tl.where(on & (ratio < low), 1.0, 0.0)
                if high is not None:
                    highs += tl.where(on & (ratio > high), 1.0, 0.0)
            values += tl.where(on, value, 0.0)
            steps += tl.where(on, slope, 0.0)
    b_count = tl.sum(count, 0)
    b_length = tl.maximum(b_count, 1.0)
    b_flow = tl.sum(flow, 0)
    b_moved = tl.sum(moved, 0)
    log_ratio = b_moved
    if RATIO == "mean":
        log_ratio = b_moved / b_length
    weight = tl.full((), 1.0, tl.float64)
    b_low = tl.zeros_like(weight)
    b_high = tl.zeros_like(weight)
    if RATIO is not None and old is not None and not TOKEN_WEIGHT:
        ratio = exp_bounded(log_ratio)
        weight = clipped(ratio, low, high)
        if low is not None:
            b_low = tl.where(ratio < low, 1.0, 0.0).to(tl.float64)
        if high is not None:
            b_high = tl.where(ratio > high, 1.0, 0.0).to(tl.float64)
    if TIS is not None:
        b_second = tl.sum(second, 0)
        if TIS == "token":
            b_second = b_second / b_length
        else:
            if TIS == "mean":
                b_second = b_second / b_length
            b_second = exp_bounded(b_second)
        weight *= clipped(b_second, None, tis_cap)
    if length_power is not None:
        weight *= tl.exp(-length_power * tl.log(b_length))
    raw = weight
    passes = tl.full((), 1.0, tl.float64)
    if TOKEN:
        b_loss = weight * tl.sum(values, 0)
        b_step = weight * tl.sum(steps, 0)
        d = factor * b_flow / b_length - target
        if TOKEN_WEIGHT:
            weight *= tl.sum(bounds, 0) / b_length
            b_low = tl.sum(lows, 0) / b_length
            b_high = tl.sum(highs, 0) / b_length
    else:
        d = b_flow / b_length
        if scale is not None:
            d = factor * b_flow
        if GATE is not None and old is not None:
            move = b_moved / b_length
            held = tl.where(move > gate_high, gate_high, move)
            held = tl.where(held < gate_low, gate_low, held) - move
            if GATE == "select":  # only where PPO's surrogate would pick its clipped branch
                picks = ((b_reward > 0.0) & (move > gate_high)) | ((b_reward < 0.0) & (move < gate_low))
                held = tl.where(picks, held, 0.0)
            passes = tl.where(held == 0.0, 1.0, 0.0).to(tl.float64)
            d += held
        d -= target
        value, slope = penalty(d, PHI)
        b_loss = weight * value
        b_step = weight * slope
        raw = d
    some = b_count > 0.0
    to_ref = tl.zeros_like(d)
    if anchor is not None:
        to_ref = b_flow / b_length
    p = record + b
    tl.store(p + COUNT * num, b_count)
    d = tl.where(some, d, 0.0)
    weight = tl.where(some, weight, 0.0)
    tl.store(p + RESIDUAL * num, d)
    tl.store(p + WEIGHT * num, weight)
    tl.store(residual + b, d.to(residual.dtype.element_ty))
    tl.store(weights + b, weight.to(weights.dtype.element_ty))
    tl.store(p + LOG_RATIO * num, log_ratio)
    tl.store(p + LOW * num, tl.where(some, b_low, 0.0))
    tl.store(p + HIGH * num, tl.where(some, b_high, 0.0))
    tl.store(p + LOG_Z * num, tl.where(some, partition, 0.0))
    tl.store(p + TO_REF * num, to_ref)
    tl.store(p + LOSS * num, tl.where(some, b_loss, 0.0))
    tl.store(p + SURROGATE * num, 0.0)
    tl.store(p + RAW * num, tl.where(some, raw, 0.0))
    tl.store(p + STEP * num, tl.where(some, b_step, 0.0))
    tl.store(p + OPEN * num, passes)
    if not COUPLED:
        total = num.to(tl.float64)
        if divisor is not None:
            total = tl.where(some, tl.load(divisor), 1.0)  # which may be 0 where nothing counts
        surrogate_scale = tl.full((), 0.0, tl.float64)
        if eps is not None:
            surrogate_scale = 1.0 / tl.where(some, tl.load(token_divisor), 1.0)
        b_step = tl.where(some, b_step, 0.0) / total
        tl.store(dlog_z + b, b_step.to(tl.float32).to(dlog_z.dtype.element_ty))
        if TOKEN:
            coefficient = raw / total
        else:
            coefficient = tl.where(passes > 0.0, b_step, 0.0)
            coefficient = coefficient * factor if scale is not None else coefficient / b_length
        surrogate = write_gradient(
            logp, anchor, old, mask, dlogp, start, length, b_reward, target, factor, low, high, drop_low, drop_high,
            coefficient, d, eps, surrogate_scale, TOKEN, TOKEN_WEIGHT, PHI, BLOCK,
        )  # fmt: skip
        if eps is not None:
            tl.store(p + SURROGATE * num, surrogate * surrogate_scale)


@triton.jit(do_not_specialize=["num", "slots"])
def coupled_kernel(
    logp,
    anchor,
    old,
    reward,
    log_z,
    mask,
    cu_seqlens,
    groups,  # [B], where the group's mean is the centre
    divisor,
    token_divisor,
    record,
    residual,
    dlogp,
    dlog_z,
    num,
    slots,
    beta,
    scale,
    low,
    high,
    drop_low,
    drop_high,
    eps,
    TOKEN: tl.constexpr,
    TOKEN_WEIGHT: tl.constexpr,
    CENTRE: tl.constexpr,
    PHI: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):
    """The gradient of a sequence that needs the others' records: its group's mean, or how many tokens there are."""
    b = tl.program_id(0).to(tl.int64)
    start, length = span(cu_seqlens, b, slots)
    p = record + b
    b_reward = tl.load(reward + b).to(tl.float64)
    target = beta * b_reward
    if log_z is not None:
        target -= tl.load(log_z + b).to(tl.float64)
    factor = tl.full((), 1.0, tl.float64)
    if scale is not None:
        factor = factor * scale
    count = tl.load(p + COUNT * num)
    some = count > 0.0
    d = tl.load(p + RESIDUAL * num)
    weight = tl.load(p + WEIGHT * num)
    surrogate_scale = tl.full((), 0.0, tl.float64)
    if TOKEN:
        total = tl.maximum(field_sum(record, COUNT, num, LANES), 1.0)
        if divisor is not None:
            total = tl.where(some, tl.load(divisor), 1.0)
        coefficient = tl.load(p + RAW * num) / total
        tl.store(dlog_z + b, (tl.load(p + STEP * num) / total).to(tl.float32).to(dlog_z.dtype.element_ty))
    else:
        total = num.to(tl.float64)
        if divisor is not None:
            total = tl.where(some, tl.load(divisor), 1.0)
        if CENTRE is not None:
            b_group = tl.load(groups + b)
            centre = group_mean(record, groups, b_group, num, d, False, PHI, LANES)
            d = tl.where(some, d - centre, 0.0)
            tl.store(p + LOG_Z * num, tl.where(some, -centre, 0.0))
            tl.store(p + RESIDUAL * num, d)
            tl.store(residual + b, d.to(residual.dtype.element_ty))
        value, slope = penalty(d, PHI)
        tl.store(p + LOSS * num, tl.where(some, weight * value, 0.0))
        step = weight * slope / total
        tl.store(dlog_z + b, step.to(tl.float32).to(dlog_z.dtype.element_ty))
        if CENTRE == "through":
            step -= group_mean(record, groups, b_group, num, centre, True, PHI, LANES) / total
            step = tl.where(some, step, 0.0)
        coefficient = tl.where(tl.load(p + OPEN * num) > 0.0, step, 0.0)
        coefficient = coefficient * factor if scale is not None else coefficient / tl.maximum(count, 1.0)
        if eps is not None:
            if token_divisor is not None:
                surrogate_scale = 1.0 / tl.where(some, tl.load(token_divisor), 1.0)
            else:
                surrogate_scale = 1.0 / tl.maximum(field_sum(record, COUNT, num, LANES), 1.0)
    surrogate = write_gradient(
        logp, anchor, old, mask, dlogp, start, length, b_reward, target, factor, low, high, drop_low, drop_high,
        coefficient, d, eps, surrogate_scale, TOKEN, TOKEN_WEIGHT, PHI, BLOCK,
    )  # fmt: skip
    if eps is not None:
        tl.store(p + SURROGATE * num, surrogate * surrogate_scale)
