"""The loss from hidden states in one pass: whether a batch can take it, and the call."""

from __future__ import annotations

import itertools
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import dispatch, losses, presets
from flowrl_kernels.functional import checked_head
from flowrl_kernels.ops import linear_residual as op
from flowrl_kernels.reference.residual import Segments
from flowrl_kernels.types import LossOutput

logger = logging.getLogger("flowrl_kernels")
ROW_BLOCK = 256  # rows that a forward takes together, on every backend or a multiple of it


def linear_residual(
    hidden: Tensor,  # [B, T, H] or [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [B, T] or [N], -100 where masked out
    logp_ref: Tensor | None,
    reward: Tensor,  # [B]
    log_z: Any,
    tensors: dict[str, Any],
    head: dict[str, Any],
    settings: dict[str, Any],
) -> LossOutput | None:
    """The single-pass loss (docs/maths.md), or None if this batch has to take two passes."""
    explicit = dict(settings)
    impl, preset = explicit.pop("impl", "auto"), explicit.pop("preset", None)
    bias = head["bias"]
    wants = [isinstance(t, Tensor) and t.requires_grad and torch.is_grad_enabled() for t in (hidden, weight, bias)]
    if not any(wants) or (chosen := dispatch.resolve("linear_residual", impl, hidden)) == "reference":
        return None
    stand_in = torch.empty((), dtype=torch.float32, device=hidden.device).expand(target.shape)
    settled = losses.settle(
        stand_in,
        logp_ref,
        reward,
        log_z,
        preset=preset,
        base=presets.PRESETS["paper"],
        explicit=losses.flow_settings(**explicit),
        **tensors,
    )
    flat, w, ids, temperature, softcap, _ = checked_head(
        hidden, weight, target, bias, head["temperature"], head["softcap"]
    )
    segments = settled.segments
    if segments.cu_seqlens is None:
        step = target.shape[1]
        edges = [step * i for i in range(target.shape[0] + 1)]
        cu_seqlens = torch.arange(target.shape[0] + 1, device=hidden.device) * step
        segments = Segments(segments.mask.reshape(-1), cu_seqlens)
    elif torch.compiler.is_compiling():
        return None  # the boundaries' values are not known to a traced graph
    else:
        edges = segments.cu_seqlens.tolist()
    rows = edges
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():  # rows that count; elsewhere one would wait
        counted = torch.nn.functional.pad(segments.mask.cumsum(0), (1, 0))
        rows = counted[segments.cu_seqlens].tolist() if segments.cu_seqlens is not None else edges
    most, separate = op.chunk_tokens(w.shape[0], hidden.device.type), independent(settled)
    bounds = chunk_bounds(rows, most, separate, alone=separate and hidden.dtype != torch.float16)
    if bounds is None or segments.cu_seqlens is None:
        _say_why(separate)
        return None
    row = settled.row
    per_token = [None if t is None else t.reshape(-1) for t in (settled.anchor, settled.old, settled.sampler)]
    normalizer = settled.normalizer
    if normalizer is None and independent(settled):
        normalizer = torch.full((), float(max(1, len(reward))), dtype=torch.float64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, d, weights, metrics, *_ = op.linear_residual(
            flat, w, bias, settled.log_z, ids, temperature, float(head["logit_scale"]), softcap, *per_token,
            settled.reward, segments.mask, segments.cu_seqlens, settled.groups,
            most, [edges[i] for i in bounds], bounds, normalizer, row.codes(), row.packed_numbers(), wants, chosen,
        )  # fmt: skip
    return losses.output(loss, d, weights, metrics)


def independent(settled: losses.Settled) -> bool:
    """Whether a sequence's coefficient needs nothing from other sequences."""
    row = settled.row
    centred = row.log_z in ("group", "through") and settled.log_z is None
    counted = row.level == "token" and settled.normalizer is None
    return not (centred or counted or row.surrogate is not None)


@cache
def _say_why(separate: bool) -> None:
    if not torch.compiler.is_compiling():
        why = "a float16 sequence" if separate else "a batch of sequences that depend on each other"
        logger.info("LinearFlowRLLoss takes two passes (8NHV): %s does not fit the buffer of logits", why)


def chunk_bounds(edges: list[int], limit: int, split: bool, alone: bool = False) -> list[int] | None:
    """Sequence indices at which chunks begin, and B; None if a chunk would outgrow `limit` rows.

    edges: rows before each sequence, and in all. split: whether there may be several chunks. alone: a sequence of more
    than `limit` rows makes a chunk by itself.
    """
    full = limit // ROW_BLOCK * ROW_BLOCK if split and limit > ROW_BLOCK else limit  # whole row blocks: less padding
    if len(edges) < 2:
        return None
    bounds = [0]
    for i in range(1, len(edges)):
        long = edges[i] - edges[i - 1] > limit
        if long and not alone:
            return None
        if edges[i] - edges[bounds[-1]] > full and i - 1 > bounds[-1]:
            bounds.append(i - 1)
        if long:
            bounds.append(i)
    if bounds[-1] != len(edges) - 1:
        bounds.append(len(edges) - 1)
    fits = all(
        edges[high] - edges[low] <= limit or (alone and high - low == 1) for low, high in itertools.pairwise(bounds)
    )
    return bounds if fits and (split or len(bounds) == 2) else None
