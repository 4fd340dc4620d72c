"""Run cases: check first, then time in turns, then memory. A speed is kept only for what passed its check."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import inputs as inputs_module
from benchmarks import machine, measure, oracle
from benchmarks.cases import CASES, Case
from benchmarks.peers import Outcome, Peer, load

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Settings:
    """device: "cpu" or "cuda". repeats: timed runs per implementation. seconds: rough budget per case, after which
    no further repeats start (never fewer than three). broken: implementations that lost the device before."""

    device: str
    repeats: int
    seed: int = 0
    threads: int | None = None
    memory: bool = True
    seconds: float = 60.0
    broken: tuple[str, ...] = ()


class DeviceLost(RuntimeError):
    """An implementation left the GPU's context broken: whatever this process did next would fail too."""

    def __init__(self, peer: str, reason: str):
        super().__init__(f"{peer} broke the device's context: {reason}")
        self.peer = peer


def returned_bytes(outcome: Outcome) -> int:
    return outcome.bytes()


def _status(peer: Peer, case: Case, device: str) -> tuple[str, str]:
    here, reason = peer.usable(device)
    if not here:
        return "unavailable", reason
    if (refusal := peer.refusal(case)) is not None:
        return "refused", refusal
    return "ok", reason


def check(peer: Peer, case: Case, made: inputs_module.Inputs, answer: oracle.Answer | None) -> dict:
    """Run once with gradients and compare with float64. The record holds status, errors and failures."""
    outcome = peer.run(case, made, backward=True)
    if case.op == "residual":
        errors = oracle.residual_distance(made, outcome)
    else:
        errors = oracle.distance(case, answer, outcome, uniform=not peer.per_token)
        if outcome.logp is not None and not peer.grads_in_forward:
            # the no-grad call must agree with the one that was differentiated
            alone = peer.run(case, made, backward=False)
            errors["logp_no_grad_gap"] = float((alone.logp - outcome.logp).abs().max())
    failures = oracle.failures(case, errors)
    record = {"status": "failed" if failures else "ok", "errors": errors, "failures": failures}
    if outcome.report is not None:
        bound, share, fell_back = (float(x) for x in outcome.report)
        record["bounded"] = {"bound": bound, "share_of_tiles": share, "fell_back": bool(fell_back)}
    return record


def run_case(case: Case, peers: list[Peer], settings: Settings, say=print) -> dict:
    """Everything about one case as a JSON-ready record."""
    device = settings.device
    record = case.record()
    record["implementations"] = {}
    load_before = machine.load()
    results = record["implementations"]
    runnable: list[Peer] = []
    made = inputs_module.make(case, device, settings.seed)
    answer = None
    if case.op != "residual":
        answer = oracle.solve(case, made, settings.seed)
        record["batch"] = answer.summary()
    for peer in peers:
        status, reason = _status(peer, case, device)
        entry = {"status": status, "reason": reason, "note": peer.note, "version": peer.version()}
        entry["per_token"], entry["recompute"] = peer.per_token, peer.recompute
        results[peer.name] = entry
        if status == "ok" and peer.name in settings.broken:
            entry["status"], entry["reason"] = "error", "broke the device's context"
        if entry["status"] != "ok":
            continue
        try:
            entry.update(check(peer, case, made, answer))
        except Exception as error:
            _failed(peer.name, entry, error, device)
        _release(device)
        if entry["status"] == "ok":
            runnable.append(peer)
        elif entry["status"] == "failed":
            say(f"  {peer.name}: FAILED {'; '.join(entry['failures'])}")
    del answer
    clock = measure.Clock(device)
    for what, backward in (("step", True), ("forward", False)):
        mine = [p for p in runnable if results[p.name]["status"] == "ok" and (backward or not p.grads_in_forward)]
        runs = {p.name: (lambda p=p, b=backward: p.run(case, made, b)) for p in mine}
        repeats = _repeats(runs, clock, settings, results)
        for name, times in measure.take_turns(runs, clock, repeats).items():
            results[name][what] = times
    for peer in runnable if settings.memory else ():
        if results[peer.name]["status"] == "ok":
            _release(device)
            results[peer.name]["memory"] = _memory(peer, case, made, settings)
    record["load"] = {"before": load_before, "after": machine.load()}
    _release(device)
    return record


def _repeats(runs: dict, clock: measure.Clock, settings: Settings, results: dict) -> int:
    """One warm-up turn of each, which also says how many turns fit the budget; one that fails is taken out."""
    begin = time.perf_counter()
    for name, run in list(runs.items()):
        try:
            clock(run)
        except Exception as error:
            del runs[name]
            _failed(name, results[name], error, settings.device)
    turn = time.perf_counter() - begin
    return max(3, min(settings.repeats, int(settings.seconds / max(turn, 1e-9))))


def _failed(name: str, entry: dict, error: Exception, device: str) -> None:
    """Record the error; raises DeviceLost if the GPU answers no more."""
    entry["status"], entry["reason"] = "error", _short(error)
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception:
            raise DeviceLost(name, entry["reason"]) from error


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def _release(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()


def _memory(peer: Peer, case: Case, made: inputs_module.Inputs, settings: Settings) -> dict:
    if settings.device == "cuda":
        return measure.cuda_peak(lambda: peer.run(case, made, True), returned_bytes)
    return fresh_process(peer.name, case, settings)


# glibc moves its threshold up to 32 MB as blocks are freed and then keeps them: fixed, so that freed means returned
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def fresh_process(peer: str, case: Case, settings: Settings) -> dict:
    """`memory_of` in a new process."""
    command = [
        sys.executable, "-m", "benchmarks.run", peer, case.name, str(settings.seed), str(settings.threads or 0),
    ]  # fmt: skip
    if case.name not in CASES:
        raise ValueError(f"case: wanted a named case to measure in a fresh process; got {case.name!r}")
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, env={**os.environ, **MALLOC})
    if made.returncode != 0:
        return {"error": (made.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(made.stdout.strip().splitlines()[-1])


def memory_of(peer: Peer, case: Case, seed: int) -> dict:
    """Peak resident set of one step, in this process, after a small run that loads the libraries."""
    small = Case("warm-up", case.op, "cpu", 64, min(case.h, 64), min(case.v, 512), dtype=case.dtype, sequences=4)
    peer.run(small, inputs_module.make(small, "cpu", seed), True)
    made = inputs_module.make(case, "cpu", seed)
    if peer.warm:
        peer.run(case, made, True)
    return measure.cpu_peak(lambda: peer.run(case, made, True), returned_bytes)


def _main(arguments: list[str]) -> None:
    peer, case, seed, threads = arguments
    if int(threads):
        torch.set_num_threads(int(threads))
    print(json.dumps(memory_of(load()[peer], CASES[case], int(seed))))


if __name__ == "__main__":
    _main(sys.argv[1:])
