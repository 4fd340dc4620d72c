"""The float64 answer for a case, in tiles, and the distance of an implementation from it.

log-probs and entropies are checked for every token. Full float64 gradients would cost more than the benchmark, so dX is
checked on some rows and dW on some vocabulary rows (random ones and those of the most frequent targets).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import Inputs, largest_logit, uniform_gradient
from benchmarks.peers import Outcome

ROWS, COLUMNS = 64, 256
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of one float64 tile of logits


@dataclass
class Gradients:
    dx: Tensor  # [R, H] or [R, V] float64
    dw: Tensor | None  # [C, H] float64


@dataclass
class Answer:
    """Float64 values of one case. rows, columns: where the gradients are known."""

    logp: Tensor  # [N]
    entropy: Tensor  # [N]
    rows: Tensor  # [R]
    columns: Tensor  # [C]
    token: Gradients  # for the case's own gradient per token
    uniform: Gradients  # for -1/N per token
    loss: float | None = None  # of a whole-loss case

    def summary(self) -> dict[str, float]:
        """What the batch was like: mean entropy in nats, mean and median probability of the target."""
        p = self.logp.exp()
        return {
            "entropy_mean": float(self.entropy.mean()),
            "entropy_median": float(self.entropy.median()),
            "target_probability_mean": float(p.mean()),
            "target_probability_median": float(p.median()),
        }


def _tiles(vocab: int, rows: int, device: torch.device) -> list[slice]:
    width = max(256, TILE_ELEMENTS[device.type] // max(rows, 1))
    return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def _pick(case: Case, target: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.randperm(case.n, generator=generator)[:ROWS].sort().values
    common = torch.bincount(target.cpu(), minlength=case.v).topk(min(COLUMNS // 4, case.v)).indices
    spread = torch.randperm(case.v, generator=generator)[:COLUMNS]
    columns = torch.cat([common, spread]).unique()
    return rows.to(target.device), columns.to(target.device)


def solve(case: Case, inputs: Inputs, seed: int) -> Answer:
    """The float64 answer to any case but a residual one, on the device of the inputs."""
    device = inputs.target.device
    rows, columns = _pick(case, inputs.target, seed)
    lse, entropy, picked = _statistics(case, inputs)
    logp = picked - lse
    loss, token_gradient = None, inputs.grad_logp
    if case.op == "flowrl_loss":
        loss, token_gradient = _loss_gradient(case, inputs, logp)
    grads = {}
    uniform = uniform_gradient(case, str(device))
    for name, g in (("token", token_gradient), ("uniform", uniform)):
        g_entropy = inputs.grad_entropy if name == "token" else None
        grads[name] = _gradients(case, inputs, g, g_entropy, rows, columns, lse, entropy)
    return Answer(logp, entropy, rows, columns, grads["token"], grads["uniform"], loss)


def _loss_gradient(case: Case, inputs: Inputs, logp: Tensor) -> tuple[float, Tensor]:
    """The written-out loss in float64 and its gradient per token, [N]."""
    from benchmarks.peers.eager import residual_formula

    given = {k: t.double() if t.is_floating_point() else t for k, t in inputs.residual.items()}
    leaf = logp.view(case.sequences, case.slots).detach().requires_grad_()
    loss = residual_formula(leaf, **given)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient.reshape(-1)


def _statistics(case: Case, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, entropy and target logit of every row, [N] each, by running sums over tiles."""
    n, device = case.n, inputs.target.device
    top = torch.full((n,), -torch.inf, dtype=torch.float64, device=device)
    total, moment = torch.zeros_like(top), torch.zeros_like(top)
    x = None if inputs.hidden is None else inputs.hidden.double()
    for tile in _tiles(case.v, n, device):
        z = inputs.logits[:, tile].double() if x is None else x @ inputs.weight[tile].double().T
        new = torch.maximum(top, z.amax(1))
        scale = (top - new).exp()
        e = (z - new[:, None]).exp_()
        moment = moment * scale + (e * z).sum(1)
        total = total * scale + e.sum(1)
        top = new
    lse = top + total.log()
    target = inputs.target
    if inputs.logits is not None:
        picked = inputs.logits.gather(1, target[:, None])[:, 0].double()
    else:
        picked = (inputs.hidden.double() * inputs.weight[target].double()).sum(1)
    return lse, lse - moment / total, picked


def _dlogits(
    z: Tensor,  # [R, C]
    ids: Tensor,  # [C] vocabulary ids of the columns
    target: Tensor,  # [R]
    lse: Tensor,  # [R]
    entropy: Tensor,  # [R]
    g: Tensor,  # [R]
    g_entropy: Tensor | None,  # [R]
) -> Tensor:
    """g (1{v = y} - p) - g_H p (log p + H), float64. [R, C]"""
    logp = z - lse[:, None]
    p = logp.exp()
    dz = g[:, None].double() * ((target[:, None] == ids[None]).double() - p)
    if g_entropy is not None:
        dz -= g_entropy[:, None].double() * p * (logp + entropy[:, None])
    return dz


