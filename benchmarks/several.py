"""What several ids a row, and a row's statistics, cost beside one id: `python -m benchmarks.several --device cpu`.

Forward and step (forward, dX and dW) of `linear_logprob` in turns, on random states and weights: the ids are drawn by a
Zipf law, as a teacher's likely tokens are. The exact path's cost does not depend on the logits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, measure
from flowrl_kernels import linear_logprob

SHAPES = {"cuda": (8192, 3584, 152064, torch.bfloat16), "cpu": (256, 128, 8192, torch.float32)}  # N, H, V


def runs(n: int, h: int, v: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], object]]:
    make = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(rows, h, generator=make, device=device) for rows in (n, v))
    hidden, weight = hidden.to(dtype).requires_grad_(), (weight / h**0.5).to(dtype).requires_grad_()
    frequency = 1.0 / (torch.arange(v, device=device) + 3.0)
    ids = torch.stack([torch.multinomial(frequency, 64, generator=make) for _ in range(n)])

    def of(target: Tensor, step: bool, **settings: Any) -> Callable[[], object]:
        def run() -> object:
            with torch.set_grad_enabled(step):
                out = linear_logprob(hidden, weight, target, **settings)
            return torch.autograd.grad(out.logp.sum(), (hidden, weight)) if step else out

        return run

    kinds: dict[str, tuple[Tensor, dict]] = {
        "1 id": (ids[:, 0], {}),
        "1 id, statistics": (ids[:, 0], {"statistics": True}),
        **{f"{k} ids": (ids[:, :k], {}) for k in (2, 8, 64)},
    }
    return {
        f"{name}, {'step' if step else 'forward'}": of(target, step, **settings)
        for step in (False, True)
        for name, (target, settings) in kinds.items()
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(SHAPES), required=True)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    shape = SHAPES[given.device]
    made = runs(*shape, given.device)
    for run in made.values():
        run()  # compiles
    taken = measure.take_turns(made, measure.Clock(given.device), given.repeats)
    found = {"machine": machine.describe(given.device), "shape": [*shape[:3], str(shape[3])], "seconds": taken}
    text = json.dumps(found, indent=1)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
