"""Which pairs of a row and a run of 128 columns a sampled backward keeps, and by what factor (docs/maths.md, eq. 24).

A pair of cost c is kept with probability min(1, c / tau), rounded up to a multiple of 2^-31, and counts for the
inverse of exactly that. Random numbers are a counter's: (draw, row, run of columns) gives the same one anywhere, so
nothing is stored between forward and backward, and no generator's state is read or moved. Nothing here waits for the
device. The counter is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, doi.org/10.1145/2660193.2660195).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.core.counter import GOLDEN, STEPS, signed

ONE = 1 << 31  # the probability 1
OCTAVE_BITS = 5  # 32 bins per factor of two
BINS = 64 << OCTAVE_BITS  # 64 octaves below the largest cost; what is lighter counts as at their end


def mix(value: Tensor) -> Tensor:
    """SplitMix64's output of each counter, int64; overwrites `value`."""
    for shift, factor in STEPS:
        value.bitwise_xor_((value >> shift).bitwise_and_((1 << 64 - shift) - 1))  # a logical shift
        value.mul_(signed(factor))
    return value


def uniform(key: int, rows: Tensor, runs: int) -> Tensor:
    """31 random bits per pair of a row id and a run. [R, runs] int64"""
    base = mix(mix(rows * signed(GOLDEN) + key) ^ key)
    run = torch.arange(1, runs + 1, device=rows.device) * signed(GOLDEN)
    return (mix(base[:, None] + run) >> 33).bitwise_and_(ONE - 1)


def threshold(cost: Tensor, share: float, live: Tensor | None, group: str) -> Tensor:
    """tau: pairs of cost c are computed with probability min(1, c / tau), `share` of them by expectation. fp64 scalar

    cost: [R, runs] fp32; a pair of cost 0 is never computed. live: [R] rows that take part, all if None.

    Costs are counted in bins 2 % wide, the bins added up over the group: integers, whose sum has no order.
    """
    top = cost.amax().double() if cost.numel() else cost.new_zeros((), dtype=torch.float64)
    rows = torch.full_like(top, len(cost), dtype=torch.int64) if live is None else live.sum()
    if group:
        torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX, group=_group(group))
    top_bin = top.view(torch.int64) >> 52 - OCTAVE_BITS
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=cost.device)
    bins = (cost.double().view(torch.int64) >> 52 - OCTAVE_BITS).sub_(top_bin - (BINS - 1)).clamp_(0, BINS - 1)
    weight = (cost > 0.0).long()
    counts.index_add_(0, bins.flatten(), weight.flatten())
    counts[BINS] = rows * cost.shape[1]
    if group:
        torch.distributed.all_reduce(counts, group=_group(group))
    wanted, counts = share * counts[BINS].double(), counts[:BINS].double()
    edges = (top_bin - (BINS - 1) + torch.arange(BINS, device=cost.device)).clamp_min_(0) << 52 - OCTAVE_BITS
    edge = edges.view(torch.float64)  # [BINS] lower ends
    middle = edge * (1.0 + 0.5 / (1 << OCTAVE_BITS))
    above = counts.sum() - counts.cumsum(0)  # in heavier bins
    mass = (counts * middle).cumsum(0)  # in this bin and lighter ones
    # within a bin: all that is heavier for certain, itself and what is lighter in proportion
    tau = mass / (wanted - above).clamp_min(torch.finfo(torch.float64).tiny)
    fits = (above < wanted) & (tau >= edge)  # nothing from this bin down need be kept for certain
    found = torch.where(fits, torch.arange(BINS, device=cost.device), -1).amax()
    return torch.where(found >= 0, tau.gather(0, found.clamp_min(0)[None])[0], 0.0)


def chances(cost: Tensor, tau: Tensor) -> Tensor:
    """Probability of each pair in units of 2^-31, rounded up, 0 at cost 0. int64, as `cost`"""
    ratio = torch.where(cost >= tau, 1.0, cost.double() / tau)
    return torch.where(cost > 0.0, (ratio * ONE).ceil_(), 0.0).long()


def _group(name: str) -> torch.distributed.ProcessGroup:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)  # type: ignore[arg-type]
