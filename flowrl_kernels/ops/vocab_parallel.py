"""`linear_logprob` over a vocabulary split across ranks: one MAX and one packed SUM all-reduce of [N, 3].

Every rank holds rows [start, start + V_local) of the head and all hidden states. Shards may differ in size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl_kernels.dispatch import launchers
from flowrl_kernels.ops.linear_logprob import STEM, finish


@lru_cache(maxsize=64)
def shard(group: dist.ProcessGroup, rows: int, device: torch.device) -> tuple[int, int]:
    """(first id of this rank's rows, whole vocabulary). A collective, once per group and size of the own shard."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([rows], device=device), group=group)
    counts = [int(size) for size in sizes]
    return sum(counts[: dist.get_rank(group)]), sum(counts)


class VocabParallel(torch.autograd.Function):
    """logp [N], entropy [N] or None; gradients: own rows of the weight, hidden summed over the group."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: Tensor,
        logit_scale: float, softcap: float | None, ignore_index: int, entropy: bool, group: Any, impl: str,
    ):  # fmt: skip
        start, vocab_size = shard(group, weight.shape[0], hidden.device)
        target = target.long()
        ignored = target == ignore_index
        wrong = ((target < 0) | (target >= vocab_size)) & ~ignored
        local = target - start
        elsewhere = (local < 0) | (local >= weight.shape[0])
        local = local.masked_fill(elsewhere, weight.shape[0]).masked_fill(ignored, -1)
        picked, lse, ent, _ = launchers(STEM, impl).linear_logprob_fwd(
            hidden, weight, local, bias, temperature, logit_scale, softcap, entropy, False
        )
        top = lse.clone()
        dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
        shift = (lse - top).nan_to_num(nan=0.0, neginf=-1e4)  # a shard that is all -inf has no mass
        mass = shift.exp()
        parts = torch.stack([mass, picked, mass * (ent - shift) if entropy else torch.zeros_like(mass)])  # [3, N]
        dist.all_reduce(parts, group=group)
        total, target_logit, moment = parts
        lse = (top + total.log()).masked_fill(ignored, 0.0)
        logp = finish(target_logit, lse, ignored, wrong)
        whole = (moment / total + total.log()).masked_fill(ignored, 0.0) if entropy else None
        ctx.save_for_backward(hidden, weight, local, bias, temperature, lse, whole, ignored)
        ctx.settings, ctx.group, ctx.impl = (logit_scale, softcap), group, impl
        ctx.set_materialize_grads(False)
        return logp, whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None):
        hidden, weight, local, bias, temperature, lse, whole, ignored = ctx.saved_tensors
        grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp.to(lse.dtype).masked_fill(ignored, 0.0)
        if grad_entropy is not None:
            grad_entropy = grad_entropy.to(lse.dtype).masked_fill(ignored, 0.0).contiguous()
        need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        dhidden, dweight, dbias = launchers(STEM, ctx.impl).linear_logprob_bwd(
            grad_logp.contiguous(), grad_entropy, hidden, weight, local, bias, temperature, *ctx.settings, lse,
            lse.new_empty(0) if whole is None else whole, lse.new_empty((0, 0), dtype=torch.float16), 0.0, None, None,
            *need,
        )  # fmt: skip
        if dhidden is not None:
            summed = dhidden.to(lse.dtype)
            dist.all_reduce(summed, group=ctx.group)
            dhidden = summed.to(hidden.dtype)
        if dbias is not None:
            dbias = dbias.to(bias.dtype)
        return dhidden, dweight, None, dbias, *(None,) * 7
