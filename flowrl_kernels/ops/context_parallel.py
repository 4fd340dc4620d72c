"""`cp_group=`: each rank holds some tokens of every sequence, and the loss is that of the whole sequences.

Three to seven all-gathers of [B] float64 forward, none backward. Every rank gets the whole loss and its share of the
gradient: summed over the group, the shares are the gradient. Of dL/dlog Z, which every rank knows, that is 1 / size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_kernels.chunked.context_parallel import sum_over_ranks
from flowrl_kernels.core.dispatch import check_enabled, launchers
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import Anchors, Sequences
from flowrl_kernels.ops.residual import wide
from flowrl_kernels.presets.row import Row
from flowrl_kernels.reference import residual as reference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STEM = "context_parallel"


class SumOverRanks(torch.autograd.Function):
    """The sum of the ranks' parts, for what every rank then computes alike.

    `shares`: the gradient that comes back is one of size equal shares, not the whole.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: ProcessGroup, shares: bool) -> Tensor:
        ctx.factor = dist.get_world_size(group) if shares else 1
        return sum_over_ranks(own, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        _first_order()
        return grad * ctx.factor, None, None


def _first_order() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError("cp_group: second derivatives over ranks are not computed; go without create_graph")


class Residual(torch.autograd.Function):
    """loss, residual [B], weight [B], metrics [12] of the whole sequences, with the gradient made in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        log_z: Tensor | None,
        group: dist.ProcessGroup,
        impl: str,
        row: Row,
        *rest: Any,
    ):
        anchor, old, sampler, reward, mask, cu_seqlens, groups, normalizer = rest
        loss, d, weight, metrics, dlogp, dlog_z = launchers(STEM, impl).residual_fwd(
            group, row, logp, Anchors(anchor, old, sampler), Sequences(reward, log_z, groups, normalizer),
            Segments(mask, cu_seqlens),
        )  # fmt: skip
        # unrounded, because a loss scale comes later
        ctx.save_for_backward(dlogp.to(wide(logp)), None if log_z is None else dlog_z.to(wide(logp)))
        ctx.dtypes = logp.dtype, None if log_z is None else log_z.dtype
        ctx.mark_non_differentiable(d, weight, metrics)
        return loss, d, weight, metrics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any):
        _first_order()
        grads = (None if t is None else (grad * t).to(dtype) for t, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *grads, *(None,) * 11


def residual(
    row: Row, logp: Tensor, anchors: Anchors, each: Sequences, segments: Segments, group: dist.ProcessGroup, impl: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, residual [B], weight [B] and metrics [12] of the whole sequences, the same bits on every rank."""
    reward, log_z, groups, normalizer = each
    if check_enabled():
        own = torch.stack([reward.new_tensor(len(reward), dtype=torch.float64), reward.double().sum()])
        if not torch.equal(sum_over_ranks(own, group), own * dist.get_world_size(group)):
            raise ValueError("reward: wanted the same sequences on every rank of cp_group; got other numbers elsewhere")
    # the value to the bit, the gradient as a share (which autograd gives of itself where own tokens meet log Z)
    if log_z is not None and not (impl == "reference" and row.level == "token"):
        log_z = log_z.detach() + (log_z - log_z.detach()) / dist.get_world_size(group)
    if impl == "reference":
        segments = segments._replace(over_ranks=lambda own: SumOverRanks.apply(own, group, False))
        terms = reference.residual(row, logp, anchors, each._replace(log_z=log_z), segments)
        loss = reference.total(row, terms, normalizer)
        with torch.no_grad():
            metrics = reference.metrics(terms, loss.to(wide(logp)))
        return loss, terms.residual, terms.weight, metrics
    return Residual.apply(logp, log_z, group, impl, row, *anchors, reward, *segments[:2], groups, normalizer)
