"""Settings and tensors of the flow losses, checked once: preset and arguments to one row, tensors to structs."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from flowrl_kernels import presets
from flowrl_kernels.core import checks, dispatch
from flowrl_kernels.core.correction import BOUND, Rule, by_sequence, corrected, rules_of
from flowrl_kernels.core.layout import check_tokens, normalizer_of, segments_of
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import Anchors, Sequences
from flowrl_kernels.presets.row import CHOICES, Row, bounds_of, phi_of

UNSET: Any = ...  # an argument that was not given: a preset may set it
# what a module's constructor holds for `flowrl_loss`
SETTINGS = (
    "preset", "beta", "ratio", "clip", "length_normalize", "length_power", "anchor", "phi", "tis", "tis_cap",
    "correction", "correction_cap", "impl",
)  # fmt: skip


def flow_settings(*, clip: Any = UNSET, length_normalize: Any = UNSET, **explicit: Any) -> dict[str, Any]:
    """The arguments of `flowrl_loss` that set a row, under the row's names."""
    if clip is not UNSET:
        explicit["clip"] = bounds_of(clip)
    if length_normalize is not UNSET:
        explicit["length_normalize"] = checks.flag("length_normalize", length_normalize)
    if explicit.get("phi", UNSET) is not UNSET:
        explicit["phi"] = phi_of(explicit["phi"])
    for name in ("beta", "length_power", "tis_cap"):
        if explicit.get(name, UNSET) is not UNSET:
            explicit[name] = checks.setting(name, explicit[name])
    return explicit


def dials_of(settings: dict[str, Any]) -> Dials:
    """What a module holds, as a call reads it."""
    own = ("preset", "impl", "correction", "correction_cap")
    explicit = {name: value for name, value in settings.items() if name not in own}
    rules = rules_given(settings.get("correction"), settings.get("correction_cap"))
    return Dials(settings.get("preset"), presets.PRESETS["paper"], flow_settings(**explicit), rules)


def check_settings(owner: str, settings: dict[str, Any]) -> None:
    """The settings a module holds, as far as its call would refuse them whatever the tensors.

    Raises:
        TypeError, ValueError: as the call would.
    """
    for name in settings:
        if name not in SETTINGS:
            near = difflib.get_close_matches(name, SETTINGS, n=1) or SETTINGS
            raise TypeError(f"{owner}: unknown setting {name!r}; wanted {', '.join(near)}")
    settled_row(*dials_of(settings)[:3])
    checks.one_of("impl", settings.get("impl", "auto"), ("auto", *dispatch.IMPLS))


def settled_row(preset: str | None, base: Row, explicit: dict[str, Any]) -> Row:
    """The row of preset and explicit arguments; those that would change nothing in it are refused."""
    given = {name: value for name, value in explicit.items() if value is not UNSET}
    for name, value in given.items():
        if name in CHOICES and name != "phi":
            checks.one_of(name, value, CHOICES[name])
    row = presets.settle(preset, base, given)
    _check_row(row)
    if given.get("clip", (None, None)) != (None, None) and row.ratio is None:
        checks.fail("clip", "none beside ratio=None, where the weight is 1", given["clip"])
    if "tis_cap" in given and row.tis is None:
        checks.fail("tis_cap", "none beside tis=None, where there is no second weight", given["tis_cap"])
    if "length_normalize" in given and row.level == "token":
        checks.fail("length_normalize", f"nothing for the residual per token of preset={preset!r}", True)
    if row.length_power != 0.0 and row.level == "token":
        checks.fail("length_power", "0 for the residual per token", row.length_power)
    return row


class Settled(NamedTuple):
    """A row with its tensors, checked: what every implementation reads."""

    row: Row
    anchors: Anchors
    each: Sequences
    segments: Segments


