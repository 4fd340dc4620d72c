"""The gap between the engine's log-probabilities and the trainer's: how large it is, and what the loss makes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.policy_gradient import Correction, rollout_correction
from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.batches import MicroBatch
from flowrl_kernels.trainer.config import AlgorithmConfig, Config
from flowrl_kernels.trainer.parallel import World


def correction(a: AlgorithmConfig) -> dict[str, str | float | None]:
    """The loss's settings of the correction, none where there is none."""
    if a.tis_cap > 0:
        return {"correction": "sequence_truncate", "correction_cap": a.tis_cap}
    return {"correction": a.correction, "correction_cap": a.correction_cap or None} if a.correction else {}


def check_correction(config: Config) -> None:
    """Refuses names and bounds that are none.

    Raises:
        ValueError: naming the key, what was wanted and what came.
    """
    a = config.algorithm
    if a.tis_cap > 0 and a.correction:
        raise ValueError(
            f"algorithm.tis_cap: wanted 0.0 beside algorithm.correction = {a.correction!r}; got {a.tis_cap}"
        )
    if a.correction_cap and not a.correction:
        raise ValueError(f"algorithm.correction_cap: wanted none without a correction; got {a.correction_cap!r}")
    try:
        rollout_correction(torch.zeros(1, 1), torch.zeros(1, 1), **correction(a))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"algorithm.{error}") from None


def corrected(config: Config, batch: MicroBatch) -> Correction | None:
    """What becomes of each response token; None before the policy's own log-probs are known."""
    token, own = batch.per_token, own_logp(batch)
    if own is None:
        return None
    return rollout_correction(own, token["sampler"], cu_seqlens=batch.cu_seqlens, **correction(config.algorithm))  # type: ignore[arg-type]


def own_logp(batch: MicroBatch) -> Tensor | None:
    """The policy's own log-probs at the step's start: "now" where the old ones are the sampler's, else "old"."""
    return batch.per_token.get("now", batch.per_token.get("old"))


def rejects(config: Config) -> bool:
    """Whether tokens can be taken out, so that less is left to divide by."""
    return any(
        name.strip()[-2:-1] == "k" for name in str(correction(config.algorithm).get("correction", "")).split("+")
    )


def recount(config: Config, updates: list[list[MicroBatch]], world: World) -> list[tuple[int, int]]:
    """Tokens and sequences of each update that are not rejected, over all ranks: what its loss divides by."""
    sums = []
    for batches in updates:
        tokens = sequences = 0
        for batch in batches:
            made = corrected(config, batch)
            if batch.live and made is not None:
                tokens += int(made.keep.sum())
                sequences += len(batch.segment()[made.keep].unique())
        sums.append([tokens, sequences])
    return [(int(t), int(s)) for t, s in parallel.total(torch.tensor(sums).to(world.device), world).tolist()]


def of_step(config: Config, batches: list[MicroBatch]) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """What adds up over ranks to a step's figures, as (sum, count), and the largest gap.

    Over the tokens whose log-probs under the policy as it sampled are known: all, or a few responses' where the loss
    does without (`loop.a_few`).
    """
    names = ("mismatch_kl", "mismatch_k3", "mismatch_cut", "mismatch_weight", "mismatch_square")
    sums, tokens, largest = torch.zeros(5, dtype=torch.float64), 0, -1.0
    for batch in batches:
        made = corrected(config, batch) if batch.live else None
        if made is None:
            continue
        token, m = batch.per_token, made.metrics
        weight = made.weight.double()
        if not correction(config.algorithm):
            own = own_logp(batch)
            assert own is not None
            weight = (own - token["sampler"]).double().clamp(-60.0, 60.0).exp()
        means = torch.stack([m["mismatch_kl"], m["mismatch_k3"], m["mismatch_cut"]]).double() * batch.tokens
        sums += torch.cat([means, torch.stack([weight.sum(), weight.square().sum()])]).cpu()
        tokens, largest = tokens + batch.tokens, max(largest, float(m["mismatch_max"]))
    if not tokens:
        return {}, {}
    return {name: (value, tokens) for name, value in zip(names, sums.tolist())}, {"mismatch_max": largest}


def finished(merged: dict[str, float]) -> dict[str, float]:
    """A step's figures with the effective sample size (a share of the tokens) in place of what it is made of."""
    if "mismatch_square" in merged:
        mean, square = merged.pop("mismatch_weight"), merged.pop("mismatch_square")
        merged["mismatch_ess"] = mean * mean / square if square > 0 else 0.0
    return merged
