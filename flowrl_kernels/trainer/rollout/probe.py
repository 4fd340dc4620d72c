"""In step, and proved: after each push of weights the engine samples a few tokens, and the trainer weighs them too.

A push that is lost, late or partial, another temperature, another head: each shows as a gap here before anything is
trained on it. The gap is measured on what the engine says when it samples, the way rollouts are made.
"""

from __future__ import annotations

import numpy as np
import torch

from flowrl_kernels.trainer import objective, parallel
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.records import Run
from flowrl_kernels.trainer.rollout.base import Generated, Sampling
from flowrl_kernels.trainer.rollout.faults import EngineError

LIMIT = {"float32": 1e-4, "bfloat16": 0.5}  # nats a token; bfloat16 itself moves log-probabilities by .1 and more
PROMPTS, TOKENS = 4, 16


def limit(config: Config) -> float:
    """Largest gap that is let pass, nats."""
    return config.rollout.probe_limit or LIMIT[config.parallel.dtype]


def push(run: Run, version: int) -> None:
    """Hands the engine the policy's weights and proves that it samples from them; every rank calls it.

    version: updates that the weights have seen.

    Raises:
        EngineError: the engine cannot take them, names another version, or its log-probabilities are not the trainer's
            within `rollout.probe_limit`.
    """
    run.engine.update_weights(run.weights(), version)
    run.pushed = version
    if run.config.rollout.engine == "hf":  # the live model itself
        return
    run.probe_gap = gap(run, version)
    if not run.probe_gap <= limit(run.config):  # a NaN too
        raise EngineError(
            f"rollout.probe_limit: with weights {version} in the {run.config.rollout.engine} engine, "
            f"its log-probability of a sampled token and the trainer's are up to {run.probe_gap:.3g} nats apart (limit "
            f"{limit(run.config):.3g}): a push that was lost or partial, or another computation"
        )


@torch.no_grad()
def gap(run: Run, version: int) -> float:
    """Largest |engine - trainer| over the probe's tokens and all ranks, nats; NaN where one is."""
    config, policy = run.config, run.policy
    prompts = [run.text.encode(problem) for problem in run.problems[:PROMPTS]]
    # no stop: as many tokens on every rank, so ranks that hold shards of the model stay in step
    sampling = Sampling(min(TOKENS, config.rollout.max_new_tokens), config.rollout.temperature)
    out = run.engine.generate(prompts, 1, sampling, seed=version)
    check_version(out, run.pushed)
    batches = run.packed(range(len(prompts)), list(map(np.asarray, prompts)), list(out.tokens.numpy()), policy)
    worst = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        logp = policy(objective.score_head(config, batch), batch.ids, batch.positions, branch=batch.branch).logp
        sampled = torch.cat([out.logp[row] for row in batch.which.tolist()])
        worst = torch.maximum(worst, (logp.double().cpu() - sampled.double()).abs().max())
    far = torch.where(worst.isnan(), torch.inf, worst).reshape(1).to(run.world.device)
    return float(parallel.total(far, run.world, "max"))


def check_version(out: Generated, pushed: int) -> None:
    """Refuses responses that were not sampled from the weights pushed before they were asked for.

    Raises:
        EngineError: naming both versions.
    """
    if out.version != pushed:
        raise EngineError(
            f"rollout.engine: responses of weights {out.version} came, those of {pushed} updates were pushed last"
        )
