"""Log-probabilities of the targets from logits: the specification (docs/maths.md, eq. 2-4)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.core.types import LogProb, LogProbStatistics


def logprob(
    logits: Tensor,  # [N, V]
    target: Tensor,  # [N] or [N, K]
    temperature: Tensor | float = 1.0,  # [N] or a number
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    statistics: bool = False,
    kept: Tensor | None = None,  # [N, V] bool: what the softmax is over, all if None
) -> LogProb | LogProbStatistics:
    """logp = log_softmax(softcap(logits) / temperature)[target]; a target outside the vocabulary gives NaN."""
    target = target.long()
    skipped = target == ignore_index  # like target
    ignored = skipped if target.dim() == 1 else skipped.all(1)  # [N]
    z = logits if logits.dtype == torch.float64 else logits.float()
    z = z.masked_fill(ignored[:, None], 0.0)  # such a row may hold anything, and 0 * NaN is NaN
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        if temperature.numel() > 1:
            temperature = temperature.masked_fill(ignored, 1.0)
        z = z / temperature.to(z.dtype).reshape(-1, 1)
    else:
        z = z / temperature
    if kept is not None:
        z = z.masked_fill(~(kept | ignored[:, None]), -torch.inf)
    known = (target >= 0) & (target < z.shape[-1])
    all_logp = torch.log_softmax(z, dim=-1)  # [N, V]
    ids = target.where(known, 0)
    logp = all_logp.gather(-1, ids[:, None])[:, 0] if target.dim() == 1 else all_logp.gather(-1, ids)  # like target
    logp = logp.where(known, logp.new_tensor(float("nan"))).where(~skipped, logp.new_zeros(()))
    ent = None
    if entropy:
        ent = _entropy(all_logp).where(~ignored, logp.new_zeros(()))
    if not statistics:
        return LogProb(logp, ent)
    z = z.detach()
    argmax = z.argmax(-1).masked_fill(ignored, -1)  # the first of equal ones
    is_top1 = (target == (argmax if target.dim() == 1 else argmax[:, None])) & ~skipped
    return LogProbStatistics(logp, ent, argmax, is_top1, z.mean(-1).masked_fill(ignored, 0.0))


def _entropy(all_logp: Tensor) -> Tensor:
    banned = all_logp == -torch.inf  # p log p -> 0, and its gradient with it
    plogp = all_logp.exp() * all_logp.masked_fill(banned, 0.0)
    return -plogp.sum(-1)
