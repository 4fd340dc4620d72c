"""One table: which method of the squared-residual family sets what, and where that is written.

A row is what `residual_loss` needs to know besides tensors (docs/maths.md, eq. 5-12). Rows named after the released
FlowRL code follow its commits, with exact means where the code adds 1e-8 to the count.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels import checks

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


@dataclasses.dataclass(frozen=True)
class Row:
    """The settings of one method. Times are eq. numbers of docs/maths.md.

    level: "sequence" (one residual per response) or "token" (one per token, averaged over tokens).
    anchor: whose log-probs are subtracted: "ref", "old" or None.
    log_z: "learned" (a tensor [B] is wanted), "group" (the group's mean, detached), "through" (the group's mean, with
        its gradient) or None.
    scale: a of eq. 6: None for 1/|y|, or a number.
    ratio: the log-ratio behind the weight: "sum", "mean" or None (weight 1).
    clip: (low, high) bounds of the weight, either side None.
    token_weight: the weight is the token's own ratio, clipped (token level only).
    phi: "square", "exp", "exp_half", "cosh" or "abs".
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
    ratio: str | None = "sum"
    clip: tuple[float | None, float | None] = (0.8, 1.2)
    token_weight: bool = False
    phi: str = "square"
    tis: str | None = None
    tis_cap: float = 2.0
    gate: str | None = None
    gate_clip: tuple[float, float] = (0.2, 0.28)
    drop: tuple[float, float] | None = None
    surrogate: float | None = None
    beta: float = 15.0

    def codes(self) -> list[int]:
        """The fields that are words or flags, as an operator carries them: places in CHOICES, then token_weight."""
        return [wanted.index(getattr(self, name)) for name, wanted in CHOICES.items()] + [int(self.token_weight)]

    def numbers(self) -> list[float]:
        """The fields that are numbers; NaN stands for None."""
        low, high = self.clip
        drop_low, drop_high = (None, None) if self.drop is None else self.drop
        fields = (self.scale, low, high, self.tis_cap, *self.gate_clip, drop_low, drop_high, self.surrogate, self.beta)
        return [math.nan if value is None else value for value in fields]

    def packed_numbers(self) -> Tensor:
        """`numbers` as a float64 tensor on the CPU: a traced graph takes another beta without being traced again."""
        return torch.tensor(self.numbers(), dtype=torch.float64, device="cpu")


def row_of(codes: list[int], values: list[float]) -> Row:
    """The row behind `Row.codes` and `Row.numbers`, without its source."""
    words: dict[str, Any] = {name: wanted[i] for (name, wanted), i in zip(CHOICES.items(), codes)}
    scale, low, high, tis_cap, gate_low, gate_high, drop_low, drop_high, surrogate, beta = (
        None if math.isnan(value) else value for value in values
    )
    if tis_cap is None or gate_low is None or gate_high is None or beta is None:
        raise ValueError(f"row: wanted numbers for tis_cap, gate_clip and beta; got {values}")
    return Row(
        "", scale=scale, clip=(low, high), tis_cap=tis_cap, gate_clip=(gate_low, gate_high),
        drop=None if drop_low is None or drop_high is None else (drop_low, drop_high), surrogate=surrogate, beta=beta,
        token_weight=bool(codes[-1]), **words,
    )  # fmt: skip


def number(name: str, value: Any) -> float:
    """`value` as a float: a Python or numpy number, or a tensor of one that can be read without waiting.

    Raises:
        TypeError, ValueError: it is not one.
    """
    if isinstance(value, Tensor):
        if value.dim() == 0 and value.device.type == "cpu" and not value.requires_grad:
            return float(value)
        checks.fail(name, "a number (of a tensor: its .item(), for no gradient reaches it)", checks.shape(value))
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: wanted a number; got {value!r}")
    return float(value)


CLIPS: dict[str, tuple[float | None, float | None]] = {
    "paper": (0.8, 1.2),
    "release": (None, 10.0),
    "unclipped": (None, None),
}
RELEASE = (None, 10.0)
HARD = (0.8, 1.28)
CODE = "the authors' code"

