"""The residual where every rank holds some tokens of every sequence: its sums run over the ranks first.

All that sequences have in common with their tokens are sums over them (docs/maths.md, eq. 20), so the reduction sits in
`Segments.total`, and every row of the family comes out of the same code as on one rank.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_kernels.chunked import residual
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import Anchors, Sequences
from flowrl_kernels.presets.row import Row


def sum_over_ranks(own: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum of the ranks' `own`, in rank order: the same bits on every rank and in every run."""
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def residual_fwd(
    group: dist.ProcessGroup, row: Row, logp: Tensor, anchors: Anchors, each: Sequences, segments: Segments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`chunked.residual.residual_fwd` of the whole sequences; dlogp holds this rank's tokens, dlog_z is whole."""
    over_ranks = partial(sum_over_ranks, group=group)
    return residual.residual_fwd(row, logp, anchors, each, segments._replace(over_ranks=over_ranks))
