"""From an algorithm's name to calls of the library: what it needs, how it scores, what it minimises.

Every function here makes a head for `Policy.forward`: `head(policy, hidden [R, L, H])`, called inside the root's
forward where parameters are whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.packing import MicroBatch
from flowrl_kernels.trainer.policy import Policy

Head = Callable[[Policy, Tensor], Any]


class Needs(NamedTuple):
    """What has to be there before an update."""

    reference: bool  # log-probs under the frozen start
    old: bool  # log-probs (and values) under the policy as it sampled; else the current ones, detached
    log_z: bool
    value: bool


def needs(config: Config) -> Needs:
    """What the configured algorithm needs."""
    a = config.algorithm
    several = a.epochs > 1 or 0 < a.minibatch_prompts < config.rollout.prompts
    flow = a.name == "flowrl"
    ppo = a.name == "ppo"
    return Needs(
        reference=flow or a.kl > 0,
        old=several or ppo or a.tis_cap > 0 or (flow and a.log_z == "group") or (a.name == "reinforce_pp" and a.kl > 0),
        log_z=flow and a.log_z == "learned",
        value=ppo,
    )


class Scores(NamedTuple):
    logp: Tensor  # [N] fp32
    entropy: Tensor | None  # [N] fp32
    value: Tensor | None  # [N] fp32


def score_head(
    config: Config, batch: MicroBatch, *, temperature: float | None = None, entropy: bool = False
) -> Callable[[Policy, Tensor], Scores]:
    """Head: log-probs of the response tokens at the sampling temperature, and values where there is a critic."""
    from flowrl_kernels.functional import linear_logprob

    def head(actor: Policy, hidden: Tensor) -> Scores:
        rows = hidden.flatten(0, 1)[batch.predict]  # [N, H]
        out = linear_logprob(
            rows,
            actor.head.weight,
            batch.target,
            bias=getattr(actor.head, "bias", None),
            temperature=temperature or config.rollout.temperature,
            logit_scale=actor.logit_scale,
            softcap=actor.softcap,
            entropy=entropy,
            impl=config.parallel.impl,
        )
        return Scores(out.logp, out.entropy, None if actor.value is None else actor.value(rows))

    return head


def log_z(actor: Policy, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """[B] fp32: the learned log Z of each sequence's prompt, from the prompt's hidden states."""
    assert actor.log_z is not None
    return actor.log_z(hidden.flatten(0, 1)[batch.prompt], cu_seqlens=batch.prompt_cu_seqlens)


def make_loss(config: Config) -> Callable[..., Head]:
    """`loss(batch, tokens=, sequences=) -> head`, the head returning the library's LossOutput.

    tokens, sequences: of the whole update over all ranks and micro-batches; the normalisers.
    """
    return flow_loss(config) if config.algorithm.name == "flowrl" else gradient_loss(config)


def flow_loss(config: Config) -> Callable[..., Head]:
    """FlowRL and the squared-residual family: log-probs, residual and gradient in one fused call."""
    from flowrl_kernels.nn import LinearFlowRLLoss

    a = config.algorithm
    settings: dict[str, Any] = {"beta": a.beta, "preset": a.family or a.preset}
    if a.clip is not None:
        settings["clip"] = bounds(a.clip)
    if a.tis_cap > 0:
        settings |= {"tis": "sequence", "tis_cap": a.tis_cap}
    fused = LinearFlowRLLoss(temperature=config.rollout.temperature, impl=config.parallel.impl, **settings)

    def loss(batch: MicroBatch, *, tokens: int, sequences: int) -> Head:
        def head(actor: Policy, hidden: Tensor) -> Any:
            if a.log_z == "learned":
                zeta: Tensor | None = log_z(actor, hidden, batch)
            else:
                zeta = batch.per_sequence.get("log_z")
            return fused(
                hidden.flatten(0, 1)[batch.predict],
                actor.head.weight,
                batch.target,
                batch.logp_ref,
                batch.per_sequence["reward"],
                zeta,
                logp_old=batch.logp_old,
                logp_sampler=batch.logp_sampler if a.tis_cap > 0 else None,
                cu_seqlens=batch.cu_seqlens,
                normalizer=float(max(1, sequences)),
                bias=getattr(actor.head, "bias", None),
                logit_scale=actor.logit_scale,
                softcap=actor.softcap,
            )

        return head

    return loss


def bounds(clip: tuple[float, float]) -> tuple[float | None, float | None]:
    """(low, high) with infinities and a low of 0 meaning an open side."""
    low, high = clip
    return (low if low > 0 else None), (high if high != float("inf") else None)


def gradient_loss(config: Config) -> Callable[..., Head]:
    raise ValueError
