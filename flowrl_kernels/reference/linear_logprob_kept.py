"""`linear_logprob_kept` in plain torch: log-softmax of the whole row of logits, masked to the kept set."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.core.types import Kept, LogProb
from flowrl_kernels.reference.linear_logprob import product
from flowrl_kernels.reference.logprob import logprob


def linear_logprob_kept(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    kept: Kept,
    bias: Tensor | None = None,  # [V]
    temperature: Tensor | float = 1.0,  # [N] or a number
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
) -> LogProb:
    """As `linear_logprob`, the softmax over each row's kept ids and its target."""
    logits = product(hidden, weight, bias, target.long() == ignore_index) * logit_scale
    out = logprob(
        logits, target, temperature, softcap, ignore_index, entropy, kept=kept_mask(kept, target, weight.shape[0])
    )
    return LogProb(out.logp, out.entropy)


def kept_mask(kept: Kept, target: Tensor, vocab_size: int) -> Tensor:
    """What each row's softmax is over: its ids, and its target. [N, V] bool"""
    rows = torch.arange(len(target), device=target.device).repeat_interleave(kept.offsets.diff())
    mask = torch.zeros((len(target), vocab_size), dtype=torch.bool, device=target.device)
    mask[rows, kept.ids] = True
    mask.scatter_(1, target.long().clamp(0, vocab_size - 1)[:, None], True)
    return mask if kept.whole is None else mask | kept.whole[:, None]
