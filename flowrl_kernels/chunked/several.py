"""Several ids a row (docs/maths.md, eq. 32): a row of dlogits is -(sum of its gradients) p, but at its ids.

So a backward takes such a row as one without a target whose gradient is that sum, and puts the entries at its ids in
place of what it made there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.chunked.tiles import FLOOR
from flowrl_kernels.core.types import Upstream

PAIRS = 1 << 22  # comparisons of a row's ids with each other, at a time


class Several(NamedTuple):
    """The ids of some rows and the entries of dlogits there, before a soft cap's slope."""

    target: Tensor  # [R, K]; -1, or V and more, where there is none
    value: Tensor  # [R, K] equal where ids are

    def part(self, own: slice) -> Several:
        return Several(self.target[own], self.value[own])


class AsOne(NamedTuple):
    """Rows of several ids as rows without one."""

    live: Tensor  # [N] bool: rows that take part
    total: Tensor  # [N] sum of a row's gradients
    size: Tensor  # [N] sum of their magnitudes: no entry of dlogits is larger, before the row's factor
    value: Tensor  # [N, K] entries of dlogits at the ids, before the row's factor


def rows_of(target: Tensor) -> Tensor:
    """What a forward takes for a row's target: itself of one; of several -1 where none counts, else 0. [N]"""
    return target if target.dim() == 1 else (target >= 0).any(1).long() - 1


def as_one(grad: Upstream, target: Tensor, logp: Tensor, entropy: Tensor) -> AsOne:
    """grad.logp, target, logp [N, K], entropy [N] or [0]; the gradients of ids that do not count are 0.

    The entry at v is s (1 - p_v) - r p_v, where s is the sum of the gradients whose id is v and r that of the others:
    sums in float64, so that r is 0 where there are no others, and a confident row keeps its 1 - p.
    """
    gradient, dtype = grad.logp.double(), logp.dtype
    total, own = gradient.sum(1), torch.empty_like(gradient)
    step = max(1, PAIRS // target.shape[1] ** 2)
    for low in range(0, len(target), step):
        rows = slice(low, low + step)
        same = target[rows, :, None] == target[rows, None, :]
        own[rows] = torch.where(same, gradient[rows, None, :], 0.0).sum(2)
    p = logp.exp()
    value = own.to(dtype) * -torch.expm1(logp) - (total[:, None] - own).to(dtype) * p
    live = ((target >= 0) & (grad.logp != 0)).any(1)
    if grad.entropy is not None:
        value -= grad.entropy[:, None] * p * (logp.clamp_min(FLOOR) + entropy[:, None])
        live |= (target >= 0).any(1) & (grad.entropy != 0)
    return AsOne(live, total.to(dtype), gradient.abs().sum(1).to(dtype), value)


def pick(z: Tensor, local: Tensor) -> Tensor:
    """z at the columns `local` [R] or [R, K], anything where that is no column. Like local."""
    places = local.clamp(0, z.shape[1] - 1)
    return z.gather(1, places[:, None])[:, 0] if local.dim() == 1 else z.gather(1, places)


def put_(dz: Tensor, several: Several, start: int) -> None:
    """The entries at the ids among the columns from `start` on, over what dz [R, C] holds there."""
    local = several.target - start
    mine = (local >= 0) & (local < dz.shape[1])
    # an id that is elsewhere stands in for one of the row's that is here, or for column 0: no write meets another value
    first = mine.to(torch.uint8).argmax(1, keepdim=True)
    some = mine.gather(1, first)
    other = torch.where(some, local.gather(1, first), 0)
    value = torch.where(some, several.value.gather(1, first), dz[:, :1])
    dz.scatter_(1, torch.where(mine, local, other), torch.where(mine, several.value, value))
