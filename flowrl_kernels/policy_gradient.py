"""The front door of clipped policy gradients and of the critic's loss. Layouts as in `losses`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.core import checks
from flowrl_kernels.core.checks import one_of
from flowrl_kernels.core.correction import Bounds, corrected, metrics_of, sums_of
from flowrl_kernels.core.layout import check_tokens, normalizer_of, segments_of
from flowrl_kernels.core.settle import UNSET, rules_given
from flowrl_kernels.core.types import LossOutput
from flowrl_kernels.presets.row import bounds_of
from flowrl_kernels.reference import policy_gradient as pg

__all__ = ["Correction", "policy_gradient_loss", "rollout_correction", "value_loss"]


def policy_gradient_loss(
    logp: Tensor,
    logp_old: Tensor | None,
    advantage: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    clip: tuple[float | None, float | None] = UNSET,
    dual_clip: float | None = None,
    ratio: str = "token",
    kl: float | None = None,
    kl_kind: str = UNSET,
    kl_bound: float | None = None,
    logp_ref: Tensor | None = None,
    aggregate: str = "token-mean",
    normalizer: Tensor | float | None = None,
    horizon: float | None = None,
    logp_sampler: Tensor | None = None,
    correction: str | None = None,
    correction_cap: Bounds | float | str | None = None,
) -> LossOutput:
    """Clipped policy gradients: PPO and the methods that differ from it by a setting.

    PPO (arXiv 1707.06347): the defaults with `advantages.gae`; verl adds dual_clip=3. GRPO (arXiv 2402.03300):
    `group_normalize`, kl=0.001. DAPO (arXiv 2503.14476): clip=(0.8, 1.28). Dr.GRPO (arXiv 2503.20783):
    `group_normalize(scale=False)`, aggregate="seq-mean-token-sum-norm". GSPO (arXiv 2507.18071): ratio="sequence",
    clip=(1 - 3e-4, 1 + 4e-4), aggregate="seq-mean-token-mean". CISPO (arXiv 2506.13585): ratio="detached",
    clip=(None, 1.28). REINFORCE++ (arXiv 2501.03262): `reinforce_pp_advantage`. RAFT (arXiv 2304.06767): `raft`,
    ratio="none"; RAFT++ (arXiv 2504.11343): `raft`. Reinforce-Rej (arXiv 2504.11343): `reinforce_rej`.

    Args:
        logp: [B, T] or [N] log-probs of the sampled tokens under the policy, in nats.
        logp_old: the same under the policy that sampled. None is on-policy, as in TRL and Liger: `logp`, detached, so
            that the ratio is 1 and no bound acts.
        advantage: [B] per sequence, or the layout of `logp` per token (which packed tokens with N = B are read as).
            From `group_normalize` a group of one has 0 (verl: the raw reward).
        mask, cu_seqlens: as in `flowrl_loss`.
        clip: bounds (1 - eps_low, 1 + eps_high) of the ratio, either side None; (0.8, 1.2) if not given. None at all
            for ratio "none".
        dual_clip: upper bound c of the loss -c A for negative advantages, above 1, or None. For the ratios "token" and
            "sequence".
        ratio: "token", "sequence" (GSPO), "detached" (CISPO) or "none" (plain -A log pi).
        kl: coefficient of the penalty towards `logp_ref`, or None.
        kl_kind: "k1", "k2" (the `mse` of verl) or "k3" (if not given).
        kl_bound: a token's k3 is held within +-kl_bound, and has no gradient beyond (10 in verl). None, as in TRL and
            Liger: k3 is what it is up to a gap of 60 nats, and goes on as its tangent beyond, so that it stays finite.
        aggregate: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" or "seq-mean-token-sum-norm" (divided by
            `horizon`, T of a padded batch if None). A sequence without tokens counts in B (as in TRL and Liger; verl
            leaves it out: hand in `normalizer`).
        normalizer: replaces the count the mode divides by: tokens for "token-mean", sequences for the others. A tensor
            may be 0 where nothing counts.
        logp_sampler: log-probs as the rollout engine reported them; adds the `mismatch_*` metrics.
        correction, correction_cap: what is made of the gap to `logp_sampler`: see `rollout_correction`. The weights
            multiply the policy's loss and not the KL penalty (as in TRL and verl); rejected tokens leave every sum and
            count, unless `normalizer` is given.

    Returns:
        LossOutput(loss, residual [B]: mean token loss, weight [B]: mean ratio, metrics). `clipped` is the share of
        tokens whose ratio is beyond the bound on the side that the advantage pushes to; CISPO's too, as in TRL, though
        its cap also scales the tokens with A < 0.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    checks.floating("logp", logp)
    checks.floating("advantage", advantage)
    per_sequence = advantage.shape != logp.shape
    if per_sequence and advantage.dim() != 1:
        checks.fail("advantage", f"one number per sequence or shape {tuple(logp.shape)}", checks.shape(advantage))
    checks.same_device("advantage", advantage, "logp", logp)
    segments = segments_of(logp, mask, cu_seqlens, "logp", advantage if per_sequence else None, "advantage")
    check_tokens("logp_old", logp_old, logp)
    check_tokens("logp_ref", logp_ref, logp)
    check_tokens("logp_sampler", logp_sampler, logp)
    scalar = normalizer_of(normalizer, logp)
    rules = rules_given(correction, correction_cap)
    if rules and logp_sampler is None:
        checks.fail("logp_sampler", f"log-probs of the engine, for correction={correction!r}", None)
    one_of("ratio", ratio, ("token", "sequence", "detached", "none"))
    low, high = bounds_of((0.8, 1.2) if clip is UNSET else clip)
    if ratio == "none" and clip is not UNSET and (low, high) != (None, None):
        checks.fail("clip", "none beside ratio='none'", clip)
    if kl is None:
        for name, value in (("logp_ref", logp_ref), ("kl_bound", kl_bound), ("kl_kind", kl_kind)):
            if value is not None and value is not UNSET:
                checks.fail("kl", f"a coefficient beside {name}, which nothing else reads", None)
    kl_kind = "k3" if kl_kind is UNSET else kl_kind
    one_of("kl_kind", kl_kind, ("k1", "k2", "k3"))
    if kl_bound is not None:
        kl_bound = checks.positive("kl_bound", checks.setting("kl_bound", kl_bound))
        if kl_kind != "k3":
            checks.fail("kl_bound", f"None beside kl_kind={kl_kind!r}", kl_bound)
    modes = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    one_of("aggregate", aggregate, modes)
    if dual_clip is not None:
        dual_clip = checks.setting("dual_clip", dual_clip)
        if not dual_clip > 1.0:
            checks.fail("dual_clip", "a number above 1, or None", dual_clip)
        if ratio in ("detached", "none"):
            checks.fail("dual_clip", f"None beside ratio={ratio!r}, whose loss it does not bound", dual_clip)
    if kl is not None and logp_ref is None:
        checks.fail("logp_ref", "log-probs of the reference, for kl", None)
    if horizon is not None:
        horizon = checks.positive("horizon", checks.setting("horizon", horizon))
        if aggregate != "seq-mean-token-sum-norm":
            checks.fail("horizon", f"None beside aggregate={aggregate!r}, which does not divide by it", horizon)
    if kl is not None:
        kl = checks.setting("kl", kl)
        if not math.isfinite(kl):
            checks.fail("kl", "a finite number, or None", kl)
    if horizon is None and aggregate == "seq-mean-token-sum-norm" and cu_seqlens is not None:
        checks.fail("horizon", "the length to divide by, for packed tokens", None)
    length = max(logp.shape[1], 1) if horizon is None and logp.dim() == 2 else (horizon or 1)
    a = segments.clean(segments.spread(advantage.detach()) if per_sequence else advantage.detach())
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    logp = segments.clean(logp)
    old = logp.detach() if logp_old is None else segments.clean(logp_old.detach())
    metrics: dict[str, Tensor] = {}
    made = None
    if logp_sampler is not None:
        sampler = segments.clean(logp_sampler.detach())
        made = corrected(old, sampler, segments, rules) if rules else None
        metrics |= metrics_of(*sums_of(old, sampler, segments, made))
        segments = segments if made is None else segments._replace(mask=made.keep)
        logp, old, a = (segments.clean(t) for t in (logp, old, a))
    tokens, rho, clipped = pg.token_losses(logp, old, a, segments, ratio, (low, high), dual_clip)
    tokens = tokens if made is None else tokens * made.weight
    loss = pg.aggregate(tokens, segments, aggregate, scalar, length)
    if kl is not None and logp_ref is not None:
        penalty = pg.kl_penalty(logp, segments.clean(logp_ref.detach()), kl_kind, kl_bound)
        loss = loss + kl * pg.aggregate(penalty, segments, aggregate, scalar, length)
        metrics["kl"] = pg.aggregate(penalty.detach(), segments, "token-mean", None, length)
    with torch.no_grad():
        count = segments.total(torch.ones_like(tokens)).clamp_min(1.0)
        mean_loss, mean_ratio = segments.total(tokens) / count, segments.total(rho) / count
        used = (segments.total(torch.ones_like(tokens)) > 0).double()
        log_ratio = segments.total(logp.double() - old.double()) * used
        metrics |= {
            "clipped": pg.aggregate(clipped, segments, "token-mean", None, length),
            "weight_mean": (mean_ratio * used).sum() / used.sum().clamp_min(1.0),
            "log_ratio_old_mean": log_ratio.sum() / used.sum().clamp_min(1.0),
            "nonfinite": torch.maximum((~mean_loss.isfinite()).sum(), (~loss.to(dtype).isfinite()).long()).double(),
        }
    metrics = {name: value.detach().to(dtype) for name, value in metrics.items()}
    return LossOutput(loss.to(dtype), mean_loss.to(dtype), mean_ratio.to(dtype), metrics)


