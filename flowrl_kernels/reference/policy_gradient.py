"""Clipped policy gradients per token or per sequence: PPO and its rows (docs/maths.md, eq. 13-15). Plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_kernels.reference.residual import BOUND, Segments, divisors, phi


def token_losses(
    logp: Tensor,  # [B, T] or [N]
    old: Tensor,
    advantage: Tensor,  # the layout of logp
    segments: Segments,
    ratio: str,  # "token", "sequence", "none" or "detached"
    clip: tuple[float | None, float | None],  # bounds of the ratio
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss per token, ratio per token, share of each token that is clipped), all in the layout of logp."""
    log_ratio = logp.double() - old.double()
    a = advantage.double()
    if ratio == "none":  # REINFORCE and RAFT: the gradient of -A log pi
        return -a * logp.double(), torch.ones_like(a), torch.zeros_like(a)
    if ratio == "sequence":  # GSPO: the geometric mean's value, each token its own gradient (arXiv 2507.18071, eq. 14)
        length = segments.total(torch.ones_like(log_ratio)).clamp_min(1.0)
        mean = segments.spread(segments.total(log_ratio) / length)
        log_ratio = mean.detach() + logp.double() - logp.detach().double()
    rho = log_ratio.clamp(-BOUND, BOUND).exp()
    bounded = rho if clip == (None, None) else rho.clamp(*clip)
    clipped = (-a * bounded > -a * rho).double()
    if ratio == "detached":  # CISPO: the clipped weight is detached, every token keeps a gradient
        return -a * bounded.detach() * logp.double(), rho, clipped
    loss = torch.maximum(-a * rho, -a * bounded)
    if dual_clip is not None:
        loss = torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)
    return loss, rho, clipped


def kl_penalty(logp: Tensor, logp_ref: Tensor, kind: str, bound: float | None) -> Tensor:
    """Per token, in nats: "k1" l - r, "k2" (l - r)^2 / 2, "k3" e^(r-l) - (r-l) - 1 (joschu.net/blog/kl-approx.html).

    k3 goes on as its tangent beyond a gap of BOUND; with a `bound` it is held within +-bound, as verl's is within 10.
    """
    move = logp_ref.double() - logp.double()
    if kind == "k1":
        return -move
    if kind == "k2":
        return 0.5 * move.square()
    value = phi(move, "exp")
    return value if bound is None else value.clamp(-bound, bound)


def aggregate(value: Tensor, segments: Segments, how: str, normalizer: Tensor | None, horizon: float) -> Tensor:
    """Token losses to a scalar. Each mode divides by its own count unless `normalizer` is given."""
    per_sequence = segments.total(value)
    count = segments.total(torch.ones_like(value))
    sequences, tokens = divisors(normalizer, count)
    if how == "token-mean":
        return per_sequence.sum() / tokens
    if how == "seq-mean-token-mean":
        per_sequence = per_sequence / count.clamp_min(1.0)
    elif how == "seq-mean-token-sum-norm":
        per_sequence = per_sequence / horizon
    return per_sequence.sum() / sequences


def value_losses(value: Tensor, old_value: Tensor | None, returns: Tensor, clip: float | None) -> Tensor:
    """Half the squared error, the larger one of the plain and the clipped value's (arXiv 1707.06347, as in PPO2)."""
    plain = (value.double() - returns.double()).square()
    if clip is None or old_value is None:
        return 0.5 * plain
    near = old_value.double() + (value.double() - old_value.double()).clamp(-clip, clip)
    return 0.5 * torch.maximum(plain, (near - returns.double()).square())
