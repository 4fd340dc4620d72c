"""What one method of the squared-residual family sets: a row, and the same row as numbers.

A row is what `residual_loss` needs to know besides tensors (docs/maths.md, eq. 5-12). Rows named after the released
FlowRL code follow its commits, with exact means where the code adds 1e-8 to the count.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.core import checks

# what the fields that are words may be; an operator carries the places in these lists
CHOICES: dict[str, tuple[str | None, ...]] = {
    "level": ("sequence", "token"),
    "anchor": ("ref", "old", None),
    "log_z": ("learned", "group", "through", None),
    "ratio": ("sum", "mean", None),
    "phi": ("square", "exp", "exp_half", "cosh", "abs"),
    "tis": ("token", "mean", "sequence", None),
    "gate": ("clip_logp", "select", None),
}
# penalties with a name as (factor, alphas): the factor times the sum of their L_alpha (docs/maths.md, eq. 21)
PENALTIES: dict[str, tuple[float, tuple[float, ...]]] = {
    "square": (2.0, (1.0,)),
    "exp": (1.0, (2.0,)),
    "exp_half": (1.0, (1.5,)),
    "cosh": (1.0, (2.0, 0.0)),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """The settings of one method. Times are eq. numbers of docs/maths.md.

    level: "sequence" (one residual per response) or "token" (one per token, averaged over tokens).
    anchor: whose log-probs are subtracted: "ref", "old" or None.
    log_z: "learned" (a tensor [B] is wanted), "group" (the group's mean, detached), "through" (the group's mean, with
        its gradient) or None.
    scale: a of eq. 6: None for 1/|y|, or a number.
    length_power: p of the weight |y|^-p that a sequence's penalty carries besides (sequence level only): beside scale 1
        the residual is of sums, and its gradient's size goes as |y|^(1-p) where token scores are uncorrelated.
    ratio: the log-ratio behind the weight: "sum", "mean" or None (weight 1).
    clip: (low, high) bounds of the weight, either side None.
    token_weight: the weight is the token's own ratio, clipped (token level only).
    phi: a number, alpha of L_alpha, or "square", "exp", "exp_half", "cosh" or "abs".
    tis: second weight pi_old / pi_sampler: "token" (mean of the tokens' ratios), "mean" (geometric), "sequence" (their
        product), or None.
    tis_cap: its upper bound.
    gate: "clip_logp" or "select": the mean log-prob is clamped around the old one, with no gradient where it binds.
    gate_clip: (lo, hi) of the gate, as 1 - lo and 1 + hi.
    drop: (lo, hi) of CISPO's token mask, or None.
    surrogate: eps of the token-level PPO term of the joint loss, or None.
    beta: the reward's factor in the target.
    source: where the row is written.
    """

    source: str
    level: str = "sequence"
    anchor: str | None = "ref"
    log_z: str | None = "learned"
    scale: float | None = None
    length_power: float = 0.0
    ratio: str | None = "sum"
    clip: tuple[float | None, float | None] = (0.8, 1.2)
    token_weight: bool = False
    phi: str | float = "square"
    tis: str | None = None
    tis_cap: float = 2.0
    gate: str | None = None
    gate_clip: tuple[float, float] = (0.2, 0.28)
    drop: tuple[float, float] | None = None
    surrogate: float | None = None
    beta: float = 15.0

    def codes(self) -> list[int]:
        """The fields that are words or flags, as an operator carries them: places in CHOICES, then token_weight."""
        words = {name: getattr(self, name) for name in CHOICES}
        if not isinstance(self.phi, str):  # `numbers` has it
            words["phi"] = "square"
        return [wanted.index(words[name]) for name, wanted in CHOICES.items()] + [int(self.token_weight)]

    def numbers(self) -> list[float]:
        """The fields that are numbers; NaN stands for None."""
        low, high = self.clip
        drop_low, drop_high = (None, None) if self.drop is None else self.drop
        alpha = None if isinstance(self.phi, str) else self.phi
        fields = (
            self.scale, low, high, self.tis_cap, *self.gate_clip, drop_low, drop_high, self.surrogate, self.beta,
            self.length_power, alpha,
        )  # fmt: skip
        return [math.nan if value is None else value for value in fields]

    def packed_numbers(self) -> Tensor:
        """`numbers` as a float64 tensor on the CPU: a traced graph takes another beta without being traced again."""
        return torch.tensor(self.numbers(), dtype=torch.float64, device="cpu")


def row_of(codes: list[int], values: list[float]) -> Row:
    """The row behind `Row.codes` and `Row.numbers`, without its source."""
    words: dict[str, Any] = {name: wanted[i] for (name, wanted), i in zip(CHOICES.items(), codes)}
    scale, low, high, tis_cap, gate_low, gate_high, drop_low, drop_high, surrogate, beta, power, alpha = (
        None if math.isnan(value) else value for value in values
    )
    if tis_cap is None or gate_low is None or gate_high is None or beta is None or power is None:
        raise ValueError(f"row: wanted numbers for tis_cap, gate_clip, beta and length_power; got {values}")
    if alpha is not None:
        words["phi"] = alpha
    return Row(
        "", scale=scale, clip=(low, high), tis_cap=tis_cap, gate_clip=(gate_low, gate_high),
        drop=None if drop_low is None or drop_high is None else (drop_low, drop_high), surrogate=surrogate, beta=beta,
        length_power=power,
        token_weight=bool(codes[-1]), **words,
    )  # fmt: skip


def phi_of(value: Any) -> str | float:
    """`phi` as a row holds it: a name, or alpha as a float.

    Raises:
        TypeError, ValueError: it is neither.
    """
    names = CHOICES["phi"]
    if isinstance(value, bool) or not isinstance(value, (Tensor, numbers.Real, torch.SymFloat, torch.SymInt)):
        if not isinstance(value, str) or value not in names:
            wanted = ", ".join(map(repr, names))
            checks.fail("phi", f"a number (alpha of docs/maths.md, eq. 21) or one of {wanted}", repr(value))
        return value
    alpha = checks.setting("phi", value)
    if not abs(alpha) < math.inf:  # which a traced number can answer
        checks.fail("phi", "a finite number", alpha)
    return alpha


def penalty_of(phi: str | float) -> tuple[float, tuple[float, ...]]:
    """phi as (factor, alphas). Not of "abs", which is no L_alpha."""
    return PENALTIES[phi] if isinstance(phi, str) else (1.0, (phi,))


CLIPS: dict[str, tuple[float | None, float | None]] = {
    "paper": (0.8, 1.2),
    "release": (None, 10.0),
    "unclipped": (None, None),
}


def bounds_of(clip: Any) -> tuple[float | None, float | None]:
    if isinstance(clip, str):
        if clip not in CLIPS:
            checks.fail("clip", f"(low, high) or one of {', '.join(map(repr, CLIPS))}", repr(clip))
        return CLIPS[clip]
    if not (isinstance(clip, (tuple, list)) and len(clip) == 2):
        checks.fail("clip", f"(low, high) or one of {', '.join(map(repr, CLIPS))}", repr(clip))
    low, high = (None if bound is None else checks.setting("clip", bound) for bound in clip)
    if (low is not None and not low >= 0) or (high is not None and not high >= (low or 0.0)):
        checks.fail("clip", "0 <= low <= high", repr(clip))
    return low, high
