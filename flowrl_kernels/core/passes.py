"""One pass or two: the one place that decides, for a batch whose tensors and settings are checked."""

from __future__ import annotations

import itertools
import logging
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.settle import Settled
from flowrl_kernels.core.types import Chunks, Sequences

logger = logging.getLogger("flowrl_kernels")
BUFFER = 1 << 26  # logits of one chunk on a CPU: 268 MB in fp32
GPU_BUFFER = 1 << 30
ROW_BLOCK = 256  # rows that a forward takes together, on every backend or a multiple of it


class OnePass(NamedTuple):
    """A batch as the single pass takes it."""

    segments: Segments  # packed
    each: Sequences
    chunks: Chunks


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """The most tokens whose logits are held at once."""
    return max(1, (BUFFER if device_type == "cpu" else GPU_BUFFER) // vocab_size)


def one_pass(hidden: Tensor, vocab_size: int, settled: Settled) -> OnePass | None:
    """The batch in chunks for a single pass (docs/maths.md), or None if it has to take two.

    hidden: [N, H]
    """
    most = chunk_tokens(vocab_size, hidden.device.type)
    segments, each, separate = settled.segments, settled.each, independent(settled)
    if segments.cu_seqlens is None:
        num, step = segments.mask.shape
        edges = [step * i for i in range(num + 1)]
        cu_seqlens = torch.arange(num + 1, device=hidden.device) * step
    elif torch.compiler.is_compiling():
        return None  # the boundaries' values are not known to a traced graph
    else:
        cu_seqlens = segments.cu_seqlens
        edges = cu_seqlens.tolist()
    mask, rows = segments.mask.reshape(-1), edges
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():  # rows that count; elsewhere one would wait
        rows = torch.nn.functional.pad(mask.cumsum(0), (1, 0))[cu_seqlens].tolist()
    bounds = chunk_bounds(rows, most, separate, alone=separate and hidden.dtype != torch.float16)
    if bounds is None:
        _say_why(separate)
        return None
    if each.normalizer is None and separate:
        own = torch.full((), float(max(1, len(each.reward))), dtype=torch.float64, device=hidden.device)
        each = each._replace(normalizer=own)
    return OnePass(Segments(mask, cu_seqlens), each, Chunks(most, [edges[i] for i in bounds], bounds))


def independent(settled: Settled) -> bool:
    """Whether a sequence's coefficient needs nothing from other sequences."""
    row = settled.row
    centred = row.log_z in ("group", "through") and settled.each.log_z is None
    counted = row.level == "token" and settled.each.normalizer is None
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
