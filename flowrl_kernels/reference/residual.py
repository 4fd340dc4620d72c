"""The squared flow-balance residual and its family: the specification (docs/maths.md, eq. 5-12).

All sums run in float64. Padded input is [B, T] with a mask, packed input [N] with cu_seqlens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.presets import Row

BOUND = 60.0  # log-ratios are clamped to +-BOUND before exp, and phi goes on straight beyond it


class Segments(NamedTuple):
    """Where the tokens of each sequence are. `mask` has the tokens' layout."""

    mask: Tensor  # bool [B, T] or [N]
    cu_seqlens: Tensor | None  # int64 [B+1]

    def total(self, value: Tensor) -> Tensor:
        """Sum over each sequence's tokens, in order, in float64. [B]"""
        value = torch.where(self.mask, value.double(), 0.0)
        if self.cu_seqlens is None:
            return value.sum(1)
        return torch.segment_reduce(value, "sum", offsets=self.cu_seqlens, axis=0, initial=0.0, unsafe=True)

    def spread(self, value: Tensor) -> Tensor:
        """Each sequence's number at each of its tokens. [B] -> [B, T] or [N]"""
        if self.cu_seqlens is None:
            return value[:, None].expand(self.mask.shape)
        return value[self.owner().clamp_max(len(value) - 1)]

    def owner(self) -> Tensor:
        """The sequence of each packed token. [N]"""
        assert self.cu_seqlens is not None
        token = torch.arange(self.mask.shape[0], device=self.mask.device)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), token, right=True)


class Terms(NamedTuple):
    loss: Tensor  # scalar float64, differentiable in logp and log_z
    residual: Tensor  # [B] detached; at token level the mean over the sequence's tokens
    weight: Tensor  # [B] detached, both weights together
    log_ratio: Tensor  # [B] detached, the unclamped log-ratio behind the weight
    clipped: Tensor  # [B] detached: -1 clipped low, 1 clipped high, else 0
    tokens: Tensor  # [B] tokens that count
    open: Tensor  # [B] bool: the gate lets the gradient through
    segments: Segments  # with the tokens that CISPO's mask left


