"""The front door of the losses: FlowRL and its family.

Tokens come padded, [B, T] with `mask` [B, T], or packed, [N] with `cu_seqlens` [B+1] (and, where tokens inside are to
be left out, `mask` [N]). Results do not depend on which.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flowrl_kernels import presets
from flowrl_kernels.core import checks, dispatch
from flowrl_kernels.core.correction import Bounds
from flowrl_kernels.core.settle import UNSET, Dials, Given, Settled, flow_settings, rules_given, settle
from flowrl_kernels.core.types import LossOutput
from flowrl_kernels.presets.row import bounds_of, phi_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["flowrl_loss", "residual_loss"]


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
    length_power: float = UNSET,
    anchor: str | None = UNSET,
    phi: str | float = UNSET,
    logp_sampler: Tensor | None = None,
    tis: str | None = UNSET,
    tis_cap: float = UNSET,
    correction: str | None = None,
    correction_cap: Bounds | float | str | None = None,
    normalizer: Tensor | float | tuple[float, float] | None = None,
    groups: Tensor | None = None,
    preset: str | None = None,
    cp_group: ProcessGroup | None = None,
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
        length_power: p of a weight |y|^-p of each sequence's squared residual besides w, 0. With sums (preset
            "length_true") p = 1 keeps the gradient's size about constant in |y|, p = 2 gives it the paper's scale.
        anchor: "ref", "old" or None.
        phi: the penalty: a number alpha, for ``L_alpha(d) = (e^((alpha-1) d) - (alpha-1) d - 1) / (alpha-1)^2`` (0 is
            the forward KL's and covers modes, 1 is d^2/2, 2 is the chi-square's; docs/maths.md, eq. 21-23), or
            "square" (twice alpha 1), "exp" (2), "exp_half" (1.5), "cosh" (2 plus 0), "abs". The exponent is held
            within +-60. Triton compiles its kernel anew for another number.
        logp_sampler: log-probs as the rollout engine reported them, for the second weight: only beside `tis` or
            `correction`.
        tis: "token", "mean" or "sequence": a second weight min(pi_old / pi_sampler, tis_cap).
        correction, correction_cap: in place of `tis`, any of `rollout_correction`. A sequence's weight is the mean over
            its tokens that stay, each bounded before (tis="token" bounds the mean). What is rejected leaves every sum
            and count; a sequence without a token left counts in B.
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
        length_normalize=length_normalize, length_power=length_power,
    )  # fmt: skip
    rules = rules_given(correction, correction_cap)
    if rules and cp_group is not None:
        checks.fail("correction", "None beside cp_group, where a rank has parts of sequences only", correction)
    given = Given(logp_ref, reward, log_z, logp_old, logp_sampler, mask, cu_seqlens, groups, normalizer)
    return _residual(logp, given, Dials(preset, presets.PRESETS["paper"], explicit, rules), cp_group, impl)


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
    phi: str | float = UNSET,
    length_power: float = UNSET,
    level: str = UNSET,
    log_z: Tensor | None = None,
    normalizer: Tensor | float | tuple[float, float] | None = None,
    preset: str | None = None,
    cp_group: ProcessGroup | None = None,
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
        ratio, clip, phi, length_power, mask, cu_seqlens, normalizer, preset, cp_group, impl: as in `flowrl_loss`.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """
    checks.one_of("center", center, (None, "detached", "through"))
    if center is not None and log_z is not None:
        checks.fail("log_z", f"None beside center={center!r}", "a tensor")
    if preset is not None:
        _anchor_of(preset, anchor)
    explicit = {
        "ratio": ratio, "phi": phi if phi is UNSET else phi_of(phi), "level": level,
        "clip": clip if clip is UNSET else bounds_of(clip),
        "scale": scale if scale is UNSET or scale is None else checks.setting("scale", scale),
        "length_power": length_power if length_power is UNSET else checks.setting("length_power", length_power),
    }  # fmt: skip
    partition: Any = {"detached": "group", "through": "through", None: UNSET if preset else None}[center]
    if log_z is not None:
        partition = log_z
    base = dataclasses.replace(presets.PRESETS["paper"], ratio=None, beta=1.0, anchor="old")
    given = Given(anchor, target, partition, logp_old, None, mask, cu_seqlens, groups, normalizer)
    return _residual(logp, given, Dials(preset, base, explicit), cp_group, impl, anchor_is_given=True)


def _anchor_of(preset: str, anchor: Tensor | None) -> None:
    wanted = presets.named(preset).anchor
    if wanted is not None and anchor is None:
        checks.fail("anchor", f"log-probs of the {wanted} policy, which preset={preset!r} subtracts", None)
    if wanted is None and anchor is not None:
        checks.fail("anchor", f"None, which preset={preset!r} sets", "a tensor")


def _residual(
    logp: Tensor, given: Given, dials: Dials, cp_group: ProcessGroup | None, impl: str, anchor_is_given: bool = False
) -> LossOutput:
    checks.floating("logp", logp)
    if cp_group is not None:
        checks.process_group("cp_group", cp_group)
    settled = settle(logp, given, dials, anchor_is_given)
    chosen = dispatch.resolve("residual" if cp_group is None else "context_parallel", impl, logp)
    if chosen != "reference":
        checks.no_tangent("logp", logp)
        checks.no_tangent("log_z", given.log_z)
    return run(logp, settled, cp_group, chosen)


def run(logp: Tensor, settled: Settled, cp_group: ProcessGroup | None, impl: str) -> LossOutput:
    """The loss of what is settled, by `impl`."""
    from flowrl_kernels.ops import context_parallel, residual

    row, anchors, each, segments = settled
    if cp_group is None:
        return residual.apply(row, logp, anchors, each, segments, impl)
    out = context_parallel.residual(row, logp, anchors, each, segments, cp_group, impl)
    return residual.output(*(value.to(residual.wide(logp)) for value in out))
