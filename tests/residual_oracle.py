"""What every row of the residual family should give, written once more from the formulas: one loop per sequence.

Shares no code with the package. A row is a `Spec`; gradients are autograd's over float64 scalars, and for the rows of
the paper the closed form stands beside them (docs/maths.md, eq. 5-12).
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spec:
    beta: float = 15.0
    a: float | None = None  # None: one over the length
    anchor: str | None = "ref"
    z: str | None = "learned"
    weight: str | None = "sum"  # "sum", "mean", "token" or None
    lo: float = 0.0
    hi: float = math.inf
    phi: str = "square"
    second: str | None = None
    cap: float = 2.0
    gate: str | None = None
    drop: bool = False
    surrogate: bool = False
    per_token: bool = False
    power: float = 0.0


PAPER = {"lo": 0.8, "hi": 1.2}
CAP = {"hi": 10.0}
HARD = {"lo": 0.8, "hi": 1.28}
PLAIN = {"weight": None, "beta": 1.0}

SPECS = {
    "paper": Spec(**PAPER),
    "release": Spec(**CAP),
    "unclipped": Spec(),
    "no_is": Spec(weight=None),
    "hard": Spec(**HARD),
    "tb_original": Spec(**PLAIN),
    "tb_ppo_style": Spec(weight=None, surrogate=True),
    "unclipped_geo": Spec(weight="mean"),
    "clip_geo": Spec(weight="mean", **PAPER),
    "release_tis_token": Spec(second="token", **CAP),
    "unclipped_tis_token": Spec(second="token"),
    "unclipped_geo_tis_geo": Spec(weight="mean", second="mean"),
    "clip_geo_tis_geo": Spec(weight="mean", second="mean", **PAPER),
    "release_tis_sum": Spec(second="sum", **CAP),
    "release_clip_logp": Spec(gate="always", **CAP),
    "release_gspo_select": Spec(gate="select", **CAP),
    "hard_gspo_select": Spec(gate="select", **HARD),
    "hard_cispo_drop": Spec(drop=True, **HARD),
    "cispo_drop": Spec(drop=True, **HARD),
    "release_old_anchor": Spec(anchor="old", **CAP),
    "release_no_log_z": Spec(z=None, **CAP),
    "release_old_anchor_no_log_z": Spec(anchor="old", z=None, **CAP),
    "release_no_anchor_no_log_z": Spec(anchor=None, z=None, **CAP),
    "token_old_anchor_no_log_z": Spec(per_token=True, anchor="old", z=None, weight="token", **HARD),
    "token_no_anchor_no_log_z": Spec(per_token=True, anchor=None, z=None, weight="token", **HARD),
    "token_log_z_beta30": Spec(per_token=True, beta=30.0, **CAP),
    "group": Spec(z="group", **PAPER),
    "phi_exp": Spec(phi="exp", **CAP),
    "phi_exp_half": Spec(phi="exp_half", **CAP),
    "phi_cosh": Spec(phi="cosh", **CAP),
    "tb": Spec(a=1.0, **PLAIN),
    "length_true": Spec(a=1.0, beta=1.0, power=1.0, **PAPER),
    "tba": Spec(a=1.0, z="group", weight=None, beta=1 / 0.014),
    "contrastive_tb": Spec(a=1.0, z="through", **PLAIN),
    "rebel": Spec(a=1.0, anchor="old", z="through", **PLAIN),
    "a_star_po": Spec(a=1e-3, z=None, **PLAIN),
    "qrpo": Spec(a=0.1, z=None, **PLAIN),
    "sppo": Spec(a=1.0, anchor="old", z=None, **PLAIN),
    "gvpo": Spec(a=0.1, anchor="old", z="through", **PLAIN),
    "agro": Spec(a=0.1, z="through", **PLAIN),
    "kimi": Spec(a=0.1, anchor="old", z=None, **PLAIN),
    "dro": Spec(a=1.0, per_token=True, anchor="old", z=None, **PLAIN),
    "gflowrl": Spec(anchor="old", z=None, beta=1.0, hi=1.28),
    "powerflow": Spec(anchor=None, beta=1.0, **PAPER),
}

PENALTY = {
    "square": lambda d: d * d,
    "abs": lambda d: d.abs(),
    "exp": lambda d: d.exp() - d - 1,
    "exp_half": lambda d: 4 * (d / 2).exp() - 2 * d - 4,
    "cosh": lambda d: d.exp() + (-d).exp() - 2,
}


def clamp(x, lo, hi):
    return max(lo, min(hi, x))


def loss(spec, data, normalizer=None):
    """(loss, residual per sequence, weight per sequence) as float64; `data` is what `make` in the tests returns."""
    per_sequence, per_token = normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer)
    logp, mask, reward = data["logp"], data["mask"], data["reward"]
    total, flows, weights = torch.zeros((), dtype=torch.float64), {}, {}
    surrogates, num_tokens = [], 0
    token_terms, token_residuals = [], {}
    for b in range(len(reward)):
        r = float(reward[b])
        here = [t for t in range(logp.shape[1]) if mask[b, t]]
        move = {t: float(logp[b, t].detach() - data["old"][b, t]) for t in here}
        if spec.drop:
            here = [
                t for t in here
                if not ((r > 0 and math.exp(move[t]) > 1.28) or (r < 0 and math.exp(move[t]) < 0.8))
            ]  # fmt: skip
        n = len(here)
        num_tokens += n
        if n == 0:
            continue
        anchor = {"ref": data["ref"], "old": data["old"], None: torch.zeros_like(logp)}[spec.anchor].detach()
        u = sum(move[t] for t in here)
        w = 1.0
        if spec.weight == "sum":
            w = clamp(math.exp(u), spec.lo, spec.hi)
        elif spec.weight == "mean":
            w = clamp(math.exp(u / n), spec.lo, spec.hi)
        off = [float(data["old"][b, t] - data["sampler"][b, t]) for t in here]
        if spec.second == "token":
            w *= min(sum(math.exp(x) for x in off) / n, spec.cap)
        elif spec.second == "mean":
            w *= min(math.exp(sum(off) / n), spec.cap)
        elif spec.second == "sum":
            w *= min(math.exp(sum(off)), spec.cap)
        w /= n**spec.power
        z = data["log_z"][b] if spec.z == "learned" else 0.0
        if spec.per_token:
            a = 1.0 if spec.a is None else spec.a
            deltas = [a * (logp[b, t] - anchor[b, t]) + z - spec.beta * r for t in here]
            ws = [clamp(math.exp(move[t]), spec.lo, spec.hi) if spec.weight == "token" else w for t in here]
            token_terms += [v * PENALTY[spec.phi](d) for v, d in zip(ws, deltas)]
            token_residuals[b] = float(sum(deltas).detach()) / n
            weights[b] = sum(ws) / n
            continue
        a = 1.0 / n if spec.a is None else spec.a
        s = sum(logp[b, t] - anchor[b, t] for t in here) * a
        if spec.gate is not None:
            mean = u / n
            low, high = math.log(1 - 0.2), math.log(1 + 0.28)
            binds = mean < low or mean > high
            if spec.gate == "select":
                binds = (r > 0 and mean > high) or (r < 0 and mean < low)
            if binds:  # mean log-prob := mean old + bound, a constant
                bound = low if mean < low else high
                s = torch.tensor(
                    sum(float(data["old"][b, t] - anchor[b, t]) for t in here) / n + bound, dtype=torch.float64
                )
        flows[b] = s + z - spec.beta * r
        weights[b] = w
        if spec.surrogate:
            surrogates += [(b, logp[b, t] - data["old"][b, t]) for t in here]
    if spec.per_token:
        return sum(token_terms, total) / (per_token or max(num_tokens, 1)), token_residuals, weights
    groups = [int(g) for g in data["groups"]]
    residuals = {}
    for b, d in flows.items():
        if spec.z in ("group", "through"):
            peers = [flows[c] for c in flows if groups[c] == groups[b]]
            centre = sum(peers) / len(peers)
            d = d - (centre.detach() if spec.z == "group" else centre)
        residuals[b] = d
    n = per_sequence or max(len(reward), 1)
    total = sum((weights[b] * PENALTY[spec.phi](d) for b, d in residuals.items()), total) / n
    if surrogates:
        joint = 0.0
        for b, move in surrogates:
            delta, rho = residuals[b].detach(), move.exp()
            plain, bounded = -delta * rho, -delta * torch.clamp(rho, 0.8, 1.2)
            joint = joint + (plain if plain > bounded else bounded)
        total = total + joint / (per_token or num_tokens)
    return total, {b: float(d.detach()) for b, d in residuals.items()}, weights
