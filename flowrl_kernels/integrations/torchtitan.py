"""FlowRL in torchtitan's RL trainer (torchtitan 0.3.0): a loss that takes hidden states, so no logits are made.

    from flowrl_kernels.integrations.torchtitan import FlowRLLoss

    PolicyTrainer.Config(loss=FlowRLLoss.Config(settings={"beta": 15.0}, response_tokens=400.0), ...)

`PolicyTrainer` hands a `ChunkedLossWrapper` the final hidden states and the head. Both forms of its data are taken:
rows [B, L], as in 0.3.0, and flat [T], as since. There are no reference log-probs and no prompt ids in that call: the
anchor is the generator's policy, for which advantages that are centred per prompt hold the group's log Z.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.functional import linear_logprob
from flowrl_kernels.hf.head import call_head
from flowrl_kernels.losses import flowrl_loss

try:
    from torchtitan.components.loss import ChunkedLossWrapper
    from torchtitan.distributed.spmd_types import spmd_mesh_size
except ImportError as error:
    raise ImportError(
        f"flowrl_kernels.integrations.torchtitan was written for torchtitan==0.3.0, which pip installs: {error}"
    ) from error

__all__ = ["FlowRLLoss"]


class FlowRLLoss(ChunkedLossWrapper):
    """The FlowRL loss of packed rollouts, from hidden states.

    A response is a run of `loss_mask`: with several turns, each turn counts as a response of its own.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        preset: str = "release_old_anchor_no_log_z"
        """A row of flowrl_kernels.presets.PRESETS whose anchor is the behaviour policy, or none; log Z is left out."""

        settings: dict[str, Any] = field(default_factory=dict)
        """Others of `flowrl_loss`: beta, clip, ratio, phi, ..."""

        response_tokens: float = 1.0
        """Factor of the loss, which torchtitan divides by tokens: the usual length makes it a mean over responses."""

        impl: str = "auto"
        """Implementation of the kernels."""

    def __init__(self, config: Config, *, compile_config: Any = None):
        super().__init__(config, compile_config=compile_config)
        self.config = config

    def __call__(
        self,
        pred: Tensor,
        labels: Tensor,
        global_valid_tokens: Tensor | float | None = None,
        *,
        generator_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The scaled loss and metrics, which torchtitan sums over the ranks (`*/max`: maximises).

        Args:
            pred: [B, L, D] or [T, D] final hidden states, from a forward with `_skip_lm_head`.
            labels: [B, L] or [T] the tokens they predict.
            global_valid_tokens: what the sum over responses is divided by; this batch's tokens if None.
            generator_logprobs, advantages, loss_mask: the layout of labels. Tokens whose generator log-prob is not
                finite are left out, as torchtitan's own losses do.

        Raises:
            RuntimeError: no lm_head was set. ValueError: under tensor parallelism.
        """
        if self.lm_head is None:
            raise RuntimeError(
                "lm_head: wanted set_lm_head(model.lm_head) before the first call, as PolicyTrainer does"
            )
        if spmd_mesh_size("tp") > 1:
            raise ValueError("tp: wanted 1, for the whole head on each rank; got tensor parallelism")
        mask = loss_mask.bool() & generator_logprobs.isfinite()
        logp = self._logp(pred, labels.masked_fill(~mask, -100))
        starts, cu_seqlens = _responses(loss_mask.bool())
        tokens = mask.sum().clamp_min(1)
        total = tokens if global_valid_tokens is None else global_valid_tokens
        out = flowrl_loss(
            logp.reshape(-1),
            None,
            advantages.reshape(-1)[starts].float(),
            None,
            logp_old=generator_logprobs.reshape(-1).float(),
            mask=mask.reshape(-1),
            cu_seqlens=cu_seqlens,
            preset=self.config.preset,
            normalizer=total / self.config.response_tokens,
            impl=self.config.impl,
            **self.config.settings,
        )
        share = tokens / total
        metrics = {
            f"loss/flowrl_{name}/mean": value * share for name, value in out.metrics.items() if "max" not in name
        }
        metrics["loss/flowrl_residual/max"] = out.metrics["residual_max_abs"]
        metrics["loss/flowrl_weight/max"] = out.metrics["weight_max"]
        return out.loss, {"loss/mean": out.loss.detach(), **metrics}

    def _logp(self, pred: Tensor, labels: Tensor) -> Tensor:
        """Log-probs inside the head's own call, so that FSDP's hooks gather its weight and reduce its gradient."""
        head: Any = self.lm_head

        def forward(hidden: Tensor) -> Tensor:
            weight = head.weight.to(hidden.dtype)
            return linear_logprob(hidden, weight, labels, bias=getattr(head, "bias", None), impl=self.config.impl).logp

        return call_head(head, forward, pred)


def _responses(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(index of each response's first token [R], boundaries [R + 1] over the flat tokens): runs of the mask. One sync.

    A batch without responses gives one that is empty.
    """
    before = torch.nn.functional.pad(mask, (1, 0))[..., :-1]  # within its row
    starts = (mask & ~before).reshape(-1).nonzero()[:, 0]
    starts = torch.cat((starts, starts.new_zeros(int(len(starts) == 0))))
    edges = torch.cat((starts.new_zeros(1), starts[1:], starts.new_full((1,), mask.numel())))
    return starts, edges
