"""The front door of the losses: FlowRL, its family, policy gradients and the value loss.

Tokens come padded, [B, T] with `mask` [B, T], or packed, [N] with `cu_seqlens` [B+1] (and, where tokens inside are to
be left out, `mask` [N]). Results do not depend on which.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels import checks, dispatch, presets
from flowrl_kernels.layout import check_tokens, normalizer_of, segments_of
from flowrl_kernels.ops.residual import NUM_METRICS
from flowrl_kernels.presets import CHOICES, CLIPS, Row, number
from flowrl_kernels.reference import policy_gradient as pg
from flowrl_kernels.reference import residual as reference
from flowrl_kernels.reference.residual import METRICS, Segments
from flowrl_kernels.types import LossOutput

__all__ = ["flowrl_loss", "policy_gradient_loss", "residual_loss", "value_loss"]

assert len(METRICS) == NUM_METRICS
UNSET: Any = ...  # an argument that was not given: a preset may set it
# what a module's constructor holds for `flowrl_loss`
SETTINGS = ("preset", "beta", "ratio", "clip", "length_normalize", "anchor", "phi", "tis", "tis_cap", "impl")


def flowrl_loss(
    logp: Tensor,
    logp_ref: Tensor | None,
    reward: Tensor,
    log_z: Tensor | str | None = UNSET,
    *,
    logp_old: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = UNSET,
    ratio: str | None = UNSET,
    clip: str | tuple[float | None, float | None] = UNSET,
    length_normalize: bool = UNSET,
    anchor: str | None = UNSET,
    phi: str = UNSET,
    logp_sampler: Tensor | None = None,
    tis: str | None = UNSET,
    tis_cap: float = UNSET,
    normalizer: Tensor | float | tuple[float, float] | None = None,
    groups: Tensor | None = None,
    preset: str | None = None,
    cp_group: Any = None,
    impl: str = "auto",
) -> LossOutput:
    """The FlowRL loss (arXiv 2509.15207, eq. 6), or the released variant that `preset` names.

    ``delta_b = log_z_b + mean_t(logp) - beta * reward_b - mean_t(logp_ref)`` over the response's tokens, and
    ``loss = sum_b w_b delta_b^2 / normalizer`` with ``w_b = clip(exp(sum_t(logp - logp_old)))``, detached.

    Args:
        logp: [B, T] or [N] log-probs of the sampled tokens under the policy, at the sampling temperature, in nats.
        logp_ref: the same under the reference model. Only None beside an explicit anchor that is another; beside a
            preset whose anchor is another it is not read.
        reward: [B], used as given: `group_normalize` is a call of its own.
        log_z: [B] (from `LogPartition`), "group" (mean of the group's beta r + mean(logp_ref - logp), detached),
            "through" (the same with its gradient), or None. Left out, the preset decides.
        logp_old: log-probs under the policy that sampled, recomputed by the trainer; None gives w = 1, and then an
            explicit ratio or clip is refused (a preset's rests).
        mask: bool or 0/1, True at response tokens (EOS in, padding and tool tokens out). Rows may be empty. What stands
            where it is False, in any tensor, reaches nothing: NaN and infinity too.
        cu_seqlens: [B+1] int boundaries of packed sequences, from 0 to N.
        beta: factor of the reward, 15.
        ratio: "sum" (the sequence's ratio, the paper's), "mean" (geometric), or None (w = 1).
        clip: (low, high) of the weight, either side None; or "paper" (0.8, 1.2), "release" (None, 10), "unclipped".
        length_normalize: False gives the trajectory-balance residual of sums instead of means.
        anchor: "ref", "old" or None.
        phi: "square", "exp", "exp_half", "cosh" or "abs".
        logp_sampler: log-probs as the rollout engine reported them, for the second weight: only beside `tis`.
        tis: "token", "mean" or "sequence": a second weight min(pi_old / pi_sampler, tis_cap).
        normalizer: what the sum over sequences is divided by; B if None. For gradient accumulation and data parallelism
            hand in the global number of sequences, or the pair (sequences, tokens), which suits every row: those of
            level "token" divide by tokens, and tb_ppo_style by both. A tensor costs no sync; it may be 0 where nothing
            counts, and then loss and gradients are 0.
        groups: [B] integer ids of the prompts, for log_z "group" and "through". A tensor `log_z` may stand in for
            "group" (the group's mean made elsewhere, say over micro-batches).
        preset: a row of `presets.PRESETS`; an explicit argument that contradicts it raises.
        cp_group: a ProcessGroup over whose ranks the tokens of every sequence are split (context parallelism). Tokens,
            mask and cu_seqlens are the rank's own, possibly none; what is [B], and the normalizer, is the same on every
            rank. Loss and metrics are those of the whole sequences. Gradients are the rank's share: *summed* over the
            group they are the gradient (log Z's is 1/size on each). Runs in torch, which impl="triton" refuses.
        impl: "auto", "reference", "chunked" or "triton".

    Returns:
        LossOutput(loss, residual [B], weight [B], metrics). Gradients reach `logp` and `log_z`. Sequences without
        tokens contribute nothing, but count in B (as in TRL; verl counts those with tokens: hand in `normalizer`).
        Second derivatives are exact (not with cp_group); forward mode is refused but by impl="reference".

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    explicit = flow_settings(
        beta=beta, ratio=ratio, anchor=anchor, phi=phi, tis=tis, tis_cap=tis_cap, clip=clip,
        length_normalize=length_normalize,
    )  # fmt: skip
    return _residual(
        logp, logp_ref, reward, log_z, logp_old, logp_sampler, mask, cu_seqlens, groups, normalizer, preset,
        presets.PRESETS["paper"], explicit, cp_group, impl,
    )  # fmt: skip


def residual_loss(
    logp: Tensor,
    target: Tensor,
    *,
    anchor: Tensor | None = None,
    logp_old: Tensor | None = None,
    scale: float | None = UNSET,
    center: str | None = None,
    groups: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ratio: str | None = UNSET,
    clip: str | tuple[float | None, float | None] = UNSET,
    phi: str = UNSET,
    level: str = UNSET,
    log_z: Tensor | None = None,
    normalizer: Tensor | float | tuple[float, float] | None = None,
    preset: str | None = None,
    cp_group: Any = None,
    impl: str = "auto",
) -> LossOutput:
    """The squared-residual family: ``d = a sum_t (logp - anchor) - target [- group mean]``, ``sum_b w phi(d) / n``.

    One form covers trajectory balance, TBA, VarGrad, REBEL, A*-PO, QRPO, SPPO, GVPO, AGRO, Kimi k1.5 and others:
    `presets.PRESETS` names each with its source, and says what to hand in as `target`.

    Args:
        logp: [B, T] or [N] log-probs under the policy.
        target: [B] what the scaled log-ratio should be, less the group's mean where `center` asks for it. With a preset
            it is multiplied by the preset's beta (1 for most).
        anchor: log-probs subtracted from `logp` per token, or None. Detached.
        logp_old: log-probs of the weight's denominator; None gives w = 1.
        scale: a: a number, or None for 1 / number of tokens.
        center: None, "detached" (VarGrad) or "through" (gradient through the group's mean).
        groups: [B] integer ids, for `center`.
        level: "sequence", or "token" for one residual per token.
        log_z: [B] learned partition, added to the residual, or None.
        ratio, clip, phi, mask, cu_seqlens, normalizer, preset, cp_group, impl: as in `flowrl_loss`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    _one_of("center", center, (None, "detached", "through"))
    if center is not None and log_z is not None:
        checks.fail("log_z", f"None beside center={center!r}", "a tensor")
    if preset is not None:
        _anchor_of(preset, anchor)
    explicit = {
        "ratio": ratio, "phi": phi, "level": level, "clip": clip if clip is UNSET else _clip(clip),
        "scale": scale if scale is UNSET or scale is None else number("scale", scale),
    }  # fmt: skip
    partition: Any = {"detached": "group", "through": "through", None: UNSET if preset else None}[center]
    if log_z is not None:
        partition = log_z
    base = dataclasses.replace(presets.PRESETS["paper"], ratio=None, beta=1.0, anchor="old")
    return _residual(
        logp, anchor, target, partition, logp_old, None, mask, cu_seqlens, groups, normalizer, preset, base, explicit,
        cp_group, impl, anchor_is_given=True,
    )  # fmt: skip


def _anchor_of(preset: str, anchor: Tensor | None) -> None:
    wanted = presets.named(preset).anchor
    if wanted is not None and anchor is None:
        checks.fail("anchor", f"log-probs of the {wanted} policy, which preset={preset!r} subtracts", None)
    if wanted is None and anchor is not None:
        checks.fail("anchor", f"None, which preset={preset!r} sets", "a tensor")


def flow_settings(*, clip: Any = UNSET, length_normalize: Any = UNSET, **explicit: Any) -> dict[str, Any]:
    """The arguments of `flowrl_loss` that set a row, under the row's names."""
    if clip is not UNSET:
        explicit["clip"] = _clip(clip)
    if length_normalize is not UNSET:
        explicit["length_normalize"] = checks.flag("length_normalize", length_normalize)
    for name in ("beta", "tis_cap"):
        if explicit.get(name, UNSET) is not UNSET:
            explicit[name] = number(name, explicit[name])
    return explicit


def check_settings(owner: str, settings: dict[str, Any]) -> None:
    """The settings a module holds, as far as its call would refuse them whatever the tensors.

    Raises:
        TypeError, ValueError: as the call would.
    """
    for name in settings:
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1) or SETTINGS
            raise TypeError(f"{owner}: unknown setting {name!r}; wanted {', '.join(near)}")
    explicit = {name: value for name, value in settings.items() if name not in ("preset", "impl")}
    settled_row(settings.get("preset"), presets.PRESETS["paper"], flow_settings(**explicit))
    _one_of("impl", settings.get("impl", "auto"), ("auto", *dispatch.IMPLS))


def settled_row(preset: str | None, base: Row, explicit: dict[str, Any]) -> Row:
    """The row of preset and explicit arguments; those that would change nothing in it are refused."""
    given = {name: value for name, value in explicit.items() if value is not UNSET}
    for name, value in given.items():
        if name in CHOICES:
            _one_of(name, value, CHOICES[name])
    row = presets.settle(preset, base, given)
    _check_row(row)
    if given.get("clip", (None, None)) != (None, None) and row.ratio is None:
        checks.fail("clip", "none beside ratio=None, where the weight is 1", given["clip"])
    if "tis_cap" in given and row.tis is None:
        checks.fail("tis_cap", "none beside tis=None, where there is no second weight", given["tis_cap"])
    if "length_normalize" in given and row.level == "token":
        checks.fail("length_normalize", f"nothing for the residual per token of preset={preset!r}", True)
    return row


def no_tangent(name: str, value: Any) -> None:
    """Forward mode would pass an operator by, unseen."""
    level = torch.autograd.forward_ad
    if torch.compiler.is_compiling() or level._current_level < 0 or not isinstance(value, Tensor):
        return
    if level.unpack_dual(value).tangent is not None:
        raise RuntimeError(f"{name}: forward-mode derivatives are not computed here; impl='reference' has them")


class Settled(NamedTuple):
    """A row with its tensors, checked: what every implementation reads."""

    row: Row
    anchor: Tensor | None
    old: Tensor | None
    sampler: Tensor | None
    reward: Tensor
    log_z: Tensor | None
    segments: Segments
    groups: Tensor | None
    normalizer: Tensor | None


def _residual(
    logp, logp_ref, reward, log_z, logp_old, logp_sampler, mask, cu_seqlens, groups, normalizer, preset, base, explicit,
    cp_group, impl, anchor_is_given=False,
) -> LossOutput:  # fmt: skip
    checks.floating("logp", logp)
    if cp_group is not None:
        checks.process_group("cp_group", cp_group)
    settled = settle(
        logp, logp_ref, reward, log_z, logp_old, logp_sampler, mask, cu_seqlens, groups, normalizer, preset, base,
        explicit, anchor_is_given,
    )  # fmt: skip
    chosen = dispatch.resolve("residual" if cp_group is None else "context_parallel", impl, logp)
    if chosen != "reference":
        no_tangent("logp", logp)
        no_tangent("log_z", log_z)
    row, anchor, old, sampler, reward, partition, segments, groups, scalar = settled
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    if cp_group is not None:
        from flowrl_kernels.ops import context_parallel

        given = (row, logp, anchor, old, sampler, reward, partition, segments, groups, scalar)
        return output(*(value.to(dtype) for value in context_parallel.residual(*given, cp_group, chosen)))
    if chosen == "reference":
        terms = reference.residual(row, logp, anchor, old, sampler, reward, partition, segments, groups)
        loss = reference.total(row, terms, scalar).to(dtype)
        with torch.no_grad():
            values = reference.metrics(terms, loss).to(dtype)
        return output(loss, terms.residual.to(dtype), terms.weight.to(dtype), values)
    from flowrl_kernels.ops.residual import residual as op

    loss, d, weight, values, _, _ = op(
        logp.contiguous(), partition, anchor, old, sampler, reward, segments.mask, segments.cu_seqlens, groups, scalar,
        row.codes(), row.packed_numbers(), chosen,
    )  # fmt: skip
    return output(loss, d, weight, values)


def output(loss: Tensor, residual: Tensor, weight: Tensor, metrics: Tensor) -> LossOutput:
    return LossOutput(loss, residual, weight, dict(zip(METRICS, metrics.unbind())))


def settle(
    logp, logp_ref, reward, log_z, logp_old, logp_sampler, mask, cu_seqlens, groups, normalizer, preset, base, explicit,
    anchor_is_given=False,
) -> Settled:  # fmt: skip
    """Preset and explicit arguments to one row, tensors checked against `logp` (of which only the layout is read)."""
    given_anchor, given_reward = ("anchor", "target") if anchor_is_given else ("logp_ref", "reward")
    row = settled_row(preset, base, explicit)
    for name in ("ratio", "clip"):
        value = explicit.get(name, UNSET)
        if logp_old is None and value is not UNSET and value not in (None, (None, None)):
            checks.fail("logp_old", f"log-probs of the policy that sampled, for {name}={value!r}", None)
    if logp_sampler is not None and row.tis is None:
        checks.fail("tis", "'token', 'mean' or 'sequence' beside logp_sampler, which nothing else reads", None)
    if explicit.get("anchor", UNSET) in (None, "old") and logp_ref is not None:  # a preset's anchor may leave it unread
        checks.fail("logp_ref", f"None beside anchor={row.anchor!r}, where nothing reads it", "a tensor")
    partition = log_z if isinstance(log_z, Tensor) else None
    if partition is None and log_z is not UNSET:
        if not (log_z is None or isinstance(log_z, str)) or log_z not in (None, "group", "through"):
            checks.fail("log_z", "a tensor [B], 'group', 'through' or None", repr(log_z))
        if preset is not None and log_z != row.log_z and not (log_z is None and row.log_z == "learned"):
            checks.fail("log_z", f"{row.log_z!r}, which preset={preset!r} sets", repr(log_z))
        row = dataclasses.replace(row, log_z=log_z)
    reward = checks.floating(given_reward, reward, dims=1)
    checks.same_device(given_reward, reward, "logp", logp)
    if groups is not None:
        checks.same_device("groups", checks.integers("groups", groups, tuple(reward.shape)), "logp", logp)
    segments = segments_of(logp, mask, cu_seqlens, "logp", reward, given_reward)
    for name, value in ((given_anchor, logp_ref), ("logp_old", logp_old), ("logp_sampler", logp_sampler)):
        check_tokens(name, value, logp)
    if partition is not None:
        checks.floating("log_z", partition, dims=1)
        if partition.shape != reward.shape:
            checks.fail("log_z", f"shape {tuple(reward.shape)} as reward has", checks.shape(partition))
        checks.same_device("log_z", partition, "logp", logp)
        if row.log_z in (None, "through"):
            checks.fail("log_z", f"{row.log_z!r}, which preset={preset!r} sets", checks.shape(partition))
    elif row.log_z == "learned":
        checks.fail("log_z", "a tensor [B], 'group', 'through', or log_z=None to go without", "nothing")
    elif row.log_z in ("group", "through"):
        if groups is None:
            checks.fail("groups", f"[B] integer ids, for log_z={row.log_z!r}", None)
        if row.level == "token":
            checks.fail("log_z", "a tensor or None at token level", repr(row.log_z))
    if anchor_is_given or row.anchor == "ref":
        anchor = logp_ref
        if anchor is None and not anchor_is_given:
            checks.fail("logp_ref", "log-probs of the reference (anchor='ref')", None)
    else:
        anchor = logp_old if row.anchor == "old" else None
        if row.anchor == "old" and logp_old is None:
            checks.fail("logp_old", "log-probs of the behaviour policy (anchor='old')", None)
    term = "gate" if row.gate else "drop" if row.drop else "surrogate" if row.surrogate is not None else None
    if term is not None and logp_old is None:
        checks.fail("logp_old", f"log-probs of the behaviour policy, for the {term} of preset={preset!r}", None)
    if row.tis is not None and (logp_sampler is None or logp_old is None):
        missing = "logp_sampler" if logp_sampler is None else "logp_old"
        checks.fail(missing, f"log-probs, for tis={row.tis!r}", None)
    divisor = normalizer_of(normalizer, logp, pair=True)
    if row.surrogate is not None and divisor is not None and divisor.numel() == 1:
        checks.fail("normalizer", f"(sequences, tokens): preset={preset!r} divides by both", "one number")
    anchor, old, sampler = (None if t is None else t.detach() for t in (anchor, logp_old, logp_sampler))
    return Settled(row, anchor, old, sampler, reward.detach(), partition, segments, groups, divisor)


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
    _one_of("ratio", ratio, ("token", "sequence", "detached", "none"))
    low, high = _clip((0.8, 1.2) if clip is UNSET else clip)
    if ratio == "none" and clip is not UNSET and (low, high) != (None, None):
        checks.fail("clip", "none beside ratio='none'", clip)
    if kl is None:
        for name, value in (("logp_ref", logp_ref), ("kl_bound", kl_bound), ("kl_kind", kl_kind)):
            if value is not None and value is not UNSET:
                checks.fail("kl", f"a coefficient beside {name}, which nothing else reads", None)
    kl_kind = "k3" if kl_kind is UNSET else kl_kind
    _one_of("kl_kind", kl_kind, ("k1", "k2", "k3"))
    if kl_bound is not None:
        kl_bound = checks.positive("kl_bound", number("kl_bound", kl_bound))
        if kl_kind != "k3":
            checks.fail("kl_bound", f"None beside kl_kind={kl_kind!r}", kl_bound)
    modes = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
    _one_of("aggregate", aggregate, modes)
    if dual_clip is not None:
        dual_clip = number("dual_clip", dual_clip)
        if not dual_clip > 1.0:
            checks.fail("dual_clip", "a number above 1, or None", dual_clip)
        if ratio in ("detached", "none"):
            checks.fail("dual_clip", f"None beside ratio={ratio!r}, whose loss it does not bound", dual_clip)
    if kl is not None and logp_ref is None:
        checks.fail("logp_ref", "log-probs of the reference, for kl", None)
    if horizon is not None:
        horizon = checks.positive("horizon", number("horizon", horizon))
        if aggregate != "seq-mean-token-sum-norm":
            checks.fail("horizon", f"None beside aggregate={aggregate!r}, which does not divide by it", horizon)
    if kl is not None:
        kl = number("kl", kl)
        if not math.isfinite(kl):
            checks.fail("kl", "a finite number, or None", kl)
    if horizon is None and aggregate == "seq-mean-token-sum-norm" and cu_seqlens is not None:
        checks.fail("horizon", "the length to divide by, for packed tokens", None)
    length = max(logp.shape[1], 1) if horizon is None and logp.dim() == 2 else (horizon or 1)
    a = segments.clean(segments.spread(advantage.detach()) if per_sequence else advantage.detach())
    dtype = torch.float64 if logp.dtype == torch.float64 else torch.float32
    logp = segments.clean(logp)
    old = logp.detach() if logp_old is None else segments.clean(logp_old.detach())
    tokens, rho, clipped = pg.token_losses(logp, old, a, segments, ratio, (low, high), dual_clip)
    scalar = normalizer_of(normalizer, logp)
    loss = pg.aggregate(tokens, segments, aggregate, scalar, length)
    metrics: dict[str, Tensor] = {}
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
        clip = checks.positive("clip", number("clip", clip))
    elif old_value is not None:
        checks.fail("clip", "how far the value may move, beside old_value, which nothing else reads", None)
    segments = segments_of(value, mask, cu_seqlens, "value")
    _one_of("aggregate", aggregate, ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"))
    old = None if old_value is None else segments.clean(old_value.detach())
    tokens = pg.value_losses(segments.clean(value), old, segments.clean(returns.detach()), clip)
    loss = pg.aggregate(tokens, segments, aggregate, normalizer_of(normalizer, value), 1)
    return loss.to(torch.float64 if value.dtype == torch.float64 else torch.float32)


def _clip(clip: Any) -> tuple[float | None, float | None]:
    if isinstance(clip, str):
        if clip not in CLIPS:
            checks.fail("clip", f"(low, high) or one of {', '.join(map(repr, CLIPS))}", repr(clip))
        return CLIPS[clip]
    if not (isinstance(clip, (tuple, list)) and len(clip) == 2):
        checks.fail("clip", f"(low, high) or one of {', '.join(map(repr, CLIPS))}", repr(clip))
    low, high = (None if bound is None else number("clip", bound) for bound in clip)
    if (low is not None and not low >= 0) or (high is not None and not high >= (low or 0.0)):
        checks.fail("clip", "0 <= low <= high", repr(clip))
    return low, high


def _one_of(name: str, value: Any, wanted: tuple) -> None:
    if not (value is None or isinstance(value, str)) or value not in wanted:  # == of an array is no answer
        checks.fail(name, f"one of {', '.join(map(repr, wanted))}", repr(value))


def _check_row(row: Row) -> None:
    for name in ("ratio", "anchor", "phi", "tis", "level"):
        _one_of(name, getattr(row, name), CHOICES[name])
    if not row.tis_cap > 0.0:
        checks.fail("tis_cap", "a number above 0", row.tis_cap)
    for name, value in (("beta", row.beta), ("scale", row.scale)):
        if value is not None and not abs(value) < math.inf:  # which a traced number can answer
            checks.fail(name, "a finite number", value)
