"""The small cases under pytest-benchmark: `pytest benchmarks/`. An implementation is checked before it is timed."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("pytest_benchmark")

import torch

from benchmarks import inputs, oracle
from benchmarks.cases import CASES
from benchmarks.peers import load
from benchmarks.run import check

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {
    "cpu": ("cpu-small", "cpu-small-entropy", "cpu-small-bf16", "cpu-small-bounded", "cpu-logprob", "cpu-residual"),
    "cuda": ("precision-16", "logprob-8k", "residual-256x8192"),
}[DEVICE]


@functools.lru_cache(maxsize=1)
def _made(name: str):
    case = CASES[name]
    made = inputs.make(case, DEVICE, seed=0)
    return made, None if case.op == "residual" else oracle.solve(case, made, seed=0)


@pytest.mark.parametrize("peer", load().values(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("name", NAMES)
def test_step(benchmark, name, peer):
    case = CASES[name]
    here, reason = peer.usable(DEVICE)
    if not here:
        pytest.skip(reason)
    if (refusal := peer.refusal(case)) is not None:
        pytest.skip(refusal)
    made, answer = _made(name)
    record = check(peer, case, made, answer)
    assert record["status"] == "ok", record["failures"]
    benchmark.group = name

    def step():
        peer.run(case, made, backward=True)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
