"""Cut cross-entropy (apple/ml-cross-entropy)."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer, imports, installed, needs_cuda


def available(device: str) -> tuple[bool, str]:
    here = needs_cuda(device, installed("cut_cross_entropy", "cut-cross-entropy"))
    if not here[0]:
        return here
    function, reason = imports("cut_cross_entropy", "linear_cross_entropy")
    return (function is not None), reason or here[1]


def refuse(case: Case) -> str | None:
    if case.entropy:
        return "returns no entropy"
    return "takes 16-bit inputs" if case.dtype in ("fp32", "fp64") else None


def _forward(filter_eps):
    def forward(case: Case, inputs: Inputs) -> Outcome:
        from cut_cross_entropy import linear_cross_entropy

        nll = linear_cross_entropy(
            inputs.hidden, inputs.weight, inputs.target, reduction="none", filter_eps=filter_eps, impl="cce"
        )
        return Outcome(logp=-nll)

    return forward


PEERS = [
    Peer(
        "cce", _forward("auto"), available, refuse=refuse, package="cut-cross-entropy",
        note="gradient filter on (its default)",
    ),
    Peer(
        "cce-exact", _forward(None), available, refuse=refuse, package="cut-cross-entropy",
        note="gradient filter off",
    ),
]  # fmt: skip
