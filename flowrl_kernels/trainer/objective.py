"""From an algorithm's name to calls of the library: what it needs, how it scores, what it minimises.

Every function here makes a head for `Policy.forward`: `head(policy, hidden [R, L, H])`, called inside the root's
forward where parameters are whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from flowrl_kernels.core.types import LossOutput, Sampled
from flowrl_kernels.logprobs import linear_logprob
from flowrl_kernels.losses import flowrl_loss
from flowrl_kernels.modules import LinearFlowRLLoss
from flowrl_kernels.policy_gradient import policy_gradient_loss, value_loss
from flowrl_kernels.presets import Row, named, phi_of
from flowrl_kernels.trainer import algorithms, mismatch
from flowrl_kernels.trainer.batches import MicroBatch
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.policy import Policy

Head = Callable[[Policy, Tensor], LossOutput]


class Loss(Protocol):
    """tokens, sequences: of the whole update over all ranks and micro-batches; the normalisers. update: its number in
    the run, by which a sampled backward draws."""

    def __call__(self, batch: MicroBatch, *, tokens: int, sequences: int, update: int) -> Head: ...


class Needs(NamedTuple):
    """What has to be there before an update."""

    reference: bool  # log-probs under the frozen start
    old: bool  # log-probs (and values) under the policy as it sampled; else the current ones, detached
    log_z: bool
    value: bool


def row(config: Config) -> Row:
    """The row of the family that a flowrl run minimises.

    Raises:
        ValueError: no such preset, or settings that only fit the paper's row beside another one.
    """
    a = config.algorithm
    chosen = named(a.preset or "paper")
    if a.clip is not None and a.preset not in ("", "paper"):
        raise ValueError(f"algorithm.clip: preset {a.preset!r} sets its own; leave it out")
    if chosen.tis is not None and (a.correction or a.tis_cap > 0):
        key = "algorithm.correction" if a.correction else "algorithm.tis_cap"
        raise ValueError(f"{key}: preset {a.preset!r} has a weight of its own for the sampler; leave it out")
    if a.alpha is not None and chosen.phi != "square":
        raise ValueError(f"algorithm.alpha: preset {a.preset!r} sets its own penalty, {chosen.phi!r}; leave it out")
    if a.alpha is not None:
        chosen = dataclasses.replace(chosen, phi=phi_of(a.alpha))
    return chosen if a.beta is None else dataclasses.replace(chosen, beta=a.beta)


def log_z_kind(config: Config) -> str | None:
    """ "learned", "group", "through" or None.

    Raises:
        ValueError: the config asks for a log Z and its preset has none.
    """
    wanted, own = config.algorithm.log_z, row(config).log_z
    if wanted == "preset":
        return own
    if own is None and wanted != "none":
        raise ValueError(f"algorithm.log_z: preset {config.algorithm.preset!r} has no log Z; got {wanted!r}")
    return None if wanted == "none" else wanted


def has_optimum(config: Config) -> bool:
    """Whether the row's minimum is ref * exp((beta r - log Z) / a), the policy at which every residual is 0.

    It is where the residual subtracts the reference and has a log Z that can normalise, one residual per response, and
    no second loss beside it. Without log Z the target need not sum to 1; beside the old policy no target is fixed.
    """
    chosen = row(config)
    return (
        chosen.anchor == "ref"
        and chosen.level == "sequence"
        and chosen.surrogate is None
        and log_z_kind(config) is not None
    )


def whole_groups(config: Config) -> bool:
    """Whether the loss takes the group's mean itself, with its gradient: then a group shares a micro-batch."""
    return algorithms.of(config).residual and log_z_kind(config) == "through"


def kl_in_reward(config: Config) -> bool:
    """Whether the KL penalty is paid per token, in the return; else it is added to the loss."""
    return algorithms.of(config).kl == "return" and config.algorithm.kl > 0


def weighs_sampler(config: Config) -> bool:
    """Whether a flowrl run's row has a weight of its own for the gap to the sampler."""
    return algorithms.of(config).residual and row(config).tis is not None


