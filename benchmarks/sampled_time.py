"""Time of forward and backward with a sampled backward over the exact one's: `python -m benchmarks.sampled_time`.

Exact and every share take turns, round after round, on one synthetic RL-like batch (`testing.rl_like_inputs`); the
figure is the median of the rounds' ratios. Nothing falls back: the share from which the exact path is the faster one
is what FALL_BACK of flowrl_kernels/chunked/sampled.py says.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks import machine
from flowrl_kernels import Sampled, linear_logprob
from flowrl_kernels.chunked import sampled as room
from flowrl_kernels.testing import rl_like_inputs

SHAPES = {"smollm2-135m": (1024, 576, 49152), "qwen2.5-0.5b": (1024, 896, 151936)}  # N, H, V
SHARES = (0.03, 0.08, 0.16, 0.31, 0.5, 0.7)


def rounds(shape: tuple[int, int, int], shares: tuple[float, ...], count: int, clock: Callable[[], float]) -> dict:
    """Seconds by round of the exact step and of each share's, the first round thrown away."""
    hidden, weight, target, grad = rl_like_inputs(*shape)
    x, w = hidden.requires_grad_(), weight.requires_grad_()

    def step(sampled: Sampled | None) -> float:
        x.grad = w.grad = None
        start = clock()
        linear_logprob(x, w, target, sampled=sampled, impl="chunked").logp.backward(grad)
        return clock() - start

    exact: list[float] = []
    by_share: dict[float, list[float]] = {share: [] for share in shares}
    with mock.patch.object(room, "FALL_BACK", 2.0):
        for i in range(count + 1):
            exact.append(step(None))
            for share, times in by_share.items():
                times.append(step(Sampled(share, (i,))))
    ratios = {
        f"{share:g}": {
            "ratio": statistics.median(t / e for t, e in zip(times[1:], exact[1:])),
            "seconds": times[1:],
        }
        for share, times in by_share.items()
    }
    return {"n": shape[0], "h": shape[1], "v": shape[2], "exact_seconds": exact[1:], "shares": ratios}


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.sampled_time", description=__doc__)
    parser.add_argument("--shape", action="append", choices=tuple(SHAPES), default=[])
    parser.add_argument("--share", action="append", type=float, default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="processor time, for a machine that others use")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.processor else time.perf_counter
    document = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe("cpu"),
        "versions": machine.versions(),
        **machine.commit(),
        "clock": clock.__name__,
        "shapes": {},
    }
    for name in asked.shape or SHAPES:
        made = rounds(SHAPES[name], tuple(asked.share) or SHARES, asked.rounds, clock)
        document["shapes"][name] = made
        exact = statistics.median(made["exact_seconds"])
        found = ", ".join(f"s {share} {cell['ratio']:.2f}" for share, cell in made["shares"].items())
        print(f"{name}: exact {exact:.2f} s; {found}", flush=True)
    document["load"] = machine.load()
    if asked.out is not None:
        asked.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
