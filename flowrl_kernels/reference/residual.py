"""The squared flow-balance residual and its family: the specification (docs/maths.md, eq. 5-12).

All sums run in float64. Padded input is [B, T] with a mask, packed input [N] with cu_seqlens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.core.segments import Segments, group_mean
from flowrl_kernels.core.types import Anchors, Sequences
from flowrl_kernels.presets.row import Row, penalty_of

BOUND = 60.0  # what goes into exp is clamped to +-BOUND; phi goes on straight beyond it
NEAR = 0.5  # up to here L_alpha is summed as a series, from so many terms to double precision
TERMS = 13


class Terms(NamedTuple):
    penalty: Tensor  # [B] float64, differentiable in logp and log_z: the weighted penalty, summed over its tokens
    surrogate: Tensor | None  # [B] the same: the PPO terms of the joint loss, summed over tokens
    residual: Tensor  # [B] detached; at token level the mean over the sequence's tokens
    weight: Tensor  # [B] detached, both weights together; where tokens have their own, their mean
    log_ratio: Tensor  # [B] detached, the unclamped log-ratio to old: its sum, or its mean where the row says so
    clipped_low: Tensor  # [B] detached: 1 where the weight was clipped from below (a share where tokens have their own)
    clipped_high: Tensor  # [B] the same from above
    log_z: Tensor  # [B] detached: what stood in the residual as log Z
    tokens: Tensor  # [B] tokens that count
    open: Tensor  # [B] bool: the gate lets the gradient through
    to_anchor: Tensor  # [B] detached: mean over tokens of logp - anchor
    segments: Segments  # with the tokens that CISPO's mask left


def phi(d: Tensor, kind: str | float) -> Tensor:
    """The penalty of a residual, by its name or its alpha (docs/maths.md, eq. 21)."""
    if kind == "abs":
        return d.abs()
    factor, alphas = penalty_of(kind)
    return sum((factor * l_alpha(d, alpha) for alpha in alphas), torch.zeros_like(d))


def l_alpha(d: Tensor, alpha: float) -> Tensor:
    """(e^(k d) - k d - 1) / k^2 with k = alpha - 1; beyond |k d| = BOUND it goes on as its tangent: nothing overflows.

    (e^u - u - 1) / u^2 loses all digits near 0, where k or d is small; there it is a series.
    """
    k = alpha - 1.0
    if k == 0.0:
        return 0.5 * d.square()
    c = d.clamp(-BOUND / abs(k), BOUND / abs(k))
    u = k * c
    near = u.abs() < NEAR
    small, large = torch.where(near, u, 0.0), torch.where(near, 1.0, u)
    series = torch.ones_like(u)
    for n in range(TERMS + 1, 2, -1):
        series = 1.0 + small * series / n
    value = torch.where(near, 0.5 * c.square() * series, (large.expm1() - large) / k / k)
    return value + slope_alpha(d, alpha).detach() * (d - c)


def slope_alpha(d: Tensor, alpha: float) -> Tensor:
    """L_alpha'(d) = (e^(k d) - 1) / k."""
    k = alpha - 1.0
    return d if k == 0.0 else (k * d).clamp(-BOUND, BOUND).expm1() / k


def exp_bounded(log_ratio: Tensor) -> Tensor:
    """exp of the log-ratio clamped to +-BOUND. An infinite one is no ratio but an error upstream: NaN, not hidden."""
    return log_ratio.clamp(-BOUND, BOUND).masked_fill(log_ratio.isinf(), torch.nan).exp()


def bounded_ratio(log_ratio: Tensor, clip: tuple[float | None, float | None]) -> Tensor:
    ratio = exp_bounded(log_ratio)
    return ratio if clip == (None, None) else ratio.clamp(*clip)


def beyond(log_ratio: Tensor, clip: tuple[float | None, float | None]) -> tuple[Tensor, Tensor]:
    """1 where the ratio is below, and where it is above the bounds."""
    ratio = exp_bounded(log_ratio)
    none = torch.zeros_like(ratio)
    low, high = clip
    return none if low is None else (ratio < low).double(), none if high is None else (ratio > high).double()


def divisors(normalizer: Tensor | None, count: Tensor) -> tuple[Tensor, Tensor]:
    """What sums over sequences and sums over tokens are divided by. `count`: [B] tokens of each sequence.

    Where nothing counts, 0 over 0 is 0. A divisor of 0 beside tokens is an error upstream and gives what it gives.
    """
    if normalizer is None:
        return torch.full_like(count.sum(), max(len(count), 1)), count.sum().clamp_min(1.0)
    both = normalizer.double().reshape(-1)
    both = torch.where((both == 0) & (count.sum() == 0), 1.0, both)
    return both[0], both[-1]