class Correction(NamedTuple):
    """What becomes of each token; in the layout of the log-probs.

    weight: fp32 (float64 for float64 inputs), detached; 0 where the token does not count or was rejected.
    keep: bool, True where it counts and was not rejected.
    metrics: 0-d, detached, on the device; over the tokens that count.
    """

    weight: Tensor
    keep: Tensor
    metrics: dict[str, Tensor]


def rollout_correction(
    logp_old: Tensor,
    logp_sampler: Tensor,
    correction: str | None = None,
    correction_cap: Bounds | float | str | None = None,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Correction:
    """The weight pi_old / pi_sampler of each token, for rollouts by an engine that is not quite the trainer's policy.

    Weights, by the token's ratio, the product over the sequence or the geometric mean of it: "token_truncate",
    "sequence_truncate", "geometric_truncate" hold it within the bounds (TIS, fengyao.notion.site/off-policy-rl);
    "token_mask", "sequence_mask", "geometric_mask" set it to 0 outside them (IcePop, arXiv 2510.18855). TRL's four
    modes have these names; verl's `rollout_is` is truncated for one bound and masked for two.

    Rejections, by verl's `rollout_rs`: "token_k1" to "seq_max_k3" take out tokens or sequences whose k1, k2 or k3
    (eq. 14, of the sampler against old), or its sum, mean or largest over the sequence, lies outside. "seq_mean_k1" is
    the geometric mean's. k1 bounds the ratio pi_sampler / pi_old, as verl does: (0.5, 2.0), or one number h for
    (1/h, h). k2 and k3 are bounded from above.

    Args:
        logp_old: [B, T] or [N] log-probs of the sampled tokens under the policy as the trainer scores it, in nats.
        logp_sampler: the same as the engine reported them.
        correction: one of the names, or a weight and a rejection joined by "+"; None: metrics alone.
        correction_cap: high or (low, high), either None for open; a text as verl writes it, "2.0", "0.5_5.0", or for
            two names "2.0,0.999_1.001". None: `core.correction.DEFAULTS`, verl's and TRL's values, where there is one.
        mask, cu_seqlens: as in `flowrl_loss`.

    Returns:
        Correction(weight, keep, metrics). `mismatch_kl` and `mismatch_k3`: KL(sampler || old) by k1 and k3, nats a
        token; `mismatch_max`: the largest |gap|; `mismatch_ess`: effective sample size (sum w)^2 / (n sum w^2) of the
        weights as used; `mismatch_cut`: share of tokens whose weight met a bound, or that were rejected.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    checks.floating("logp_old", logp_old)
    check_tokens("logp_sampler", checks.plain("logp_sampler", logp_sampler), logp_old)
    segments = segments_of(logp_old, mask, cu_seqlens, "logp_old")
    rules = rules_given(correction, correction_cap)
    old, sampler = segments.clean(logp_old.detach()), segments.clean(logp_sampler.detach())
    made = corrected(old, sampler, segments, rules)
    sums, largest = sums_of(old, sampler, segments, made if rules else None)
    dtype = torch.float64 if logp_old.dtype == torch.float64 else torch.float32
    metrics = {name: value.to(dtype) for name, value in metrics_of(sums, largest).items()}
    return Correction(made.weight.to(dtype), made.keep, metrics)


def value_loss(
    value: Tensor,
    returns: Tensor,
    *,
    old_value: Tensor | None = None,
    clip: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aggregate: str = "token-mean",
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """The critic's loss: half the squared error to `returns`, the larger one of the plain and the clipped value's.

    Args:
        value: [B, T] or [N] values of the states before each token.
        returns: the same layout, detached here.
        old_value: values at rollout time, for `clip`: only beside it.
        clip: how far the value may move from `old_value` (0.5 in verl), or None.
        mask, cu_seqlens, aggregate, normalizer: as in `policy_gradient_loss`.
    """
    checks.floating("value", value)
    check_tokens("returns", checks.plain("returns", returns), value)
    check_tokens("old_value", old_value, value)
    if clip is not None and old_value is None:
        checks.fail("old_value", "values at rollout time, for clip", None)
    if clip is not None:
        clip = checks.positive("clip", checks.setting("clip", clip))
    elif old_value is not None:
        checks.fail("clip", "how far the value may move, beside old_value, which nothing else reads", None)
    segments = segments_of(value, mask, cu_seqlens, "value")
    one_of("aggregate", aggregate, ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"))
    old = None if old_value is None else segments.clean(old_value.detach())
    tokens = pg.value_losses(segments.clean(value), old, segments.clean(returns.detach()), clip)
    loss = pg.aggregate(tokens, segments, aggregate, normalizer_of(normalizer, value), 1)
    return loss.to(torch.float64 if value.dtype == torch.float64 else torch.float32)