PRESETS: dict[str, Row] = {
    "paper": Row("arXiv 2509.15207, eq. 6; eps is not stated there, 0.2 is assumed"),
    "release": Row(f"{CODE} since 27 Oct 2025, and verl-recipe: only the cap of 10", clip=RELEASE),
    "unclipped": Row(f"{CODE} at first release: the clip is computed and not used", clip=(None, None)),
    "no_is": Row(f"{CODE}, flowrl_no_is: w = 1 (the ablation of Table 3)", ratio=None),
    "hard": Row(f"{CODE}, flowrl_dual_clip and cispo_clip_ablation", clip=HARD),
    "tb_original": Row(f"{CODE}, original trajectory-balance loss: beta 1, w = 1", ratio=None, beta=1.0),
    "tb_ppo_style": Row(
        f"{CODE}, ppo-style joint loss; its surrogate has the sign of the code (-delta * ratio)",
        ratio=None,
        surrogate=0.2,
    ),
    "unclipped_geo": Row(f"{CODE}, 8-10 Oct 2025: w of the mean log-ratio", ratio="mean", clip=(None, None)),
    "clip_geo": Row(f"{CODE}, 8-10 Oct 2025: the same, clipped by the configuration", ratio="mean"),
    "release_tis_token": Row(f"{CODE}, 4-19 Oct 2025: cap 10 and a token mean", clip=RELEASE, tis="token"),
    "unclipped_tis_token": Row(f"{CODE}, 4-19 Oct 2025", clip=(None, None), tis="token"),
    "unclipped_geo_tis_geo": Row(
        f"{CODE}, 4-19 Oct 2025: both weights geometric", ratio="mean", clip=(None, None), tis="mean"
    ),
    "clip_geo_tis_geo": Row(f"{CODE}, 4-19 Oct 2025: the same, clipped", ratio="mean", tis="mean"),
    "release_tis_sum": Row(f"{CODE}, 4-19 Oct 2025: full product", clip=RELEASE, tis="sequence"),
    "release_clip_logp": Row(f"{CODE}, bee56756: mean log-prob clamped", clip=RELEASE, gate="clip_logp"),
    "release_gspo_select": Row(f"{CODE}, e487ddcb: clamped where PPO would clip", clip=RELEASE, gate="select"),
    "hard_gspo_select": Row(f"{CODE}, 9edb31b9: the same with [0.8, 1.28]", clip=HARD, gate="select"),
    "hard_cispo_drop": Row(f"{CODE}, 012150d6: tokens dropped as in CISPO", clip=HARD, drop=(0.2, 0.28)),
    "cispo_drop": Row("verl PR 3924: the same, bounds from its config (0.2/0.28)", clip=HARD, drop=(0.2, 0.28)),
    "release_old_anchor": Row(f"{CODE}, 2ef40712: the behaviour policy as reference", clip=RELEASE, anchor="old"),
    "release_no_log_z": Row(f"{CODE}, 2ef40712 on: log Z removed", clip=RELEASE, log_z=None),
    "release_old_anchor_no_log_z": Row(f"{CODE}, 6ea5d189 on", clip=RELEASE, anchor="old", log_z=None),
    "release_no_anchor_no_log_z": Row(f"{CODE}, 6e2ccf9e", clip=RELEASE, anchor=None, log_z=None),
    "token_old_anchor_no_log_z": Row(
        f"{CODE}, 7476a833: one residual per token",
        level="token", anchor="old", log_z=None, clip=HARD, token_weight=True,
    ),
    "token_no_anchor_no_log_z": Row(
        f"{CODE}, 307da4c9: no-log-z branch", level="token", anchor=None, log_z=None, clip=HARD, token_weight=True
    ),
    "token_log_z_beta30": Row("third party, b4280fb8: per token with log Z", level="token", clip=RELEASE, beta=30.0),
    "group": Row("VarGrad (arXiv 2010.10436) in the paper's residual: log Z is the group's mean", log_z="group"),
    "phi_exp": Row("verl_FlowRL fork: e^d - d - 1, cap 10", clip=RELEASE, phi="exp"),
    "phi_exp_half": Row("verl_FlowRL fork: 4 e^(d/2) - 2d - 4, cap 10", clip=RELEASE, phi="exp_half"),
    "phi_cosh": Row("verl_FlowRL fork: e^d + e^-d - 2, cap 10", clip=RELEASE, phi="cosh"),
    # relatives: the reward handed in is the method's own target divided by beta (see `source`)
    "tb": Row("GFlowNet trajectory balance (arXiv 2201.13259): log R = beta r", scale=1.0, ratio=None, beta=1.0),
    "tba": Row(
        "TBA (arXiv 2503.18929): target r / kl_coef, log Z by VarGrad, detached; beta = 1 / kl_coef",
        scale=1.0, log_z="group", ratio=None, beta=1.0 / 0.014,
    ),
    "contrastive_tb": Row(
        "log-partition variance / contrastive TB (arXiv 2605.00553): gradient through the group's mean",
        scale=1.0, log_z="through", ratio=None, beta=1.0,
    ),
    "rebel": Row(
        "REBEL (arXiv 2404.16767): groups of two; its pair loss is 2x the sum over the pair; beta is eta",
        scale=1.0, anchor="old", log_z="through", ratio=None, beta=1.0,
    ),
    "a_star_po": Row(
        "A*-PO (arXiv 2505.20686): beta2 log(pi/ref) to r - V*; hand in r - V* (advantages.optimal_value)",
        scale=1e-3, log_z=None, ratio=None, beta=1.0,
    ),
    "qrpo": Row(
        "QRPO (arXiv 2507.08068): hand in quantile - beta log Z (advantages.qrpo_target); scale is its beta",
        scale=0.1, log_z=None, ratio=None, beta=1.0,
    ),
    "sppo": Row(
        "SPPO, verl recipe: log(pi/old) to eta r, r centred over the batch", scale=1.0, anchor="old", log_z=None,
        ratio=None, beta=1.0,
    ),
    "gvpo": Row(
        "GVPO (arXiv 2504.19599): beta log(pi/old) to r, both centred per prompt", scale=0.1, anchor="old",
        log_z="through", ratio=None, beta=1.0,
    ),
    "agro": Row(
        "AGRO (arXiv 2503.19612): beta log(pi/ref) to r, both centred per prompt", scale=0.1, log_z="through",
        ratio=None, beta=1.0,
    ),
    "kimi": Row(
        "Kimi k1.5 (arXiv 2501.12599): tau log(pi/old) to r - mean r; scale is tau", scale=0.1, anchor="old",
        log_z=None,
        ratio=None, beta=1.0,
    ),
    "dro": Row(
        "DRO per token: (l - l_old - A/beta)^2, up to the constant beta/2; beta here is 1 / theirs", level="token",
        anchor="old", log_z=None, ratio=None, scale=1.0, beta=1.0,
    ),
    "gflowrl": Row(
        "GFlowRL (arXiv 2607.13394): hand in the clipped gap (advantages.gflowrl_target); w = min(ratio, 1.28)",
        anchor="old", log_z=None, clip=(None, 1.28), beta=1.0,
    ),
    "powerflow": Row(
        "PowerFlow (arXiv 2603.18363): target alpha (mean log p_base + psi) handed in, log Z' learned", anchor=None,
        beta=1.0,
    ),
}  # fmt: skip


