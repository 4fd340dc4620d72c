"""This library: each implementation that runs here, exact and (where a case asks for it) bounded."""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer, imports


def _available(impl: str, name: str = "linear_logprob"):
    def available(device: str) -> tuple[bool, str]:
        function, reason = imports("flowrl_kernels.logprobs", name)
        if function is None and name == "flowrl_loss":
            function, reason = imports("flowrl_kernels.losses", name)
        if function is None:
            return False, reason
        from flowrl_kernels.core.dispatch import backends

        state = backends()[impl]
        if impl == "triton" and state.available and device == "cpu":
            return False, "runs in triton's interpreter here, whose time means nothing"
        return state.available, state.reason

    return available


def _linear(impl: str, bounded: bool):
    def forward(case: Case, inputs: Inputs) -> Outcome:
        from flowrl_kernels.logprobs import linear_logprob, logprob

        if case.op == "logprob":
            made = logprob(inputs.logits, inputs.target, entropy=case.entropy, impl=impl)
            return Outcome(logp=made.logp, entropy=made.entropy)
        report = torch.zeros(3, device=inputs.hidden.device) if bounded else None
        made = linear_logprob(
            inputs.hidden,
            inputs.weight,
            inputs.target,
            entropy=case.entropy,
            epsilon=case.epsilon if bounded else 0.0,
            report=report,
            impl=impl,
        )
        return Outcome(logp=made.logp, entropy=made.entropy, report=report)

    return forward


def _only_bounded(case: Case) -> str | None:
    if case.epsilon == 0:
        return "the case asks for no bound (epsilon 0)"
    return "a bounded backward has no entropy gradient" if case.entropy else None


def _residual_of(impl: str):
    def loss(inputs: Inputs, logp: torch.Tensor, log_z: torch.Tensor) -> torch.Tensor:
        from flowrl_kernels.losses import flowrl_loss

        given = inputs.residual
        return flowrl_loss(
            logp, given["logp_ref"], given["reward"], log_z,
            logp_old=given["logp_old"], mask=given["mask"], impl=impl,
        ).loss  # fmt: skip

    return loss


def _residual(impl: str):
    def forward(case: Case, inputs: Inputs) -> Outcome:
        return Outcome(loss=_residual_of(impl)(inputs, inputs.residual["logp"], inputs.residual["log_z"]))

    return forward


def _residual_step(impl: str):
    def step(case: Case, inputs: Inputs) -> Outcome:
        logp = inputs.residual["logp"].detach().requires_grad_()
        log_z = inputs.residual["log_z"].detach().requires_grad_()
        loss = _residual_of(impl)(inputs, logp, log_z)
        grads = torch.autograd.grad(loss, [logp, log_z])
        return Outcome(loss=loss.detach(), dx=grads[0], dw=grads[1])

    return step


def _loss(impl: str, single_pass: bool):
    def forward(case: Case, inputs: Inputs) -> Outcome:
        from flowrl_kernels.modules import LinearFlowRLLoss

        b, t, given = case.sequences, case.slots, inputs.residual
        out = LinearFlowRLLoss(single_pass=single_pass, impl=impl)(
            inputs.hidden.view(b, t, case.h), inputs.weight, inputs.target.view(b, t),
            given["logp_ref"], given["reward"], given["log_z"], mask=given["mask"],
        )  # fmt: skip
        return Outcome(loss=out.loss)

    return forward


def _small_only(case: Case) -> str | None:
    return "the specification holds all logits: small cases only" if case.n * case.v > 1 << 26 else None


PEERS = [
    *(
        Peer(
            f"ours-{impl}", _linear(impl, False), _available(impl), ops=("linear_logprob", "logprob"),
            recompute=impl != "reference", package="flowrl-kernels",
            **({"refuse": _small_only} if impl == "reference" else {}),
        )
        for impl in ("chunked", "triton", "reference")
    ),
    *(
        Peer(
            f"ours-{impl}-bounded", _linear(impl, True), _available(impl), refuse=_only_bounded,
            package="flowrl-kernels", note="epsilon of the case",
        )
        for impl in ("chunked", "triton")
    ),
    *(
        Peer(
            f"ours-{impl}-loss", _loss(impl, False), _available(impl, "flowrl_loss"), ops=("flowrl_loss",),
            package="flowrl-kernels", note="LinearFlowRLLoss, two passes",
        )
        for impl in ("chunked", "triton")
    ),
    *(
        Peer(
            f"ours-{impl}-loss-single-pass", _loss(impl, True), _available(impl, "flowrl_loss"), ops=("flowrl_loss",),
            recompute=False, grads_in_forward=True, package="flowrl-kernels", note="LinearFlowRLLoss, one pass",
        )
        for impl in ("chunked", "triton")
    ),
    *(
        Peer(
            f"ours-{impl}-residual", _residual(impl), _available(impl, "flowrl_loss"), ops=("residual",),
            step=_residual_step(impl), package="flowrl-kernels",
        )
        for impl in ("chunked", "triton", "reference")
    ),
]  # fmt: skip