def needs(config: Config) -> Needs:
    """What the configured algorithm needs."""
    a, algorithm = config.algorithm, algorithms.of(config)
    corrects = bool(a.correction) or a.tis_cap > 0
    several = a.epochs > 1 or 0 < a.minibatch_prompts < config.rollout.prompts or config.rollout.overlap > 0
    if algorithm.residual:
        r, kind = row(config), log_z_kind(config)
        own = r.anchor == "old" or r.tis is not None or r.gate is not None or r.drop is not None
        old = several or own or r.token_weight or corrects or kind == "group"
        return Needs(reference=r.anchor == "ref", old=old, log_z=kind == "learned", value=False)
    old = several or algorithm.critic or kl_in_reward(config) or corrects
    return Needs(reference=a.kl > 0, old=old, log_z=False, value=algorithm.critic)


class Partial(NamedTuple):
    """How much of the head's backward pass is done, as `linear_logprob` takes it."""

    epsilon: float = 0.0
    report: Tensor | None = None  # [3], [4] beside a draw
    sampled: Sampled | None = None

    def reported(self, out: LossOutput) -> LossOutput:
        """`out` with what the backward pass will have reported among its metrics: it fills them in."""
        if self.report is not None:
            name, value = ("error_bound", 0) if self.sampled is None else ("error_estimate", 3)
            out.metrics.update({f"dlogits_{name}": self.report[value], "dlogits_share": self.report[1]})
        return out


EXACT = Partial()


def partial_of(config: Config, batch: MicroBatch, update: int) -> Partial:
    """What the configuration says, for one micro-batch; a draw is the run's seed, the update and the token's name."""
    p, device = config.parallel, batch.ids.device
    if p.share > 0:
        draw = Sampled(p.share, (config.run.seed, update), batch.rows, batch.order)
        return Partial(0.0, torch.zeros(4, device=device), draw)
    return Partial(p.epsilon, torch.zeros(3, device=device)) if p.epsilon > 0 else EXACT


def summed_alike(config: Config, batch: MicroBatch) -> Partial:
    """For log-probs without a gradient: a draw that nothing is drawn by, whose order gives them an update's bits."""
    if batch.order is None:
        return EXACT
    return Partial(sampled=Sampled(config.parallel.share, (0,), order=batch.order))


class Scores(NamedTuple):
    logp: Tensor  # [N] fp32
    entropy: Tensor | None  # [N] fp32
    value: Tensor | None  # [N] fp32


def score_head(
    config: Config,
    batch: MicroBatch,
    *,
    temperature: float | None = None,
    entropy: bool = False,
    partial: Partial | None = None,
) -> Callable[[Policy, Tensor], Scores]:
    """Head: log-probs of the response tokens at the sampling temperature, and values where there is a critic.

    Under truncated sampling they are over the tokens that were left to draw from, the reference's too.
    """

    def head(actor: Policy, hidden: Tensor) -> Scores:
        rows = batch.take(hidden, batch.predict)  # [N, H]
        out = linear_logprob(
            rows,
            actor.head.weight,
            batch.target,
            bias=getattr(actor.head, "bias", None),
            temperature=temperature or config.rollout.temperature,
            **actor.scales._asdict(),
            entropy=entropy,
            **(partial or summed_alike(config, batch))._asdict(),
            kept=batch.kept,
            impl=config.parallel.impl,
        )
        return Scores(out.logp, out.entropy, None if actor.value is None else actor.value(rows))

    return head


def log_z(actor: Policy, hidden: Tensor, batch: MicroBatch) -> Tensor:
    """[B] fp32: the learned log Z of each sequence's prompt, from the prompt's hidden states."""
    assert actor.log_z is not None
    return actor.log_z(batch.take(hidden, batch.prompt), cu_seqlens=batch.prompt_cu_seqlens)


def make_loss(config: Config) -> Loss:
    """`loss(batch, tokens=, sequences=) -> head`, the head returning the library's LossOutput."""
    return flow_loss(config) if algorithms.of(config).residual else gradient_loss(config)


