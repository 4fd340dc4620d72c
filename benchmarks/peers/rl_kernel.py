"""RL-Kernel (RL-Align/RL-Kernel, package `rl_engine`): its fused linear log-prob and its batch-invariant log-prob.

Each has a Triton kernel and, where the package was built for Hopper, one in CUDA C++. The package moved its operators
from `rl_engine.kernels.ops` to `rl_engine.backends`; both places are looked in.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer, imports, installed, needs_cuda

TRITON = ("rl_engine.backends.shared.triton.logprob", "rl_engine.kernels.ops.triton.loss")
CUDA = ("rl_engine.backends.cuda.logprob", "rl_engine.kernels.ops.cuda.loss")
BUILT = ("rl_engine.backends.extension", "rl_engine.kernels.ops.base")  # where `_C` is, None if it was not built
FUSED = {"triton": ("linear_logp", "TritonLinearLogpOp"), "cuda": ("linear_logp", "FusedLinearLogpSM90Op")}
PLAIN = {
    "triton": ("batch_invariant_logp", "TritonBatchInvariantLogpOp"),
    "cuda": ("batch_invariant_logp", "BatchInvariantLogpSM90Op"),
}
SYMBOL = {"linear_logp": "fused_linear_logp_sm90", "batch_invariant_logp": "batch_invariant_logp_sm90"}


def _first(modules: tuple[str, ...], attribute: str) -> tuple[Any | None, str]:
    reasons = []
    for module in modules:
        found, reason = imports(module, attribute)
        if found is not None:
            return found, ""
        reasons.append(reason)
    return None, "; ".join(reasons)


@cache
def _operator(kind: str, stem: str, name: str) -> tuple[Any | None, str]:
    """An instance of an operator, or None and why it cannot be had here."""
    if kind == "cuda":
        extension, reason = _first(BUILT, "_C")
        if extension is None or not hasattr(extension, SYMBOL[stem]):
            return None, reason or f"RL-Kernel was built without {SYMBOL[stem]}"
        if torch.cuda.get_device_capability()[0] != 9:
            return None, "its CUDA kernels are for Hopper"
    made, reason = _first(tuple(f"{room}.{stem}" for room in (TRITON if kind == "triton" else CUDA)), name)
    return (made(), "") if made is not None else (None, reason)


def _has(operators: dict[str, tuple[str, str]], kind: str):
    def available(device: str) -> tuple[bool, str]:
        here = needs_cuda(device, installed("rl_engine", "RL-Kernel"))
        if not here[0]:
            return here
        found, reason = _operator(kind, *operators[kind])
        return (found is not None), reason or here[1]

    return available


def _fused(kind: str):
    def forward(case: Case, inputs: Inputs) -> Outcome:
        operator, _ = _operator(kind, *FUSED[kind])
        return Outcome(logp=operator(inputs.hidden, inputs.weight, inputs.target))

    return forward


def _plain(kind: str):
    def forward(case: Case, inputs: Inputs) -> Outcome:
        operator, _ = _operator(kind, *PLAIN[kind])
        return Outcome(logp=operator(inputs.logits, inputs.target, validate=False))

    return forward


def _refuse(case: Case) -> str | None:
    return "returns no entropy" if case.entropy else None


PEERS = [
    *(
        Peer(
            f"rl-kernel-{kind}", _fused(kind), _has(FUSED, kind), refuse=_refuse, package="rl-kernel",
            note=f"linear_logp, {kind}",
        )
        for kind in ("triton", "cuda")
    ),
    *(
        Peer(
            f"rl-kernel-logp-{kind}", _plain(kind), _has(PLAIN, kind), ops=("logprob",), refuse=_refuse,
            package="rl-kernel", note=f"batch-invariant logp from logits, {kind}",
        )
        for kind in ("triton", "cuda")
    ),
]  # fmt: skip
