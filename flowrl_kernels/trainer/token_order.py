"""The order of the vocabulary that a sampled backward cuts its runs of 128 columns from (docs/maths.md, eq. 24).

A pair's mass is spread evenly over its run, so a draw errs least where the tokens of a run are about as likely. How
likely they are on the run's own prompts its responses say, which cost nothing more: a token was sampled as often, by
expectation, as its softmax probability adds up to. Whatever the order is, the gradient's expectation is the exact one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.parallel import World

ONE = 1 << 20  # one token of the newest step
SHIFT = 5  # a step's tokens count for 31/32 of what they did a step ago: some 32 steps are remembered


class TokenOrder:
    """Token ids by how often they were sampled lately, on all ranks; integers, so every rank has the same to the bit.

    Args:
        size: rows of the head.
        counts: [size] int64 of an earlier run, None for a new one.

    Raises:
        ValueError: the counts are not those of a head of this size.
    """

    def __init__(self, size: int, counts: Tensor | None = None) -> None:
        if counts is not None and (counts.shape != (size,) or counts.dtype != torch.int64):
            raise ValueError(f"counts: wanted int64 [{size}], a head's rows; got {counts.dtype} {list(counts.shape)}")
        self.counts = torch.zeros(size, dtype=torch.int64) if counts is None else counts

    def add(self, responses: Sequence[np.ndarray], world: World) -> None:
        """Counts this rank's responses of a step, [] int64 ids each; every rank calls it."""
        new = np.bincount(np.concatenate(responses), minlength=len(self.counts))
        whole = parallel.total(torch.from_numpy(new).to(world.device), world)
        self.counts = self.counts - (self.counts >> SHIFT) + whole * ONE

    def order(self) -> Tensor:
        """[V] int64 on the CPU: the ids sampled most first, those as often by id."""
        return self.counts.argsort(descending=True, stable=True)
