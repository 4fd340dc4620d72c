"""The residual's loss and its gradient in one pass: the gradient is closed, so nothing is kept for a backward.

dL/dlogp_bt = c_b a_b m_bt with c_b = w_b phi'(d_b) / normalizer (docs/maths.md, eq. 8): one number per sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.core.segments import Segments, group_mean
from flowrl_kernels.core.types import Anchors, Sequences
from flowrl_kernels.presets.row import Row, penalty_of
from flowrl_kernels.reference import residual as reference
from flowrl_kernels.reference.residual import BOUND, Terms, slope_alpha


def slope(d: Tensor, kind: str | float) -> Tensor:
    """phi'(d)."""
    if kind == "abs":
        return d.sign()
    factor, alphas = penalty_of(kind)
    return sum((factor * slope_alpha(d, alpha) for alpha in alphas), torch.zeros_like(d))


def residual_fwd(
    row: Row,
    logp: Tensor,  # [B, T] or [N]
    anchors: Anchors,
    each: Sequences,
    segments: Segments,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B], metrics [12], dlogp (layout of logp), dlog_z [B]; all float64."""
    terms, dlogp, dlog_z = sequences(row, logp, anchors, each, segments)
    return *totals(row, terms, each.normalizer, logp.dtype), dlogp, dlog_z


def totals(
    row: Row, terms: Terms, normalizer: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B], metrics [12] of a batch, in float64. `dtype`: of the log-probs."""
    loss = reference.total(row, terms, normalizer)
    given = loss if dtype == torch.float64 else loss.float()
    return loss, terms.residual, terms.weight, reference.metrics(terms, given)


def joined(parts: list[Terms]) -> Terms:
    """The terms of sequences that were taken a few at a time."""
    first = parts[0]._asdict()
    columns = {
        name: [getattr(part, name) for part in parts] for name, value in first.items() if isinstance(value, Tensor)
    }
    whole: dict[str, Any] = {name: torch.cat(column) for name, column in columns.items()}
    return parts[0]._replace(**whole)


def sequences(
    row: Row, logp: Tensor, anchors: Anchors, each: Sequences, segments: Segments
) -> tuple[Terms, Tensor, Tensor]:
    """What each sequence adds to the loss, and the loss's gradients dlogp (layout of logp) and dlog_z [B]."""
    (anchor, old, _), (reward, log_z, groups, normalizer) = anchors, each
    terms = reference.residual(row, logp, anchors, each, segments)
    segments, count = terms.segments, terms.tokens
    length, used = count.clamp_min(1.0), count > 0
    per_sequence, per_token = reference.divisors(normalizer, count)
    if row.level == "token":
        factor = 1.0 if row.scale is None else row.scale
        target = row.beta * reward.double() - terms.log_z
        difference = logp.double() if anchor is None else logp.double() - anchor.double()
        if row.token_weight and old is not None:
            weight = reference.bounded_ratio(logp.double() - old.double(), row.clip)
        else:
            weight = segments.spread(terms.weight)
        step = weight * slope(factor * difference - segments.spread(target), row.phi) / per_token
        dlogp = factor * step
        dlog_z = segments.total(step)
    else:
        step = dlog_z = terms.weight * slope(terms.residual, row.phi) / per_sequence  # [B]
        if row.log_z == "through" and log_z is None and groups is not None:
            step = torch.where(used, step - group_mean(step, groups, used), 0.0)
        a = 1.0 / length if row.scale is None else row.scale
        dlogp = segments.spread(torch.where(terms.open, step * a, 0.0))
        if row.surrogate is not None and old is not None:
            dlogp = dlogp + _surrogate(row.surrogate, logp, old, terms.residual, segments) / per_token
    return terms, torch.where(segments.mask, dlogp, 0.0), dlog_z


def _surrogate(eps: float, logp: Tensor, old: Tensor, d: Tensor, segments: Segments) -> Tensor:
    """Gradient of the PPO surrogate, summed over tokens, whose advantage is the residual."""
    log_ratio = logp.double() - old.double()
    ratio = reference.exp_bounded(log_ratio)
    a = segments.spread(d)
    inside = (ratio >= 1 - eps) & (ratio <= 1 + eps)
    moves = (inside | (-a * ratio > -a * ratio.clamp(1 - eps, 1 + eps))) & (log_ratio.abs() < BOUND)
    return torch.where(moves, -a * ratio, 0.0 * ratio)
