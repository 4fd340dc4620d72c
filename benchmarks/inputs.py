"""Inputs of a case, made from a seed on the device that will use them.

Weights have rows of length about 1. A row of hidden states points at one likely token with strength `a` and carries
noise of strength `b`, so its largest logit is about `a` and the others spread by b. The levels are distributions of
`a`; what entropy each gave is measured and stored with the results. "rl" and "late-rl" (80 and 95 % of
the rows nearly decided) come from the library's own generator of RL-like batches, `testing.rl_like_inputs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Case
from flowrl_kernels import testing


@dataclass
class Inputs:
    """Tensors of one case; fields that the op does not use are None."""

    target: Tensor | None = None  # [N] int64
    hidden: Tensor | None = None  # [N, H]
    weight: Tensor | None = None  # [V, H]
    logits: Tensor | None = None  # [N, V]
    grad_logp: Tensor | None = None  # [N] fp32, one value per sequence
    grad_entropy: Tensor | None = None  # [N] fp32
    residual: dict[str, Tensor] | None = None  # the arguments of flowrl_loss, [B, T] and [B]

    def tensors(self) -> list[Tensor]:
        own = [self.target, self.hidden, self.weight, self.logits, self.grad_logp, self.grad_entropy]
        return [t for t in own if t is not None] + list((self.residual or {}).values())


def make(case: Case, device: str, seed: int) -> Inputs:
    """The inputs of `case` on `device`. The same seed gives the same inputs on the same kind of device."""
    generator = torch.Generator(device=device).manual_seed(seed)
    if case.op == "residual":
        return Inputs(residual=_residual(case, device, generator))
    if case.op == "logprob":
        logits, target = _logits(case, device, generator)
        inputs = Inputs(target=target, logits=logits)
    elif case.level in ("rl", "late-rl"):
        hidden, weight, target, grad = _rl_like(case, device, seed)
        inputs = Inputs(target=target, hidden=hidden, weight=weight, grad_logp=grad)
    else:
        hidden, weight, target = _directions(case, device, generator)
        inputs = Inputs(target=target, hidden=hidden, weight=weight)
    if inputs.grad_logp is None:
        coefficient = torch.randn(case.sequences, device=device, generator=generator) / case.n
        inputs.grad_logp = coefficient.repeat_interleave(-(-case.n // case.sequences))[: case.n].contiguous()
    if case.entropy:
        inputs.grad_entropy = torch.full((case.n,), 0.1 / case.n, device=device)
    if case.op == "flowrl_loss":
        noise, shape = {"device": device, "generator": generator}, (case.sequences, case.slots)
        inputs.residual = {
            "logp_ref": -torch.rand(shape, **noise),
            "mask": torch.ones(shape, dtype=torch.bool, device=device),
            "reward": torch.randn(case.sequences, **noise),
            "log_z": torch.randn(case.sequences, **noise),
        }
    return inputs


def zipf_ids(count: int, vocab: int, exponent: float, device: str, generator: torch.Generator) -> Tensor:
    """`count` token ids drawn with probability proportional to 1 / (id + 1)^exponent, as BPE ids roughly are."""
    mass = torch.arange(1, vocab + 1, device=device, dtype=torch.float64).pow_(-exponent)
    edges = mass.cumsum(0)
    draws = torch.rand(count, device=device, dtype=torch.float64, generator=generator) * edges[-1]
    return torch.searchsorted(edges, draws).clamp_(max=vocab - 1)


def _strength(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, float]:
    """Strength a per row and noise b of the level."""
    if case.level == "flat":
        return torch.zeros(case.n, device=device), 1.0
    if case.level == "peaked":
        return torch.full((case.n,), case.peak or 30.0, device=device), 1.0
    return 4.0 + 14.0 * torch.rand(case.n, device=device, generator=generator), 1.0


def _directions(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    dtype = case.torch_dtype
    weight = torch.randn(case.v, case.h, device=device, generator=generator).mul_(case.h**-0.5).to(dtype)
    likely = zipf_ids(case.n, case.v, 1.1, device, generator)
    strength, noise = _strength(case, device, generator)
    hidden = torch.randn(case.n, case.h, device=device, generator=generator).mul_(noise)
    hidden.add_(weight[likely].float() * strength[:, None])
    if case.level == "peaked":  # in every second row another token is as likely: large logits with something at stake
        rival = torch.randint(0, case.v, (case.n,), device=device, generator=generator)
        hidden[1::2].add_(weight[rival[1::2]].float() * strength[1::2, None])
    # nine in ten tokens are the likely one; the rest come from anywhere, as a sampled response has them
    other = torch.randint(0, case.v, (case.n,), device=device, generator=generator)
    take = torch.rand(case.n, device=device, generator=generator) < 0.9
    return hidden.to(dtype), weight, torch.where(take, likely, other)


def _logits(case: Case, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    logits = torch.randn(case.n, case.v, device=device, generator=generator, dtype=torch.float32)
    likely = zipf_ids(case.n, case.v, 1.1, device, generator)
    strength, _ = _strength(case, device, generator)
    logits.scatter_add_(1, likely[:, None], strength[:, None])
    return logits.to(case.torch_dtype), likely


def _rl_like(case: Case, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sharp = 0.95 if case.level == "late-rl" else 0.8
    return testing.rl_like_inputs(
        case.n, case.h, case.v, zipf=case.zipf, dtype=case.torch_dtype, seed=seed, sharp=sharp, device=device
    )


def _residual(case: Case, device: str, generator: torch.Generator) -> dict[str, Tensor]:
    b, t = case.sequences, case.slots
    noise = {"device": device, "generator": generator}
    logp = -torch.rand(b, t, **noise) * 2.0
    length = torch.randint(t // 4, t + 1, (b,), **noise)
    mask = torch.arange(t, device=device)[None] < length[:, None]
    return {
        "logp": logp,
        "logp_ref": logp + 0.05 * torch.randn(b, t, **noise),
        "logp_old": logp + 0.002 * torch.randn(b, t, **noise),
        "mask": mask,
        "reward": torch.randn(b, **noise),
        "log_z": torch.randn(b, **noise),
    }


def uniform_gradient(case: Case, device: str) -> Tensor:
    """-1/N for every token: the gradient of the mean loss, all that the scalar-loss peers can take. [N]"""
    return torch.full((case.n,), -1.0 / case.n, device=device, dtype=torch.float64)


def largest_logit(case: Case) -> float:
    """A size for |logit| that tolerances of 16-bit implementations scale with."""
    return case.peak or {"flat": 6.0, "base": 20.0, "peaked": 34.0}.get(case.level, 30.0)
