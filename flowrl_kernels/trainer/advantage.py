"""From rewards to what the loss is given per sequence and per token; before packing, so groups may be split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.packing import MicroBatch
from flowrl_kernels.trainer.parallel import World

if TYPE_CHECKING:
    from flowrl_kernels.trainer.loop import Rollouts


@dataclass
class Shaped:
    """Per local sequence: whether it takes part, and named values."""

    keep: list[bool]
    values: dict[str, Tensor]  # [B] each


def shape(config: Config, rollouts: Rollouts, world: World) -> Shaped:
    """Rewards of all ranks together -> this rank's `reward` (flow) or `advantage` (policy gradients).

    A response without a reward is left out of its group's statistics and of the loss.
    """
    from flowrl_kernels import advantages

    a, r = config.algorithm, config.rollout
    local = [
        (number, float("nan") if reward is None else reward, len(response), float(logp.sum()))
        for number, reward, response, logp in zip(rollouts.numbers, rollouts.reward, rollouts.responses, rollouts.logp)
    ]
    rows = sorted(row for part in parallel.gather(local, world) for row in part)
    _, reward, length, logp = torch.tensor(rows, dtype=torch.float64).unbind(-1)  # [B] over all ranks
    group = torch.arange(len(rows)) // r.samples
    if a.overlong_buffer > 0:
        over = (length - (r.max_new_tokens - a.overlong_buffer)) / a.overlong_buffer
        reward = reward - a.overlong_penalty * over.clamp(0.0, 1.0)
    keep = reward.isfinite()
    if a.name == "flowrl":
        value = reward.clone()
        if a.reward != "raw":
            value[keep] = advantages.group_normalize(reward[keep], group[keep], scale=a.reward == "zscore")
    mine = torch.tensor(rollouts.numbers)
    return Shaped(keep[mine].tolist(), {"reward": value[mine].float(), "group": group[mine]})


def finish(config: Config, batches: list[MicroBatch], world: World) -> None:
    """What needs log-probs or values: the group's log Z, PPO's and REINFORCE++'s advantages."""
    a = config.algorithm
    if a.name == "flowrl" and a.log_z == "group":
        group_log_z(batches, a.beta)


def segment_mean(values: Tensor, batch: MicroBatch) -> Tensor:
    """[N] -> [B]: mean over each response."""
    total = values.new_zeros(batch.sequences).index_add_(0, batch.segment(), values)
    return total / batch.cu_seqlens.diff()


def group_log_z(batches: list[MicroBatch], beta: float) -> None:
    """log Z of each group as the mean of beta r + mean(logp_ref - logp) over it (VarGrad; no network, no gradient).

    Groups never span ranks, but may span micro-batches.
    """
    own = [
        beta * batch.per_sequence["reward"] + segment_mean(batch.logp_ref - batch.logp_old, batch)
        for batch in batches
        if batch.live
    ]
    if not own:
        return
    value, group = torch.cat(own), torch.cat([batch.per_sequence["group"] for batch in batches if batch.live])
    unique, inverse = group.unique(return_inverse=True)
    total = value.new_zeros(len(unique)).index_add_(0, inverse, value)
    count = value.new_zeros(len(unique)).index_add_(0, inverse, torch.ones_like(value))
    mean = (total / count)[inverse].split([batch.sequences for batch in batches if batch.live])
    for batch, log_z in zip((batch for batch in batches if batch.live), mean):
        batch.per_sequence["log_z"] = log_z
