"""Liger: the fused linear cross-entropy, the scaled cross-entropy (per token), and the chunked GRPO loss."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer, imports, installed, needs_cuda


def _has(module: str, attribute: str, gpu_only: bool):
    def available(device: str) -> tuple[bool, str]:
        here = installed("liger_kernel", "liger-kernel")
        here = needs_cuda(device, here) if gpu_only else here
        if not here[0]:
            return here
        found, reason = imports(module, attribute)
        return (found is not None), reason or here[1]

    return available


def no_entropy(case: Case) -> str | None:
    return "returns no entropy" if case.entropy else None


def fused_linear_ce(case: Case, inputs: Inputs) -> Outcome:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    made = LigerFusedLinearCrossEntropyFunction.apply(inputs.hidden, inputs.weight, inputs.target)
    return Outcome(loss=made[0] if isinstance(made, tuple) else made)


def scaled_ce(case: Case, inputs: Inputs) -> Outcome:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    made = LigerFusedLinearScaledCrossEntropyFunction.apply(
        inputs.hidden, inputs.weight, inputs.target, return_entropy=case.entropy
    )
    return Outcome(logp=-made[0], entropy=made[1]) if case.entropy else Outcome(logp=-made)


def grpo_step(case: Case, inputs: Inputs) -> Outcome:
    """The whole GRPO loss without clip or KL: its gradient per token is -advantage / N, so advantages carry ours."""
    from liger_kernel.chunked_loss.grpo_loss import LigerFusedLinearGRPOLoss

    loss_of = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo")
    hidden = inputs.hidden.detach().requires_grad_()
    weight = inputs.weight.detach().requires_grad_(case.train_head)
    b, t = case.sequences, case.slots
    advantages = inputs.grad_logp.view(b, t)[:, 0] * -case.n
    mask = torch.ones(b, t, dtype=torch.int64, device=hidden.device)
    made = loss_of(hidden.view(b, t, case.h), weight, inputs.target.view(b, t), mask, advantages)
    loss = made[0] if isinstance(made, tuple) else made
    grads = torch.autograd.grad(loss, [hidden, weight] if case.train_head else [hidden])
    return Outcome(dx=grads[0], dw=grads[1] if len(grads) > 1 else None)


def _grpo_refuse(case: Case) -> str | None:
    if case.n % case.sequences:
        return "wants sequences of one length"
    return no_entropy(case)


PEERS = [
    Peer(
        "liger-flce", fused_linear_ce, _has("liger_kernel.ops.fused_linear_cross_entropy",
        "LigerFusedLinearCrossEntropyFunction", True), refuse=no_entropy, package="liger-kernel",
        per_token=False, recompute=False, grads_in_forward=True, note="mean loss, gradients taken in the forward",
    ),
    Peer(
        "liger-scaled-ce", scaled_ce, _has("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction", False),
        package="liger-kernel", note="per token; SM90 kernel where it loads, else chunks of 512 tokens in torch",
    ),
    Peer(
        "liger-chunked-grpo", scaled_ce, _has("liger_kernel.chunked_loss.grpo_loss", "LigerFusedLinearGRPOLoss", False),
        refuse=_grpo_refuse, package="liger-kernel", grads_in_forward=True, step=grpo_step,
        note="whole loss, one sequence per chunk, compiled=False",
    ),
]  # fmt: skip
