"""Which problems a step asks: a function of seed and step alone, so a resumed run needs no position in the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.tasks import Problem, Task


@dataclass(frozen=True)
class Mixture:
    """Several sources by weight; the problems stand one source behind the other.

    sizes: problems of each. counts: of those in an epoch, which is as long as all problems together, from each.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]


def stream(key: tuple[int, ...], first: int, count: int, total: int) -> list[int]:
    """Elements `first` to `first + count` of one permutation of `total` behind the other, each from its number."""
    out: list[int] = []
    for epoch in range(first // total, (first + count - 1) // total + 1):
        order = np.random.default_rng((*key[:2], epoch, *key[2:])).permutation(total)
        out += order[max(first - epoch * total, 0) : first + count - epoch * total].tolist()
    return out


def prompt_numbers(
    seed: int, step: int, count: int, total: int, mixture: Mixture | None = None, extra: int = 0
) -> list[int]:
    """Which problems step `step` (from 1) asks: each epoch has an order of its own; no state.

    mixture: how many an epoch asks of each source, which walks through its own permutations; None: every problem once.
    extra: number of a round that asks other prompts in the same step (`dynamic`), in an order of its own.
    """
    more = (extra,) if extra else ()
    first = (step - 1) * count
    if mixture is None:
        return stream((seed, 1, *more), first, count, total)
    out: list[int] = []
    for epoch in range(first // total, (first + count - 1) // total + 1):
        asked, start = [], 0
        for source, (size, share) in enumerate(zip(mixture.sizes, mixture.counts)):
            asked += [start + i for i in stream((seed, 4 + source, *more), epoch * share, share, size)]
            start += size
        order = np.random.default_rng((seed, 1, epoch, *more)).permutation(total)
        out += [asked[i] for i in order[max(first - epoch * total, 0) : first + count - epoch * total].tolist()]
    return out


def mixture_of(cfg: TaskConfig, task: Task, problems: Sequence[Problem]) -> Mixture | None:
    """How `task.train_weights` mixes what is left of the training files; None: as long as they are.

    Raises:
        ValueError: a weight is not positive or gives no prompt, there is not one for each file, or a file has nothing
            left to ask.
    """
    weights = cfg.train_weights
    if not weights:
        return None
    sources = getattr(task, "sources", ())
    if len(weights) != len(sources):
        raise ValueError(f"task.train_weights: wanted one for each of {len(sources) or 1} files; got {len(weights)}")
    ends = np.cumsum(sources)
    found = np.bincount(np.searchsorted(ends, [p.id for p in problems], side="right"), minlength=len(ends))
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"task.train_weights: wanted numbers above 0; got {list(weights)}")
    if not found.all():
        raise ValueError(
            f"task.train_weights: no prompt of file {int(found.argmin()) + 1} of task.train is left to ask"
        )
    share = np.asarray(weights) / sum(weights) * len(problems)
    counts = np.floor(share).astype(int)
    counts[np.argsort(counts - share, kind="stable")[: len(problems) - counts.sum()]] += 1  # largest remainders
    if not counts.all():
        number = int(counts.argmin())
        raise ValueError(
            f"task.train_weights: {weights[number]} gives file {number + 1} of task.train none of an epoch's "
            f"{len(problems)} prompts"
        )
    return Mixture(tuple(found.tolist()), tuple(counts.tolist()))
