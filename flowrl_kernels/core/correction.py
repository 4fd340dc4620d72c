"""What a loss makes of a gap between the policy that sampled and the one the trainer scores (docs/maths.md, eq. 10).

A correction is a weight pi_old / pi_sampler, bounded, or a rejection of what lies too far off, or one of each. Names
and values are verl's (rollout_corr_helper.py: `rollout_is`, `rollout_rs`) and TRL's (`vllm_importance_sampling_mode`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.core import checks
from flowrl_kernels.core.segments import Segments

BOUND = 60.0  # a log-ratio beyond it is held, so that no weight is infinite
Bounds = tuple[float | None, float | None]


class Rule(NamedTuple):
    """One name, with its bounds."""

    name: str
    level: str  # "token", "sequence", "geometric"; of a rejection "token", "seq_sum", "seq_mean", "seq_max"
    how: str  # "truncate", "mask"; of a rejection the estimate that is bounded: "k1", "k2", "k3"
    bounds: Bounds


# what each name is bounded by where nothing else is said; None: say it. Weights bound the ratio; k1 bounds the ratio
# pi_sampler / pi_old, k2 and k3 their own value, from above
DEFAULTS: dict[str, Bounds | None] = {
    "token_truncate": (None, 2.0),  # verl: rollout_is = "token"; TRL, whose C_max is 3
    "token_mask": (0.5, 5.0),  # verl: rollout_is_threshold = "0.5_5.0", IcePop; TRL
    "sequence_truncate": (None, 2.0),  # verl: rollout_is = "sequence"; TRL
    "sequence_mask": (None, 3.0),  # TRL's default
    "geometric_truncate": (None, 2.0),
    "geometric_mask": (0.999, 1.001),
    "token_k1": None,
    "token_k2": None,
    "token_k3": None,
    "seq_sum_k1": (0.5, 2.0),  # verl: decoupled_seq_is_rs
    "seq_sum_k2": None,
    "seq_sum_k3": None,
    "seq_mean_k1": (0.999, 1.001),  # verl: decoupled_geo_rs
    "seq_mean_k2": None,
    "seq_mean_k3": (None, 0.01),  # verl: decoupled_k3_rs
    "seq_max_k2": None,
    "seq_max_k3": None,
}


def rules_of(correction: Any, cap: Any) -> list[Rule]:
    """The rules behind `correction` and its bounds.

    Raises:
        TypeError, ValueError: no such name, a second one of a kind, or bounds that do not fit it.
    """
    if not isinstance(correction, str):
        raise TypeError(f"correction: wanted a name, or two joined by '+'; got {correction!r}")
    names = [name.strip() for name in correction.split("+")]
    for name in names:
        checks.one_of("correction", name, tuple(DEFAULTS))
    rejects = [name[-2] == "k" for name in names]
    if len(names) > 2 or len(set(rejects)) < len(names):
        checks.fail("correction", "one weight, one rejection, or one of each", repr(correction))
    return [_rule(name, given) for name, given in zip(names, _caps(cap, len(names)))]


def _caps(cap: Any, count: int) -> list[Any]:
    if isinstance(cap, str):  # as verl writes them: 2.0 or 0.5_5.0, one for each name after a comma
        parts = [part.strip() for part in cap.split(",")]
        if len(parts) not in (1, count):
            checks.fail("correction_cap", f"{count} of them, by commas, for {count} names", repr(cap))
        try:
            numbers = [[float(x) for x in part.split("_")] if part else None for part in parts]
        except ValueError:
            numbers = [[math.nan] * 3]
        if any(found is not None and len(found) > 2 for found in numbers):
            checks.fail("correction_cap", "'high' or 'low_high', numbers", repr(cap))
        read = [None if n is None else n[0] if len(n) == 1 else (n[0], n[1]) for n in numbers]
        return read * (count // len(read))
    if count > 1 and cap is not None:
        checks.fail("correction_cap", "a text such as '2.0,0.999_1.001' for two names", repr(cap))
    return [cap] * count


def _rule(name: str, cap: Any) -> Rule:
    level, _, how = name.rpartition("_")
    if cap is None:
        default = DEFAULTS[name]
        if default is not None:
            return Rule(name, level, how, default)
        checks.fail("correction_cap", f"a bound for {name!r}, which has none of its own", None)
    low: float | None = None
    if isinstance(cap, (tuple, list)):
        if len(cap) != 2:
            checks.fail("correction_cap", "a number, or (low, high)", repr(cap))
        low, high = (None if bound is None else checks.setting("correction_cap", bound) for bound in cap)
    else:
        high = checks.setting("correction_cap", cap)
        low = 1.0 / high if how == "k1" and high > 0.0 else None
    if how in ("k2", "k3") and low is not None:
        checks.fail("correction_cap", f"an upper bound alone for {name!r}", repr(cap))
    if not (low or 0.0) >= 0.0 or not (math.inf if high is None else high) > 0.0 or (low or 0.0) > (high or math.inf):
        checks.fail("correction_cap", "numbers with 0 <= low <= high and high above 0", repr(cap))
    return Rule(name, level, how, (low, high))


class Corrected(NamedTuple):
    """What the rules make of each token; the layout of the tokens."""

    weight: Tensor  # float64; 0 where the token does not count or was rejected
    keep: Tensor  # bool: it counts and was not rejected
    cut: Tensor  # bool: it counts, and its weight met a bound or it was rejected


def corrected(old: Tensor, sampler: Tensor, segments: Segments, rules: Sequence[Rule]) -> Corrected:
    """The weight of each token and whether it stays, from log-probs that `segments.clean` has seen."""
    gap = old - sampler
    count = segments.total(torch.ones_like(gap)).clamp_min(1.0)
    weight, keep = torch.ones_like(gap), segments.mask
    cut = torch.zeros_like(keep)
    for rule in rules:
        if rule.how not in ("truncate", "mask"):
            keep = keep & _kept(rule, gap, count, segments)
            continue
        low, high = rule.bounds
        own = gap if rule.level == "token" else segments.total(gap) / (count if rule.level == "geometric" else 1.0)
        weight = own.clamp(-BOUND, BOUND).exp()
        inside = _within(weight, low, high)
        if rule.how == "mask":
            weight = torch.where(inside, weight, 0.0)
        elif rule.bounds != (None, None):
            weight = weight.clamp(low, high)
        if rule.level != "token":
            weight, inside = segments.spread(weight), segments.spread(inside)
        cut = ~inside
    return Corrected(torch.where(keep, weight, 0.0), keep, segments.mask & (cut | ~keep))


def _within(value: Tensor, low: float | None, high: float | None) -> Tensor:
    inside = value == value  # what is NaN lies nowhere
    inside = inside if low is None else inside & (value >= low)
    return inside if high is None else inside & (value <= high)


def _kept(rule: Rule, gap: Tensor, count: Tensor, segments: Segments) -> Tensor:
    held = gap.clamp(-BOUND, BOUND)
    value = {"k1": -held, "k2": 0.5 * held.square(), "k3": held.exp() - 1.0 - held}[rule.how]
    low, high = rule.bounds
    if rule.how == "k1":
        low, high = (None if bound is None else math.log(bound) if bound > 0 else -math.inf for bound in (low, high))
    if rule.level == "token":
        return _within(value, low, high)
    if rule.level == "seq_max":
        own = torch.where(segments.mask, value, 0.0)
        if segments.cu_seqlens is None:
            value = own.amax(1) if own.shape[1] else own.sum(1)
        else:
            value = torch.segment_reduce(own, "max", offsets=segments.cu_seqlens, axis=0, initial=0.0, unsafe=True)
    else:
        value = segments.total(value) / (count if rule.level == "seq_mean" else 1.0)
    return segments.spread(_within(value, low, high))


def by_sequence(made: Corrected, segments: Segments) -> Tensor:
    """One weight a sequence: the mean over the tokens that stay. [B]"""
    stay = segments._replace(mask=made.keep)
    return stay.total(made.weight) / stay.total(torch.ones_like(made.weight)).clamp_min(1.0)


# over tokens: how many, sampler - old, k3, weights and their squares, those cut. Of parts of a batch they add up
SUMS = ("tokens", "k1", "k3", "weight", "weight_square", "cut")


def sums_of(old: Tensor, sampler: Tensor, segments: Segments, made: Corrected | None) -> tuple[Tensor, Tensor]:
    """[6] float64 in the order of SUMS, and the largest |old - sampler|; without rules the weight is the ratio."""
    on = segments.mask
    gap = torch.where(on, old - sampler, 0.0)
    held = gap.clamp(-BOUND, BOUND)
    weight = torch.where(on, held.exp(), 0.0) if made is None else made.weight
    cut = torch.zeros_like(gap) if made is None else made.cut.double()
    k3 = held.exp() - 1.0 - held
    parts = torch.stack([part.double().sum() for part in (on, -gap, k3, weight, weight.square(), cut)])
    return parts, gap.abs().amax() if gap.numel() else gap.sum()


def metrics_of(sums: Tensor, largest: Tensor) -> dict[str, Tensor]:
    """KL(sampler || old) by k1 and k3, the largest gap, the effective sample size as a share, the share cut."""
    tokens, k1, k3, weight, square, cut = sums.unbind()
    count = tokens.clamp_min(1.0)
    return {
        "mismatch_kl": k1 / count,
        "mismatch_k3": k3 / count,
        "mismatch_max": largest,
        "mismatch_ess": weight.square() / (count * square).clamp_min(1e-300),
        "mismatch_cut": cut / count,
    }