def _gradients(case, inputs, g, g_entropy, rows, columns, lse, entropy) -> Gradients:
    device, target = inputs.target.device, inputs.target

    def at(index):
        own = None if g_entropy is None else g_entropy[index]
        return target[index], lse[index], entropy[index], g[index], own

    if inputs.logits is not None:
        ids = torch.arange(case.v, device=device)
        return Gradients(_dlogits(inputs.logits[rows].double(), ids, *at(rows)), None)
    dx = torch.zeros(len(rows), case.h, dtype=torch.float64, device=device)
    x = inputs.hidden[rows].double()
    for tile in _tiles(case.v, len(rows), device):
        ids = torch.arange(tile.start, tile.stop, device=device)
        w = inputs.weight[tile].double()
        dx += _dlogits(x @ w.T, ids, *at(rows)) @ w
    dw = torch.zeros(len(columns), case.h, dtype=torch.float64, device=device)
    w = inputs.weight[columns].double()
    step = max(256, TILE_ELEMENTS[device.type] // len(columns))
    for start in range(0, case.n, step):
        block = slice(start, min(start + step, case.n))
        x = inputs.hidden[block].double()
        dw += _dlogits(x @ w.T, columns, *at(block)).T @ x
    return Gradients(dx, dw)


def relative(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; inf where something is not finite, so that NaN never passes."""
    difference = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-300)
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def _worst_row(actual: Tensor, expected: Tensor) -> float:
    norm = expected.norm(dim=1)
    error = (actual.double() - expected).norm(dim=1) / norm.clamp_min(float(norm.max()) * 1e-3 + 1e-300)
    return float(error.max()) if bool(torch.isfinite(error).all()) else float("inf")


def distance(case: Case, answer: Answer, outcome: Outcome, uniform: bool) -> dict[str, float]:
    """Errors of an `Outcome` against the answer. Gradients are left out if they were not made."""
    errors: dict[str, float] = {}
    grads = answer.uniform if uniform else answer.token
    if outcome.logp is not None:
        gap = (outcome.logp.double() - answer.logp).abs()
        gap = torch.where(torch.isfinite(gap), gap, torch.inf)
        errors["logp_max_abs"], errors["logp_mean_abs"] = float(gap.max()), float(gap.mean())
    if outcome.loss is not None and answer.loss is not None:
        gap = abs(float(outcome.loss) - answer.loss) / abs(answer.loss)
        errors["loss_rel"] = gap if gap == gap else float("inf")
    elif outcome.loss is not None:
        gap = abs(float(outcome.loss) + float(answer.logp.mean()))
        errors["loss_abs"] = gap if gap == gap else float("inf")
    if case.entropy and outcome.entropy is not None:
        gap = (outcome.entropy.double() - answer.entropy).abs()
        errors["entropy_max_abs"] = float(torch.where(torch.isfinite(gap), gap, torch.inf).max())
    if outcome.dx is not None:
        errors["dx_rel_l2"] = relative(outcome.dx[answer.rows], grads.dx)
        errors["dx_worst_row"] = _worst_row(outcome.dx[answer.rows], grads.dx)
    if outcome.dw is not None and grads.dw is not None:
        errors["dw_rel_l2"] = relative(outcome.dw[answer.columns], grads.dw)
    return errors


def tolerances(case: Case) -> dict[str, float]:
    """What any honest implementation of the dtype stays under; crossing one means wrong, not merely coarse.

    16-bit: logits may have been rounded to the dtype (half a unit in the last place of the largest logit, twice over
    for logit and log-sum-exp, and some slack) and gradients summed in it. fp32: plain fp32 arithmetic.
    """
    if case.dtype in ("fp32", "fp64"):
        logp, grad = 5e-4, 1e-3  # torch's fp32 log-softmax alone is off by 1e-4 over 152k columns
    else:
        unit = 2.0**-8 if case.dtype == "bf16" else 2.0**-11
        logp, grad = 0.02 + 4 * unit * largest_logit(case), 0.08
    if case.epsilon > 0:
        # the bar of a bounded backward, 0.15 % at epsilon 0.01; what it measured goes in the table
        grad = max(grad, 0.0015 * max(1.0, case.epsilon / 0.01))
    return {
        "logp_max_abs": logp,
        "loss_abs": logp,
        "loss_rel": max(1e-4, logp / 10),
        "entropy_max_abs": max(2e-3, 10 * logp),
        "dx_rel_l2": grad,
        "dw_rel_l2": grad,
    }


def failures(case: Case, errors: dict[str, float]) -> list[str]:
    """Sentences for the errors that cross their tolerance; empty if all is well."""
    limits = tolerances(case)
    return [
        f"{name} {value:.3g} > {limits[name]:.3g}"
        for name, value in errors.items()
        if name in limits and not value <= limits[name]
    ]


def residual_distance(inputs: Inputs, outcome: Outcome) -> dict[str, float]:
    """Errors of a residual case: loss and gradient of logp against the written-out formula in float64."""
    from benchmarks.peers.eager import residual_formula

    given = {k: t.double() if t.is_floating_point() else t for k, t in inputs.residual.items()}
    given["logp"] = given["logp"].detach().requires_grad_()
    loss = residual_formula(**given)
    (expected,) = torch.autograd.grad(loss, [given["logp"]])
    loss = loss.detach()
    errors = {"loss_rel": abs(float(outcome.loss) - float(loss)) / abs(float(loss))}
    if outcome.dx is not None:
        errors["dx_rel_l2"] = relative(outcome.dx, expected)
    return {name: value if value == value else float("inf") for name, value in errors.items()}