class Given(NamedTuple):
    """The tensors of a call as the user gave them, unchecked. `anchor` and `reward` go by their names at the door."""

    anchor: Any
    reward: Any
    log_z: Any
    old: Any
    sampler: Any
    mask: Any
    cu_seqlens: Any
    groups: Any
    normalizer: Any


class Dials(NamedTuple):
    """The settings of a call: a preset or a base, and what was given beside it."""

    preset: str | None
    base: Row
    explicit: dict[str, Any]
    rules: Sequence[Rule] = ()  # of the correction for the rollout engine


def settle(logp: Tensor, given: Given, dials: Dials, anchor_is_given: bool = False) -> Settled:
    """Preset and explicit arguments to one row, tensors checked against `logp` (of which only the layout is read)."""
    logp_ref, reward, log_z, logp_old, logp_sampler, mask, cu_seqlens, groups, normalizer = given
    preset, base, explicit, rules = dials
    given_anchor, given_reward = ("anchor", "target") if anchor_is_given else ("logp_ref", "reward")
    row = settled_row(preset, base, explicit)
    for name in ("ratio", "clip"):
        value = explicit.get(name, UNSET)
        if logp_old is None and value is not UNSET and value not in (None, (None, None)):
            checks.fail("logp_old", f"log-probs of the policy that sampled, for {name}={value!r}", None)
    if rules and row.tis is not None:
        checks.fail("correction", f"None beside tis={row.tis!r}, which is one", rules[0].name)
    if logp_sampler is not None and row.tis is None and not rules:
        checks.fail(
            "tis", "'token', 'mean' or 'sequence', or a correction, beside logp_sampler, which nothing else reads", None
        )
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
    if rules and (logp_sampler is None or logp_old is None):
        missing = "logp_sampler" if logp_sampler is None else "logp_old"
        checks.fail(missing, f"log-probs, for correction={rules[0].name!r}", None)
    divisor = normalizer_of(normalizer, logp, pair=True)
    if row.surrogate is not None and divisor is not None and divisor.numel() == 1:
        checks.fail("normalizer", f"(sequences, tokens): preset={preset!r} divides by both", "one number")
    anchor, old, sampler = (None if t is None else t.detach() for t in (anchor, logp_old, logp_sampler))
    each = Sequences(reward.detach(), partition, groups, divisor)
    if rules:
        row, sampler, segments = _corrected(row, old, sampler, segments, rules)
    return Settled(row, Anchors(anchor, old, sampler), each, segments)


def _corrected(
    row: Row, old: Any, sampler: Any, segments: Segments, rules: Sequence[Rule]
) -> tuple[Row, Tensor, Segments]:
    """Rejected tokens out of the mask, and the weights as what the second weight (eq. 10) comes to by its mean."""
    clean = segments.clean(old)
    made = corrected(clean, segments.clean(sampler), segments, rules)
    weight = by_sequence(made, segments).clamp_min(math.exp(-BOUND))  # of a masked one: nothing next to the others
    engine = (clean - segments.spread(weight.log())).to(old.dtype)
    return dataclasses.replace(row, tis="mean", tis_cap=math.exp(BOUND)), engine, segments._replace(mask=made.keep)


def rules_given(correction: Any, cap: Any) -> list[Rule]:
    """The rules of a correction, none for None."""
    if correction is None:
        if cap is not None:
            checks.fail("correction_cap", "None without correction, which says what it bounds", repr(cap))
        return []
    return rules_of(correction, cap)


def _check_row(row: Row) -> None:
    for name in ("ratio", "anchor", "tis", "level"):
        checks.one_of(name, getattr(row, name), CHOICES[name])
    phi_of(row.phi)
    if not row.tis_cap > 0.0:
        checks.fail("tis_cap", "a number above 0", row.tis_cap)
    for name, value in (("beta", row.beta), ("scale", row.scale), ("length_power", row.length_power)):
        if value is not None and not abs(value) < math.inf:  # which a traced number can answer
            checks.fail(name, "a finite number", value)