def named(preset: str) -> Row:
    """The row called `preset`.

    Raises:
        ValueError: no such row; the message names the nearest.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(str(preset), PRESETS, n=3) or sorted(PRESETS)
        checks.fail(
            "preset", f"one of {', '.join(map(repr, near))} (all: flowrl_kernels.presets.PRESETS)", repr(preset)
        )
    return PRESETS[preset]


def settle(preset: str | None, default: Row, explicit: dict[str, Any]) -> Row:
    """The row of `preset`, or `default` with the explicit arguments set; both must not contradict each other."""
    row = default if preset is None else named(preset)
    explicit = dict(explicit)
    normalize = explicit.pop("length_normalize", None)
    if normalize and row.scale is not None:
        checks.fail("length_normalize", f"False: preset={preset!r} sets the scale {row.scale}", True)
    if normalize is False and row.scale is None:
        row = dataclasses.replace(row, scale=1.0)
    if preset is None:
        return dataclasses.replace(row, **explicit)
    for name, value in explicit.items():
        added = name == "tis" and row.tis is None  # a correction for the rollout engine goes with every row
        if name in ("beta", "scale", "tis_cap") or added:  # a method's own dials, not its shape
            row = dataclasses.replace(row, **{name: value})
        elif getattr(row, name) != value:
            checks.fail(name, f"{getattr(row, name)!r}, which preset={preset!r} sets (or no preset)", repr(value))
    return row
