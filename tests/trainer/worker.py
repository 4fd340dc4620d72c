"""A run that remembers the gradient and the weights w of every update; in this process, or started by torchrun.

`worker.py OUT [--section.field value ...]` writes them to OUT on rank 0.
"""

import os
import sys

import torch

from flowrl_kernels.trainer import config_file, loop, parallel
from flowrl_kernels.trainer import run as runs
from flowrl_kernels.trainer.config import Config


class Digits(runs.Scorer):
    """Rewards that random responses earn in many sizes, so that every group has something to learn from."""

    def score(self, problems, responses):
        return [sum(map(int, filter(str.isdigit, response))) / 10 for response in responses]


def record(args):
    """{"gradients": [per update, fp64 flat], "weights": [per update, this rank's w], "final": figures}."""
    seen = {"gradients": [], "weights": []}
    clip, apply, scorer = parallel.clip, loop.apply, runs.Scorer

    def recording(parameters, max_norm):
        whole = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in parameters]
        seen["gradients"].append(torch.cat([g.detach().double().flatten().clone() for g in whole]))
        return clip(parameters, max_norm)

    def applying(run, progress, update):
        result = apply(run, progress, update)
        seen["weights"].append(torch.cat([out.weight for out, _ in result.outputs]))
        return result

    parallel.clip, loop.apply, runs.Scorer = recording, applying, Digits
    try:
        seen["final"] = loop.train(config_file.override(Config(), args))
    finally:
        parallel.clip, loop.apply, runs.Scorer = clip, apply, scorer
    return seen


if __name__ == "__main__":
    seen = record(sys.argv[2:])
    if os.environ.get("RANK", "0") == "0":
        torch.save(seen, sys.argv[1])
