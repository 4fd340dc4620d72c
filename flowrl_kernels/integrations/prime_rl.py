"""FlowRL as prime-rl's custom loss (`src/prime_rl/trainer/rl/loss.py`, read at commit 559b447, v0.8.0).

    [trainer.loss]
    type = "custom"
    import_path = "flowrl_kernels.integrations.prime_rl.flowrl"
    kwargs = { beta = 15.0, response_tokens = 400.0 }

prime-rl hands over one sequence at a time and no prompt ids, so the loss runs without log Z. Its advantages are centred
per prompt, though, which with the behaviour policy as anchor is the group's log Z. Nothing of prime-rl is imported.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.losses import flowrl_loss

__all__ = ["LossOutputs", "flowrl"]


class LossOutputs(NamedTuple):
    """The two attributes that prime-rl reads."""

    loss: Tensor  # scalar
    metrics: dict[str, Tensor]  # 0-d each


def flowrl(
    inputs: Any,
    *,
    preset: str = "release_old_anchor_no_log_z",
    response_tokens: float = 1.0,
    **settings: Any,
) -> LossOutputs:
    """The FlowRL loss of one sequence.

    Args:
        inputs: prime-rl's `LossInputs`: trainer_logprobs, inference_logprobs, ref_logprobs (or None), advantages,
            loss_mask and loss_weights (or None), each [seq] with the prompt in front. The reward is the mean of the
            advantages over the mask; loss_weights multiply the loss by theirs.
        preset: a row of `flowrl_kernels.presets.PRESETS`; log Z is left out. Those with the reference as anchor
            ("release_no_log_z") want ref_logprobs, which prime-rl has for algorithms that score a reference.
        response_tokens: factor of the loss. prime-rl divides the sum over sequences by the batch's *tokens*: the usual
            length of a response makes that a mean over sequences. (A sequence's own length would weigh long ones more.)
        settings: others of `flowrl_loss`: beta, clip, ratio, tis, ...

    Raises:
        TypeError, ValueError: as `flowrl_loss`.
    """
    mask = inputs.loss_mask[None]  # [1, seq]

    def mean(value: Tensor) -> Tensor:
        return torch.where(mask[0], value.detach().float(), 0.0).sum() / mask.sum().clamp_min(1)

    out = flowrl_loss(
        inputs.trainer_logprobs[None],
        None if inputs.ref_logprobs is None else inputs.ref_logprobs[None],
        mean(inputs.advantages)[None],
        None,
        logp_old=inputs.inference_logprobs[None],
        mask=mask,
        preset=preset,
        **settings,
    )
    scale = response_tokens if inputs.loss_weights is None else response_tokens * mean(inputs.loss_weights)
    return LossOutputs(out.loss * scale, {f"flowrl/{name}": value for name, value in out.metrics.items()})
