"""Axis letters and the results the public functions return.

Axis letters, the same everywhere: ``N`` packed tokens, ``B`` sequences (responses), ``T`` padded response slots,
``H`` hidden size, ``V`` vocabulary, ``G`` rollouts per prompt.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TILE = 128  # columns of the vocabulary that share one entry of the tile statistics
METRICS = (
    "residual_mean_abs", "residual_max_abs", "weight_mean", "weight_min", "weight_max", "clipped_low", "clipped_high",
    "log_ratio_old_mean", "log_ratio_ref_mean", "log_z_mean", "log_z_std", "nonfinite",
)  # fmt: skip


class LogProb(NamedTuple):
    """Log-probabilities of the targets, in nats.

    logp: [...] fp32 (float64 for float64 inputs); ignored rows hold 0.
    entropy: [...] of the same dtype, or None where it was not asked for; ignored rows hold 0.
    """

    logp: Tensor
    entropy: Tensor | None


class LossOutput(NamedTuple):
    """A loss and what a training log wants to know about it.

    loss: scalar, differentiable.
    residual: [B] detached, the flow-balance residual per sequence (for policy gradients: the mean token loss).
    weight: [B] detached, the importance weight per sequence.
    metrics: detached scalars kept on the device, so that reading none of them costs no synchronisation.
    """

    loss: Tensor
    residual: Tensor
    weight: Tensor
    metrics: dict[str, Tensor]
