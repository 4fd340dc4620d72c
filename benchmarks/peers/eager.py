"""The textbook way: all logits at once. What trainers do when they fuse nothing."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer, always


def from_logits(case: Case, logits: torch.Tensor, target: torch.Tensor) -> Outcome:
    """Log-softmax in fp32 of logits in whatever precision they came."""
    logp_all = torch.log_softmax(logits.float(), dim=-1)
    logp = logp_all.gather(1, target[:, None])[:, 0]
    entropy = -(logp_all.exp() * logp_all).sum(-1) if case.entropy else None
    return Outcome(logp=logp, entropy=entropy)


def forward(case: Case, inputs: Inputs) -> Outcome:
    logits = inputs.logits if case.op == "logprob" else inputs.hidden @ inputs.weight.T
    return from_logits(case, logits, inputs.target)


def forward_fp32_head(case: Case, inputs: Inputs) -> Outcome:
    """The same on inputs cast to fp32: what a trainer does to get exact log-probs today."""
    return from_logits(case, inputs.hidden.float() @ inputs.weight.float().T, inputs.target)


def residual_step(case: Case, inputs: Inputs) -> Outcome:
    """FlowRL's squared residual with the paper's clip, written out: docs/maths.md, padded [B, T] and a mask."""
    given = inputs.residual
    logp = given["logp"].detach().requires_grad_()
    log_z = given["log_z"].detach().requires_grad_()
    loss = residual_formula(**{**given, "logp": logp, "log_z": log_z})
    grads = torch.autograd.grad(loss, [logp, log_z])
    return Outcome(loss=loss.detach(), dx=grads[0], dw=grads[1])


def residual_formula(logp, logp_ref, mask, reward, log_z, logp_old=None, beta: float = 15.0):
    m = mask.to(logp.dtype)
    count = m.sum(1).clamp_min(1)
    delta = log_z + (logp * m).sum(1) / count - beta * reward - (logp_ref * m).sum(1) / count
    if logp_old is None:
        return delta.square().mean()
    ratio = ((logp.detach() - logp_old) * m).sum(1).clamp(-60, 60).exp().clamp(0.8, 1.2)
    return (ratio * delta.square()).mean()


def residual(case: Case, inputs: Inputs) -> Outcome:
    return Outcome(loss=residual_formula(**inputs.residual))


def loss_forward(case: Case, inputs: Inputs) -> Outcome:
    """All logits, then the loss."""
    logp = from_logits(case, inputs.hidden @ inputs.weight.T, inputs.target).logp
    return Outcome(loss=residual_formula(logp.view(case.sequences, case.slots), **inputs.residual))


def _only_16_bit(case: Case) -> str | None:
    return "the inputs are fp32 already: same as eager" if case.dtype in ("fp32", "fp64") else None


PEERS = [
    Peer("eager-residual", residual, always, ops=("residual",), step=residual_step, package="torch"),
    Peer("eager", forward, always, ops=("linear_logprob", "logprob"), recompute=False, package="torch"),
    Peer("eager-loss", loss_forward, always, ops=("flowrl_loss",), recompute=False, package="torch"),
    Peer(
        "eager-fp32-head", forward_fp32_head, always, recompute=False, package="torch", refuse=_only_16_bit,
        note="hidden states and weight cast to fp32 first",
    ),
]  # fmt: skip
