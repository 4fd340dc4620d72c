"""TRL 1.16's ChunkedLogProbFunction (trl/kernels/chunked_logprob.py): Triton on a GPU, torch elsewhere."""

from __future__ import annotations

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer, imports, installed

CHUNK = 8192  # vocabulary columns per tile, the trainers' default


def available(device: str) -> tuple[bool, str]:
    here = installed("trl", "trl")
    if not here[0]:
        return here
    function, reason = imports("trl.kernels.chunked_logprob", "ChunkedLogProbFunction")
    return (function is not None), reason or here[1]


def forward(case: Case, inputs: Inputs) -> Outcome:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    outputs = ("entropy",) if case.entropy else ()
    logp, entropy, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden, inputs.weight, None, inputs.target, 1.0, CHUNK, None, 1.0, outputs
    )
    return Outcome(logp=logp, entropy=entropy)


PEERS = [Peer("trl-chunked", forward, available, package="trl", note=f"chunk_size {CHUNK}")]
