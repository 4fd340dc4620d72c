"""Log-probabilities of the targets from hidden states: the specification (docs/maths.md, eq. 1-4)."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.core.types import LogProb, LogProbStatistics
from flowrl_kernels.reference.logprob import logprob


def linear_logprob(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [N] or [N, K]
    bias: Tensor | None = None,  # [V]
    temperature: Tensor | float = 1.0,  # [N] or a number
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    statistics: bool = False,
) -> LogProb | LogProbStatistics:
    """z = softcap(logit_scale (hidden weight^T + bias)) / temperature; logp = log_softmax(z)[target]."""
    ignored = target.long() == ignore_index
    ignored = ignored if target.dim() == 1 else ignored.all(1)
    logits = product(hidden, weight, bias, ignored) * logit_scale
    return logprob(logits, target, temperature, softcap, ignore_index, entropy, statistics)


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, ignored: Tensor) -> Tensor:
    """hidden weight^T + bias [N, V], in fp32 (float64 of float64); an ignored row's hidden state counts as 0."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden = hidden.masked_fill(ignored[:, None], 0.0)  # such a row may hold anything, and 0 * NaN is NaN
    logits = hidden.to(dtype) @ weight.to(dtype).T
    return logits if bias is None else logits + bias.to(dtype)