def residual(
    row: Row,
    logp: Tensor,  # [B, T] or [N]
    anchors: Anchors,  # without old the weight is 1
    sequences: Sequences,
    segments: Segments,
) -> Terms:
    """w_b phi(d_b) with d = a sum_t m (logp - anchor) - (beta r - log Z), and what else a sequence has to tell."""

    # what stands in the padding must not reach anything, not even as 0 * NaN
    logp, anchor, old, sampler = (segments.clean(t) for t in (logp, *anchors))
    reward, log_z, groups, _ = sequences
    current = logp.detach()
    token_ratio = torch.zeros_like(current) if old is None else current - old
    if row.drop is not None and old is not None:
        sign = segments.spread(reward.double())
        ratio = exp_bounded(token_ratio)
        out = ((sign > 0) & (ratio > 1 + row.drop[1])) | ((sign < 0) & (ratio < 1 - row.drop[0]))
        segments = segments._replace(mask=segments.mask & ~out)
    count = segments.total(torch.ones_like(current))  # [B]
    used = count > 0
    length = count.clamp_min(1.0)
    difference = logp if anchor is None else logp - anchor
    none = torch.zeros_like(count)
    partition = none if log_z is None else torch.where(used, log_z.double(), 0.0)
    target = torch.where(used, row.beta * reward.double(), 0.0) - partition  # [B]

    log_ratio = segments.total(token_ratio)
    if row.ratio == "mean":
        log_ratio = log_ratio / length
    weight = torch.ones_like(log_ratio)
    low = high = none
    weighted = row.ratio is not None and old is not None
    if weighted and not row.token_weight:
        weight = bounded_ratio(log_ratio, row.clip)
        low, high = beyond(log_ratio, row.clip)
    if row.tis is not None and old is not None and sampler is not None:
        off = old - sampler
        if row.tis == "token":
            second = segments.total(exp_bounded(off)) / length
        else:
            second = exp_bounded(segments.total(off) / (length if row.tis == "mean" else 1.0))
        weight = weight * second.clamp_max(row.tis_cap)
    if row.length_power:
        weight = weight * length**-row.length_power
    weight = torch.where(used, weight, 0.0)

    passes, extra = torch.ones_like(used), None
    if row.level == "token":
        factor = 1.0 if row.scale is None else row.scale
        token_weight = segments.spread(weight)
        if weighted and row.token_weight:
            token_weight = token_weight * bounded_ratio(token_ratio, row.clip)
            weight = segments.total(token_weight) / length
            low, high = (segments.total(share) / length for share in beyond(token_ratio, row.clip))
        tokens = token_weight * phi(factor * difference - segments.spread(target), row.phi)
        penalty = segments.total(tokens)
        d = segments.total(factor * difference.detach()) / length - target.detach()
    else:
        flow = segments.total(difference) * (1.0 / length if row.scale is None else row.scale)  # [B]
        if row.gate is not None and old is not None:
            held = held_back(row, segments.total(token_ratio) / length, reward)
            passes = held == 0
            flow = torch.where(passes, flow, flow.detach() + held)
        d = torch.where(used, flow - target, 0.0)
        if row.log_z in ("group", "through") and log_z is None:
            assert groups is not None
            centre = group_mean(d, groups, used)
            partition = -centre
            d = torch.where(used, d - (centre.detach() if row.log_z == "group" else centre), 0.0)
        penalty = weight * phi(d, row.phi)
        if row.surrogate is not None and old is not None:
            extra = surrogate(row.surrogate, logp, old, d.detach(), segments)
    d, partition = torch.where(used, d.detach(), 0.0), partition.detach()
    to_anchor = none if anchor is None else segments.total(current - anchor) / length
    return Terms(penalty, extra, d, weight, log_ratio, low, high, partition, count, passes, to_anchor, segments)


def total(row: Row, terms: Terms, normalizer: Tensor | None) -> Tensor:
    """L = sum_b penalty_b / normalizer, with the joint loss's other term: scalar float64, differentiable."""
    per_sequence, per_token = divisors(normalizer, terms.tokens)
    loss = terms.penalty.sum() / (per_token if row.level == "token" else per_sequence)
    return loss if terms.surrogate is None else loss + terms.surrogate.sum() / per_token


def metrics(terms: Terms, loss: Tensor) -> Tensor:
    """What a training log wants to know, over the sequences that have tokens, in the order of METRICS. [12]

    loss: in the dtype it is given out in, so that one which does not fit there is counted.
    """
    used = terms.tokens > 0
    num = used.sum().clamp_min(1)
    size = terms.residual.abs()

    def mean(value: Tensor) -> Tensor:
        return torch.where(used, value, 0.0).sum() / num

    def most(value: Tensor) -> Tensor:
        # a sequence more, which is never the largest where another counts: the batch may be empty
        floor = torch.where(used.any(), -torch.inf, 0.0).double().view(1)
        return torch.cat((torch.where(used, value, -torch.inf), floor)).amax()

    log_z_mean = mean(terms.log_z)
    finite = size.isfinite() & terms.weight.isfinite() & terms.log_ratio.isfinite()
    return torch.stack([
        mean(size), most(size), mean(terms.weight), -most(-terms.weight), most(terms.weight), mean(terms.clipped_low),
        mean(terms.clipped_high), mean(terms.log_ratio), mean(terms.to_anchor),
        log_z_mean, mean((terms.log_z - log_z_mean).square()).sqrt(),
        torch.maximum((used & ~finite).sum(), (~loss.isfinite()).long()).double(),
    ])  # fmt: skip


def held_back(row: Row, move: Tensor, reward: Tensor) -> Tensor:
    """What clamping the mean log-prob into [old + log(1 - lo), old + log(1 + hi)] takes away from `move`. [B]"""
    low, high = math.log1p(-row.gate_clip[0]), math.log1p(row.gate_clip[1])
    held = move.clamp(low, high) - move
    if row.gate == "select":  # only where PPO's surrogate would pick its clipped branch
        picks = ((reward > 0) & (move > high)) | ((reward < 0) & (move < low))
        held = torch.where(picks, held, 0.0)
    return held


def surrogate(eps: float, logp: Tensor, old: Tensor, advantage: Tensor, segments: Segments) -> Tensor:
    """The PPO surrogate with the residual as advantage, in the sign of the released code, summed over tokens. [B]"""
    ratio = exp_bounded(logp - old)
    a = segments.spread(advantage)
    return segments.total(torch.maximum(-a * ratio, -a * ratio.clamp(1 - eps, 1 + eps)))
