"""From rewards to what the loss is given per sequence and per token; before packing, so groups may be split."""

from __future__ import annotations

import torch

from flowrl_kernels import advantages
from flowrl_kernels.trainer import algorithms, objective, parallel
from flowrl_kernels.trainer.batches import MicroBatch
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.records import Rollouts, Shaped


def shape(config: Config, rollouts: Rollouts, world: World) -> Shaped:
    """Rewards of all ranks together -> this rank's `reward` (flow) or `advantage` (policy gradients).

    A response without a reward is left out of its group's statistics and of the loss.
    """
    a, r, algorithm = config.algorithm, config.rollout, algorithms.of(config)
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
    value, members = reward[keep], group[keep]
    if a.unlikeliness > 0:
        mean_logp = logp[keep] / length[keep]
        value = advantages.unlikeliness_reward(value, mean_logp, members, strength=a.unlikeliness)
    mixed = advantages.group_normalize(value, members, scale=False).abs() > 1e-9
    equal = torch.ones_like(keep)
    equal[group[keep][mixed]] = False  # indexed by group: True where all its rewards are the same
    how = a.reward if algorithm.reward == "configured" else algorithm.reward
    if how in ("zscore", "centred"):
        value = advantages.group_normalize(value, members, scale=how == "zscore")
    elif how == "left out":
        value = advantages.leave_one_out(value, members)
    elif how == "by length":
        value = advantages.optimal_baseline(value, length[keep].long(), members)
    elif how == "good":
        value = advantages.raft(value)
    shaped = torch.full_like(reward, float("nan")).masked_scatter(keep, value)
    if how == "good":
        keep &= shaped > 0
    if a.filter_groups or algorithm.mixed:
        keep &= ~equal[group]
    mine = torch.tensor(rollouts.numbers)
    return Shaped(keep[mine].tolist(), {"reward": shaped[mine].float(), "group": group[mine]})


def finish(config: Config, batches: list[MicroBatch], world: World) -> None:
    """What needs log-probs or values: the group's log Z, advantages per token."""
    algorithm = algorithms.of(config)
    if algorithm.residual:
        if objective.log_z_kind(config) == "group":
            group_log_z(config, batches)
    elif algorithm.tokens != "all":
        token_advantages(config, batches, world)
    else:
        for batch in batches:
            batch.per_token["advantage"] = batch.per_sequence["reward"][batch.segment()]


def token_advantages(config: Config, batches: list[MicroBatch], world: World) -> None:
    """Advantages per token (with the critic's values: GAE; without: returns), whitened over all ranks' tokens."""
    a = config.algorithm
    for batch in batches:
        token, value = batch.per_token, batch.per_token.get("value")
        advantage, returns = advantages.gae(
            batch.per_sequence["reward"],
            torch.zeros_like(token["sampler"]) if value is None else value,
            torch.ones_like(batch.target, dtype=torch.bool),
            gamma=a.gamma,
            lam=1.0 if value is None else a.gae_lambda,
            cu_seqlens=batch.cu_seqlens,
            token_reward=-a.kl * (token["old"] - token["ref"]) if objective.kl_in_reward(config) else None,
        )
        token["advantage"], token["returns"] = advantage, returns
    live = [batch.per_token["advantage"].double() for batch in batches if batch.live]
    empty = torch.zeros(0, dtype=torch.float64, device=world.device)
    every = torch.cat([empty, *live])
    count, first = parallel.total(torch.stack([empty.new_tensor(len(every)), every.sum()]), world).tolist()
    mean = first / max(count, 1.0)
    square = float(parallel.total((every - mean).square().sum()[None], world))
    scale = (square / max(count - 1.0, 1.0) + 1e-8) ** -0.5
    for batch in batches:
        batch.per_token["advantage"] = (batch.per_token["advantage"] - mean) * scale


def group_log_z(config: Config, batches: list[MicroBatch]) -> None:
    """log Z of each group: the mean of beta r - a sum(logp_old - anchor) over it, a being 1/|y| or the row's number.

    VarGrad (arXiv 2010.10436): no network, no gradient. Groups never span ranks, but may span micro-batches.
    """
    row = objective.row(config)
    estimates = []
    for batch in batches:
        token, count = batch.per_token, batch.cu_seqlens.diff()
        own = token.get("now", token["old"])  # the policy's at the step's start
        moved = own if row.anchor is None else own - token[row.anchor]
        total = moved.new_zeros(batch.sequences).index_add_(0, batch.segment(), moved)
        total = total / count if row.scale is None else total * row.scale
        estimates.append((row.beta * batch.per_sequence["reward"] - total) if batch.live else total * 0)
    # a stand-in is in no group: its number is one that no group has
    group = [b.per_sequence["group"] if b.live else torch.full_like(b.per_sequence["group"], -1) for b in batches]
    _, inverse = torch.cat(group).unique(return_inverse=True)
    value = torch.cat(estimates)
    summed = torch.zeros_like(value).index_add_(0, inverse, value)
    members = torch.zeros_like(value).index_add_(0, inverse, torch.ones_like(value))
    mean = (summed / members.clamp_min(1.0))[inverse]
    for batch, log_z in zip(batches, mean.split([batch.sequences for batch in batches])):
        batch.per_sequence["log_z"] = log_z
