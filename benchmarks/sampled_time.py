"""Time of forward and backward with a sampled backward over the exact one's: `python -m benchmarks.sampled_time`.

Exact and every share take turns, round after round, on one synthetic RL-like batch (`testing.rl_like_inputs`); the
figure is the median of the rounds' ratios. Nothing falls back: the share from which the exact path is the faster one
is what FALL_BACK of flowrl_kernels/chunked/sampled.py says, and of triton/sampled.py with `--device cuda`. With
`--order` each share also runs with the vocabulary in a random order, whose copies or gathers of the head it then pays.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from benchmarks import machine
from flowrl_kernels import Sampled, linear_logprob
from flowrl_kernels.testing import rl_like_inputs

Shape = tuple[int, int, int]  # N, H, V
SHAPES: dict[str, dict[str, Shape]] = {
    "cpu": {"smollm2-135m": (1024, 576, 49152), "qwen2.5-0.5b": (1024, 896, 151936)},
    "cuda": {"qwen2.5-7b": (8192, 3584, 152064)},
}
WAYS = {"cpu": (torch.float32, "chunked"), "cuda": (torch.bfloat16, "triton")}
SHARES = (0.03, 0.08, 0.16, 0.31, 0.5, 0.7)


def on_device() -> float:
    """Seconds, once the GPU has done what it was given."""
    torch.cuda.synchronize()
    return time.perf_counter()


def rounds(
    shape: Shape, shares: tuple[float, ...], count: int, clock: Callable[[], float], device: str = "cpu",
    in_order: bool = False,
) -> dict:  # fmt: skip
    """Seconds by round of the exact step and of each share's, the first round thrown away."""
    dtype, impl = WAYS[device]
    hidden, weight, target, grad = rl_like_inputs(*shape, dtype=dtype, device=device)
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    room = importlib.import_module(f"flowrl_kernels.{impl}.sampled")
    order = torch.randperm(shape[2], generator=torch.Generator().manual_seed(0)).to(device)
    kinds = {f"{share:g}": (share, None) for share in shares}
    kinds |= {f"{share:g} in an order": (share, order) for share in shares if in_order}

    def step(sampled: Sampled | None) -> float:
        x.grad = w.grad = None
        start = clock()
        linear_logprob(x, w, target, sampled=sampled, impl=impl).logp.backward(grad)
        return clock() - start

    exact: list[float] = []
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    with mock.patch.object(room, "FALL_BACK", 2.0):
        for i in range(count + 1):
            exact.append(step(None))
            for kind, (share, given) in kinds.items():
                taken[kind].append(step(Sampled(share, (i,), order=given)))
    ratios = {
        kind: {"ratio": statistics.median(t / e for t, e in zip(times[1:], exact[1:])), "seconds": times[1:]}
        for kind, times in taken.items()
    }
    return {"n": shape[0], "h": shape[1], "v": shape[2], "exact_seconds": exact[1:], "shares": ratios}


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.sampled_time", description=__doc__)
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--shape", action="append", choices=[name for shapes in SHAPES.values() for name in shapes],
                        default=[])  # fmt: skip
    parser.add_argument("--order", action="store_true", help="each share with an order of the vocabulary too")
    parser.add_argument("--share", action="append", type=float, default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processor", action="store_true", help="processor time, for a machine that others use")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    shapes = SHAPES[asked.device]
    if other := set(asked.shape) - set(shapes):
        parser.error(f"--shape: wanted one of {', '.join(shapes)} with --device {asked.device}; got {other.pop()}")
    clock = time.process_time if asked.processor else time.perf_counter if asked.device == "cpu" else on_device
    document = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(asked.device),
        "versions": machine.versions(),
        **machine.commit(),
        "clock": clock.__name__,
        "shapes": {},
    }
    for name in asked.shape or shapes:
        shares = tuple(asked.share) or SHARES
        made = rounds(shapes[name], shares, asked.rounds, clock, asked.device, asked.order)
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
