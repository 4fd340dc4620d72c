"""What the authors' code and its forks did at some commit, kept by name."""

from __future__ import annotations

from flowrl_kernels.presets.row import Row

RELEASE = (None, 10.0)
HARD = (0.8, 1.28)
CODE = "the authors' code"

RELEASED: dict[str, Row] = {
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
    "phi_exp": Row("verl_FlowRL fork: e^d - d - 1, cap 10", clip=RELEASE, phi="exp"),
    "phi_exp_half": Row("verl_FlowRL fork: 4 e^(d/2) - 2d - 4, cap 10", clip=RELEASE, phi="exp_half"),
    "phi_cosh": Row("verl_FlowRL fork: e^d + e^-d - 2, cap 10", clip=RELEASE, phi="cosh"),
}  # fmt: skip