def group_mean(value: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """Mean over the members of each one's group, members with count 0 left out. [B]"""
    same = (groups[:, None] == groups[None, :]).double()
    return (same @ (value * counts)) / (same @ counts).clamp_min(1.0)


def phi(d: Tensor, kind: str) -> Tensor:
    """The penalty of a residual; beyond +-BOUND it goes on as its tangent, so nothing overflows."""
    if kind == "square":
        return d.square()
    if kind == "abs":
        return d.abs()
    c = d.clamp(-BOUND, BOUND)
    value, slope = {
        "exp": (c.exp() - c - 1.0, c.exp() - 1.0),
        "exp_half": (4.0 * (c / 2).exp() - 2.0 * c - 4.0, 2.0 * (c / 2).exp() - 2.0),
        "cosh": (c.exp() + (-c).exp() - 2.0, c.exp() - (-c).exp()),
    }[kind]
    return value + slope.detach() * (d - c)


def bounded_ratio(log_ratio: Tensor, clip: tuple[float | None, float | None]) -> Tensor:
    ratio = log_ratio.clamp(-BOUND, BOUND).exp()
    return ratio if clip == (None, None) else ratio.clamp(*clip)


def residual(
    row: Row,
    logp: Tensor,  # [B, T] or [N]
    anchor: Tensor | None,  # same
    old: Tensor | None,  # same; None is weight 1
    sampler: Tensor | None,  # same
    reward: Tensor,  # [B]
    log_z: Tensor | None,  # [B]
    segments: Segments,
    groups: Tensor | None,  # [B]
    normalizer: Tensor | float | None,
) -> Terms:
    """L = sum_b w_b phi(d_b) / normalizer with d = a sum_t m (logp - anchor) - (beta r - log Z)."""
    current = logp.detach()
    token_ratio = torch.zeros_like(current) if old is None else (current.double() - old.double())
    if row.drop is not None and old is not None:
        sign = segments.spread(reward.double())
        ratio = token_ratio.clamp(-BOUND, BOUND).exp()
        out = ((sign > 0) & (ratio > 1 + row.drop[1])) | ((sign < 0) & (ratio < 1 - row.drop[0]))
        segments = segments._replace(mask=segments.mask & ~out)
    count = segments.total(torch.ones_like(current))  # [B]
    used = (count > 0).double()
    length = count.clamp_min(1.0)
    difference = logp.double() if anchor is None else logp.double() - anchor.double()
    target = row.beta * reward.double() - (0.0 if log_z is None else log_z.double())  # [B]

    log_ratio = segments.total(token_ratio)
    if row.ratio == "mean":
        log_ratio = log_ratio / length
    weight = torch.ones_like(log_ratio)
    if row.ratio is not None and old is not None and not row.token_weight:
        weight = bounded_ratio(log_ratio, row.clip)
    if row.tis is not None and old is not None and sampler is not None:
        off = old.double() - sampler.double()
        if row.tis == "token":
            second = segments.total(off.clamp(-BOUND, BOUND).exp()) / length
        else:
            second = segments.total(off) / (length if row.tis == "mean" else 1.0)
            second = second.clamp(-BOUND, BOUND).exp()
        weight = weight * second.clamp_max(row.tis_cap)

    passes = torch.ones_like(used, dtype=torch.bool)
    if row.level == "token":
        factor = 1.0 if row.scale is None else row.scale
        per_token = phi(factor * difference - segments.spread(target), row.phi)
        token_weight = segments.spread(weight)
        if row.token_weight and old is not None:
            token_weight = token_weight * bounded_ratio(token_ratio, row.clip)
        tokens = segments.total(per_token * token_weight).sum()
        loss = tokens / (count.sum().clamp_min(1.0) if normalizer is None else normalizer)
        d = (segments.total(factor * difference.detach()) / length - target.detach()) * used
        if row.token_weight and old is not None:
            weight = segments.total(token_weight) / length
    else:
        a = 1.0 / length if row.scale is None else row.scale
        flow = a * segments.total(difference)  # [B]
        if row.gate is not None and old is not None:
            held = held_back(row, segments.total(token_ratio) / length, reward)
            passes = held == 0
            flow = torch.where(passes, flow, flow.detach() + held)
        d = (flow - target) * used
        if row.log_z in ("group", "through") and log_z is None:
            assert groups is not None
            centre = group_mean(d, groups, used)
            d = (d - (centre.detach() if row.log_z == "group" else centre)) * used
        loss = (weight * used * phi(d, row.phi)).sum() / (len(reward) if normalizer is None else normalizer)
        if row.surrogate is not None and old is not None:
            loss = loss + surrogate(row.surrogate, logp, old, d.detach(), segments)
    ratio = log_ratio.clamp(-BOUND, BOUND).exp()
    low, high = row.clip if row.ratio is not None and old is not None else (None, None)
    clipped = torch.zeros_like(ratio)
    clipped = clipped if low is None else clipped - (ratio < low).double()
    clipped = clipped if high is None else clipped + (ratio > high).double()
    return Terms(loss, d.detach(), weight * used, log_ratio * used, clipped * used, count, passes, segments)


METRICS = (
    "residual_mean_abs", "residual_max_abs", "weight_mean", "weight_min", "weight_max", "clipped_low", "clipped_high",
    "log_ratio_old_mean", "log_ratio_ref_mean", "log_z_mean", "log_z_std", "nonfinite",
)  # fmt: skip


def metrics(terms: Terms, logp: Tensor, anchor: Tensor | None, log_z: Tensor | None) -> Tensor:
    """What a training log wants to know, over the sequences that have tokens, in the order of METRICS. [12]"""
    used = terms.tokens > 0
    num = used.sum().clamp_min(1)
    size = terms.residual.abs()
    zero = size.new_zeros(())
    to_ref = zero
    if anchor is not None:
        to_ref = (terms.segments.total(logp.double() - anchor.double()) / terms.tokens.clamp_min(1.0)).sum() / num
    z = size.new_zeros(1) if log_z is None else log_z.double()
    infinite = torch.full_like(size, torch.inf)
    low = torch.where(used, terms.weight, infinite).amin() if len(size) else zero
    return torch.stack([
        size.sum() / num, size.amax() if len(size) else zero, terms.weight.sum() / num,
        torch.where(used.any(), low, zero), terms.weight.amax() if len(size) else zero,
        (terms.clipped < 0).sum() / num, (terms.clipped > 0).sum() / num, terms.log_ratio.sum() / num, to_ref,
        z.mean() if z.numel() else zero, z.std(correction=0) if z.numel() else zero,
        (~(size.isfinite() & terms.weight.isfinite())).sum().double(),
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
    """The token-mean PPO surrogate with the residual as advantage, in the sign of the released code."""
    ratio = (logp.double() - old.double()).clamp(-BOUND, BOUND).exp()
    a = segments.spread(advantage)
    tokens = torch.maximum(-a * ratio, -a * ratio.clamp(1 - eps, 1 + eps))
    return segments.total(tokens).sum() / segments.total(torch.ones_like(logp)).sum().clamp_min(1.0)
