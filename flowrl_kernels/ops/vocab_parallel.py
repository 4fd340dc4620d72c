"""`linear_logprob` over a vocabulary split across ranks: one MAX and one packed SUM all-reduce of [2 + K, N].

Every rank holds rows [start, start + V_local) of the head and all hidden states. Shards may differ in size, and heads
of different splits may share a group: the sizes are gathered in every forward (8 bytes a rank), for a rank cannot know
from its own shard whether the others have seen this head before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_kernels.core.dispatch import launchers
from flowrl_kernels.core.types import Head, LogProb, Needs, Saved
from flowrl_kernels.ops.linear_logprob import STEM, both_upstream, finish, rows_ignored
from flowrl_kernels.ops.operator import OnceDifferentiable, first_backward_only, without_autocast

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def shard(group: dist.ProcessGroup, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(first id of this rank's rows, whole vocabulary), int64 on the device: nothing here waits for it."""
    own = torch.tensor([rows], device=device)
    sizes = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    counts = torch.cat(sizes)
    return counts[: dist.get_rank(group)].sum(), counts.sum()


class VocabParallel(OnceDifferentiable):
    """logp like target, entropy [N] or None; gradients: own rows of the weight, hidden summed over the group."""

    name = "linear_logprob with vocab_parallel"

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: Tensor,
        logit_scale: float, softcap: float | None, ignore_index: int, entropy: bool, group: ProcessGroup, impl: str,
    ):  # fmt: skip
        start, vocab_size = shard(group, weight.shape[0], hidden.device)
        target = target.long()
        ignored = target == ignore_index
        wrong = ((target < 0) | (target >= vocab_size)) & ~ignored
        local = target - start
        elsewhere = (local < 0) | (local >= weight.shape[0])
        local = local.masked_fill(elsewhere, weight.shape[0]).masked_fill(ignored, -1)
        own_logp, (own_top, own_log_sum), ent, *_ = launchers(STEM, impl).linear_logprob_fwd(
            hidden, local, Head(weight, bias, temperature, logit_scale, softcap), entropy, False
        )
        # a MAX may lose a NaN: +inf cannot be lost, and makes the other ranks' masses 0 or NaN; the SUM spreads it
        top = own_top.masked_fill(own_top.isnan(), torch.inf)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        shift = own_top - top.clamp_min(torch.finfo(top.dtype).min)  # -inf in a shard that is all -inf
        shift = shift.masked_fill(own_top.isnan(), torch.nan)
        mass = (shift + own_log_sum).exp()
        back = (own_log_sum, shift, own_top)
        log_sum, up, own_top = back if target.dim() == 1 else (part[:, None] for part in back)
        picked = (own_logp + log_sum + up).masked_fill(own_top == -torch.inf, -torch.inf)  # z_y minus top
        picked = torch.where(elsewhere | ignored, 0.0, picked)
        moment = torch.zeros_like(mass)
        if entropy:
            moment = (mass * (ent - own_log_sum - shift)).masked_fill(mass == 0, 0.0)  # no mass, no part: 0 * -inf
        parts = torch.cat([mass[None], moment[None], picked[None] if target.dim() == 1 else picked.T])  # [2 + K, N]
        dist.all_reduce(parts, group=group)
        (total, moment), target_shifted = parts[:2], parts[2:].T.reshape(target.shape)
        nothing = rows_ignored(ignored)
        lse = torch.stack([top, total.log()]).masked_fill(nothing, 0.0)
        logp = finish(target_shifted - (lse[1] if target.dim() == 1 else lse[1, :, None]), ignored, wrong)
        whole = (moment / total + total.log()).masked_fill(nothing, 0.0) if entropy else None
        ctx.save_for_backward(hidden, weight, local, bias, temperature, logp, lse, whole, ignored)
        ctx.settings, ctx.group, ctx.impl = (logit_scale, softcap), group, impl
        ctx.set_materialize_grads(False)
        return logp, whole

    @staticmethod
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None):
        with torch.no_grad():
            gradients = without_autocast(VocabParallel._gradients)(ctx.saved_tensors[0], ctx, grad_logp, grad_entropy)
        return first_backward_only(VocabParallel.name, gradients, *ctx.saved_tensors[:2], grad_logp, grad_entropy)

    @staticmethod
    def _gradients(hidden: Tensor, ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple:
        _, weight, local, bias, temperature, logp, lse, whole, ignored = ctx.saved_tensors
        nothing = lse.new_empty((0, 0), dtype=torch.float16)
        dhidden, dweight, dbias = launchers(STEM, ctx.impl).linear_logprob_bwd(
            both_upstream(grad_logp, grad_entropy, logp, ignored), hidden, local,
            Head(weight, bias, temperature, *ctx.settings),
            Saved(logp, lse, lse.new_empty(0) if whole is None else whole, nothing),
            Needs(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]), wide_hidden=True,
        )  # fmt: skip
        if dhidden is not None:
            dist.all_reduce(dhidden, group=ctx.group)
            dhidden = dhidden.to(hidden.dtype)
        if dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dhidden, dweight, None, dbias, *(None,) * 7


def apply(
    hidden: Tensor, target: Tensor, head: Head, ignore_index: int, entropy: bool, group: dist.ProcessGroup, impl: str
) -> LogProb:
    """`VocabParallel` on structs, where autocast has had its say."""
    weight, bias, *dials = head
    with torch.autocast(hidden.device.type, enabled=False):
        return LogProb(*VocabParallel.call(hidden, weight, target, bias, *dials, ignore_index, entropy, group, impl))
