"""torch.compile over the eager path."""

from __future__ import annotations

import shutil
from functools import cache

import torch

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer
from benchmarks.peers.eager import from_logits


def available(device: str) -> tuple[bool, str]:
    if device == "cpu" and shutil.which("g++") is None and shutil.which("c++") is None:
        return False, "torch.compile on a CPU needs a C++ compiler; none is on the path"
    return True, "inductor"


@cache
def _compiled(entropy: bool, from_hidden: bool):
    def linear(hidden, weight, target, case):
        made = from_logits(case, hidden @ weight.T, target)
        return made.logp, made.entropy

    def plain(logits, target, case):
        made = from_logits(case, logits, target)
        return made.logp, made.entropy

    return torch.compile(linear if from_hidden else plain, dynamic=False)


def forward(case: Case, inputs: Inputs) -> Outcome:
    torch._dynamo.config.recompile_limit = 64
    if case.op == "logprob":
        made = _compiled(case.entropy, False)(inputs.logits, inputs.target, case)
    else:
        made = _compiled(case.entropy, True)(inputs.hidden, inputs.weight, inputs.target, case)
    return Outcome(logp=made[0], entropy=made[1])


PEERS = [
    Peer(
        "torch.compile", forward, available, ops=("linear_logprob", "logprob"), recompute=False, warm=True,
        package="torch", note="inductor over the eager path; static shapes",
    )
]  # fmt: skip