def flow_loss(config: Config) -> Loss:
    """FlowRL and the squared-residual family: log-probs, residual and gradient in one fused call.

    Over kept tokens they are two calls: a row's kept set needs no [N, V] logits that one pass could share.
    """
    a, kind, chosen = config.algorithm, log_z_kind(config), row(config)
    settings: dict[str, Any] = {"beta": chosen.beta, "preset": a.preset or None, "impl": config.parallel.impl}
    if a.alpha is not None:
        settings["phi"] = chosen.phi
    if a.clip is not None:  # the paper's row with fields of one's own
        settings["preset"] = None
        # without log-probs of an older policy the weight is 1, and the loss takes no clip
        settings |= {"clip": bounds(a.clip)} if a.clip is not None and needs(config).old else {}
    settings |= mismatch.correction(a)
    fused = LinearFlowRLLoss(temperature=config.rollout.temperature, epsilon=config.parallel.epsilon, **settings)
    second = chosen.tis is not None or "correction" in settings

    def loss(batch: MicroBatch, *, tokens: int, sequences: int, update: int) -> Head:
        token, sequence = batch.per_token, batch.per_sequence

        def head(actor: Policy, hidden: Tensor) -> LossOutput:
            if kind == "learned":
                zeta: Tensor | str | None = log_z(actor, hidden, batch)
            else:
                zeta = sequence["log_z"] if kind == "group" else kind
            partial = partial_of(config, batch, update)
            tensors: dict[str, Any] = {
                "logp_old": token.get("old"),
                "logp_sampler": token["sampler"] if second else None,
                "cu_seqlens": batch.cu_seqlens,
                "groups": sequence["group"],
                "normalizer": (float(sequences), float(tokens)),
            }
            if batch.kept is not None:
                now = score_head(config, batch)(actor, hidden)
                return flowrl_loss(now.logp, token.get("ref"), sequence["reward"], zeta, **tensors, **settings)
            out = fused(
                batch.take(hidden, batch.predict),
                actor.head.weight,
                batch.target,
                token.get("ref"),
                sequence["reward"],
                zeta,
                **tensors,
                bias=getattr(actor.head, "bias", None),
                **actor.scales._asdict(),
                report=partial.report,
                sampled=partial.sampled,
            )
            return partial.reported(out)

        return head

    return loss


def bounds(clip: tuple[float, float]) -> tuple[float | None, float | None]:
    """(low, high) with infinities and a low of 0 meaning an open side."""
    low, high = clip
    return (low if low > 0 else None), (high if high != float("inf") else None)


def gradient_loss(config: Config) -> Loss:
    """The clipped policy gradients; a critic adds its value loss, and has an optimiser group of its own."""
    a, algorithm = config.algorithm, algorithms.of(config)
    clip, how = algorithm.clip if a.clip is None else bounds(a.clip), algorithm.aggregate
    assert how is not None
    kl = a.kl if a.kl > 0 and not kl_in_reward(config) else None
    corrects: dict[str, Any] = mismatch.correction(a)

    def loss(batch: MicroBatch, *, tokens: int, sequences: int, update: int) -> Head:
        token = batch.per_token

        def head(actor: Policy, hidden: Tensor) -> LossOutput:
            partial = partial_of(config, batch, update)
            now = score_head(config, batch, entropy=a.entropy > 0, partial=partial)(actor, hidden)
            if "old" not in token:
                token["now"] = now.logp.detach()  # for the log; there is one pass only
            made = mismatch.corrected(config, batch) if mismatch.rejects(config) else None
            out = policy_gradient_loss(
                now.logp,
                token.get("old"),
                token["advantage"],
                cu_seqlens=batch.cu_seqlens,
                ratio=algorithm.ratio,
                clip=clip,
                dual_clip=a.dual_clip or None,
                kl=kl,
                logp_ref=token.get("ref") if kl is not None else None,
                aggregate=how,
                horizon=config.rollout.max_new_tokens if how == "seq-mean-token-sum-norm" else None,
                normalizer=float(tokens if how == "token-mean" else sequences),
                logp_sampler=token["sampler"] if corrects else None,
                **corrects,
            )
            total = out.loss
            if now.entropy is not None:
                entropy = now.entropy if made is None else now.entropy * made.keep
                total = total - a.entropy * entropy.sum() / tokens
            if now.value is not None:
                value = value_loss(
                    now.value,
                    token["returns"],
                    old_value=token["value"] if a.value_clip else None,
                    clip=a.value_clip or None,
                    mask=None if made is None else made.keep,
                    cu_seqlens=batch.cu_seqlens,
                    normalizer=float(tokens),
                )
                total = total + value
                out.metrics["value_loss"] = value.detach()
            return partial.reported(out._replace(loss=total))

        return head

    return loss
