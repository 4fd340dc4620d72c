"""Log-probs over kept sets beside those over the whole vocabulary: `python -m benchmarks.kept --out FILE`.

Synthetic: random hidden states and heads; one id in half of the rows, a geometric number in the others, 20 a row on
average; ids by a Zipf law. Lists come from the host, as they do in a trainer: sorting them is part of the time.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from benchmarks import machine, measure
from benchmarks.inputs import zipf_ids
from flowrl_kernels import linear_logprob

MEAN = 20


def counts(rows: int, generator: torch.Generator) -> torch.Tensor:
    """Ids of each row: one in half of the rows, the rest geometric, MEAN on average. [N]"""
    rest = torch.rand(rows, generator=generator).log_().div_(math.log1p(-1.0 / (2 * MEAN - 1))).long() + 1
    return torch.where(torch.rand(rows, generator=generator) < 0.5, 1, rest)


def measured(device: str, n: int, h: int, v: int, dtype: torch.dtype, repeats: int) -> dict:
    make = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=make).to(device, dtype) for shape in ((n, h), (v, h)))
    weight /= math.sqrt(h)
    sizes = counts(n, make)
    ids = zipf_ids(int(sizes.sum()), v, 1.0, "cpu", make)
    kept = ids, torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    target, grad = torch.randint(v, (n,), generator=make).to(device), torch.randn(n, generator=make).to(device)
    x, w = hidden.requires_grad_(), weight.requires_grad_()

    def forward(given):
        with torch.no_grad():
            return linear_logprob(x, w, target, kept=given).logp

    def step(given):
        return torch.autograd.grad(linear_logprob(x, w, target, kept=given).logp, (x, w), grad)

    ways = {"whole vocabulary": None, "kept": kept}
    clock, made = measure.Clock(device), {}
    for what, run in (("forward", forward), ("forward + backward", step)):
        runs = {name: lambda run=run, given=given: run(given) for name, given in ways.items()}
        for once in runs.values():
            once()
        made[what] = measure.take_turns(runs, clock, repeats)
    shape = {"n": n, "h": h, "v": v, "dtype": str(dtype), "ids": len(ids), "widest": int(sizes.max())}
    return {**shape, "times": made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.device == "cuda":
        shapes = [(8192, 3584, 152064, torch.bfloat16), (8192, 896, 151936, torch.bfloat16)]
    else:
        shapes = [(512, 256, 32768, torch.float32), (256, 896, 32768, torch.float32)]
    rows = []
    for shape in shapes:
        rows.append(measured(options.device, *shape, repeats=options.repeats))
        for what, taken in rows[-1]["times"].items():
            times = ", ".join(f"{name} {1e3 * one['median_s']:.1f} ms" for name, one in taken.items())
            print(shape, f"{rows[-1]['ids']} ids, widest {rows[-1]['widest']}: {what}: {times}")
        facts = {"kind": "kept", "machine": machine.describe(options.device), "versions": machine.versions()}
        options.out.write_text(json.dumps({**facts, **machine.commit(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
