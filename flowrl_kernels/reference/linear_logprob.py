"""Log-probabilities of the targets from hidden states: the specification (docs/maths.md, eq. 1-4)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.core.types import Kept, LogProb
from flowrl_kernels.reference.logprob import logprob


def linear_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N]
    bias: Tensor | None = None,  # [V]
    temperature: Tensor | float = 1.0,  # [N] or a number
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    kept: Kept | None = None,
) -> LogProb:
    """z = softcap(logit_scale (hidden weight^T + bias)) / temperature; logp = log_softmax(z)[target], over `kept`."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    ignored = target.long() == ignore_index
    hidden = hidden.masked_fill(ignored[:, None], 0.0)  # such a row may hold anything, and 0 * NaN is NaN
    logits = hidden.to(dtype) @ weight.to(dtype).T  # [N, V]
    if bias is not None:
        logits = logits + bias.to(dtype)
    mask = None if kept is None else kept_mask(kept, target, weight.shape[0])
    return logprob(logits * logit_scale, target, temperature, softcap, ignore_index, entropy, mask)


def kept_mask(kept: Kept, target: Tensor, vocab_size: int) -> Tensor:
    """What each row's softmax is over: its ids, and its target. [N, V] bool"""
    rows = torch.arange(len(target), device=target.device).repeat_interleave(kept.offsets.diff())
    mask = torch.zeros((len(target), vocab_size), dtype=torch.bool, device=target.device)
    mask[rows, kept.ids] = True
    mask.scatter_(1, target.long().clamp(0, vocab_size - 1)[:, None], True)
    return mask if kept.whole is None else mask | kept.whole[:, None]
