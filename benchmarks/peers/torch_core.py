"""torch.nn.functional.linear_cross_entropy (torch 2.13 on).

Signature there: linear_cross_entropy(input, linear_weight, target, *, linear_bias, weight, reduction, ignore_index,
label_smoothing, options). options=None makes all logits; torch.nn.LinearCrossEntropyOptions() chunks over the batch.
reduction="none" recomputes in the backward; "mean" takes its gradients in the forward.
"""

from __future__ import annotations

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer


def available(device: str) -> tuple[bool, str]:
    if not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return False, f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy (2.13 on has)"
    return True, "torch core"


def chunks_available(device: str) -> tuple[bool, str]:
    here = available(device)
    if here[0] and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return False, f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions"
    return here


def _loss(inputs: Inputs, reduction: str, chunked: bool) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return torch.nn.functional.linear_cross_entropy(
        inputs.hidden, inputs.weight, inputs.target, reduction=reduction, options=options
    )


def forward(case: Case, inputs: Inputs) -> Outcome:
    return Outcome(logp=-_loss(inputs, "none", False))


def forward_chunked(case: Case, inputs: Inputs) -> Outcome:
    return Outcome(logp=-_loss(inputs, "none", True))


def forward_mean(case: Case, inputs: Inputs) -> Outcome:
    return Outcome(loss=_loss(inputs, "mean", True))


def refuse(case: Case) -> str | None:
    return "returns no entropy" if case.entropy else None


PEERS = [
    Peer(
        "F.linear_cross_entropy", forward, available, recompute=False, refuse=refuse, package="torch",
        note="as called by default (options=None), reduction='none'",
    ),
    Peer(
        "F.linear_cross_entropy-chunked", forward_chunked, chunks_available, refuse=refuse, package="torch",
        note="LinearCrossEntropyOptions() defaults, reduction='none'",
    ),
    Peer(
        "F.linear_cross_entropy-mean", forward_mean, chunks_available, refuse=refuse, package="torch",
        per_token=False, recompute=False, grads_in_forward=True,
        note="LinearCrossEntropyOptions() defaults, mean loss, gradients taken in the forward",
    ),
]  # fmt: skip
