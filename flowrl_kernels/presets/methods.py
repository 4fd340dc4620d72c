"""The methods that people use, each with its source. The reward of a relative is its own target divided by beta."""

from __future__ import annotations

from flowrl_kernels.presets.row import Row

METHODS: dict[str, Row] = {
    "paper": Row("arXiv 2509.15207, eq. 6; eps is not stated there, 0.2 is assumed"),
    "release": Row("the authors' code since 27 Oct 2025, and verl-recipe: only the cap of 10", clip=(None, 10.0)),
    "group": Row("VarGrad (arXiv 2010.10436) in the paper's residual: log Z is the group's mean", log_z="group"),
    "tb": Row("GFlowNet trajectory balance (arXiv 2201.13259): log R = beta r", scale=1.0, ratio=None, beta=1.0),
    "length_true": Row(
        "trajectory balance whose penalty is weighted by |y|^-p (docs/maths.md): the zero is pi_ref exp(beta r) / Z at"
        " every length; p is length_power", scale=1.0, length_power=1.0, beta=1.0,
    ),
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
