"""QuACK's chunked linear cross-entropy (CuTe DSL; Hopper and later)."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer, imports, installed, needs_cuda


def available(device: str) -> tuple[bool, str]:
    here = needs_cuda(device, installed("quack", "quack-kernels"))
    if not here[0]:
        return here
    function, reason = imports("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return (function is not None), reason or here[1]


def refuse(case: Case) -> str | None:
    if case.entropy:
        return "returns no entropy"
    if case.dtype != "bf16":
        return "takes bf16"
    return "wants N a multiple of 8" if case.n % 8 else None


def _forward(scaled_exp: bool):
    def forward(case: Case, inputs: Inputs) -> Outcome:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        loss = chunked_linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.target, reduction="mean", use_scaled_exp=scaled_exp
        )
        return Outcome(loss=loss)

    return forward


PEERS = [
    Peer(
        "quack", _forward(False), available, refuse=refuse, package="quack-kernels", per_token=False,
        recompute=False, grads_in_forward=True, note="mean loss, chunks of 4096, gradients taken in the forward",
    ),
    Peer(
        "quack-scaled-exp", _forward(True), available, refuse=refuse, package="quack-kernels", per_token=False,
        recompute=False, grads_in_forward=True, note="mean loss, Hopper pipeline that stores exp of the logits",
    ),
]  # fmt: skip
