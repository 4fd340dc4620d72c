"""How many different solutions: effective numbers and distinct@k, with intervals over problems (docs/maths.md, eq. 38).

What counts as the same solution is a form (`forms`); here a form is only a label on each response.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
SEED = 0


class Spread(NamedTuple):
    """One problem's scored responses: how many, and how many of each solution among those that are labelled."""

    drawn: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, labels: Sequence[str | None]) -> Spread:
        return cls(len(labels), tuple(Counter(label for label in labels if label is not None).values()))

    @property
    def members(self) -> int:
        return sum(self.counts)


def entropy_number(counts: Sequence[int]) -> float:
    """exp(entropy) of the shares (Hill's number of order 1): as many equally frequent solutions are as spread.

    Of few responses it is too low, for they cannot show more solutions than there are of them. NaN for none.
    """
    total = sum(counts)
    if not total:
        return math.nan
    return math.exp(-math.fsum(c / total * math.log(c / total) for c in counts))


def collision(counts: Sequence[int]) -> float:
    """Chance that two responses, drawn without replacement, are the same solution: unbiased for two fresh ones
    (Simpson 1949). NaN for fewer than two.
    """
    total = sum(counts)
    return sum(c * (c - 1) for c in counts) / (total * (total - 1)) if total > 1 else math.nan


def distinct_at_k(spread: Spread, k: int) -> float:
    """Different solutions among k of the drawn responses, expected over every choice of k: unbiased for k fresh ones.

    Hurlbert 1971's rarefaction; with a single solution it is pass@k. Raises ValueError unless 1 <= k <= drawn.
    """
    if not 1 <= k <= spread.drawn:
        raise ValueError(f"k: wanted 1 to {spread.drawn}, the responses drawn; got {k}")
    every = math.comb(spread.drawn, k)
    return math.fsum(1 - math.comb(spread.drawn - count, k) / every for count in spread.counts)


class Interval(NamedTuple):
    """A figure and its 95 % bootstrap interval; None where it cannot be said."""

    value: float | None
    low: float | None
    high: float | None
    problems: int  # that it is made of


def figures(
    spreads: Sequence[Spread], ks: Sequence[int], solutions: Sequence[int] | None = None, seed: int = SEED
) -> dict[str, Interval]:
    """{figure: interval} of one form.

    members: labelled responses a problem. entropy: mean over problems of `entropy_number`, of those with one or more.
    simpson: 1 / mean over problems of `collision`, of those with two or more; it does not grow with the number of
    responses. distinct@k for every k that each problem has; covered@k, as a share of `solutions`, the number of each
    problem's solutions, where that is known. Intervals: percentiles of 2,000 resamples of whole problems.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(spreads), np.full(len(spreads), 1 / len(spreads)), RESAMPLES)  # [R, P]
    columns = {
        "members": [float(spread.members) for spread in spreads],
        "entropy": [entropy_number(spread.counts) for spread in spreads],
        "simpson": [collision(spread.counts) for spread in spreads],
    }
    for k in ks:
        if all(spread.drawn >= k for spread in spreads):
            columns[f"distinct@{k}"] = [distinct_at_k(spread, k) for spread in spreads]
            if solutions is not None and all(solutions):
                shares = zip(columns[f"distinct@{k}"], solutions)
                columns[f"covered@{k}"] = [found / all_of_them for found, all_of_them in shares]
    return {
        name: interval(np.array(values, dtype=float), weights, inverse=name == "simpson")
        for name, values in columns.items()
    }


def interval(values: np.ndarray, weights: np.ndarray, inverse: bool = False) -> Interval:
    """The mean of the values that are no NaN, or its inverse, and its percentiles under [R, P] resampling weights."""
    there = ~np.isnan(values)
    if not there.any():
        return Interval(None, None, None, 0)
    known, counted = np.where(there, values, 0.0), weights @ there
    mean = known.sum() / there.sum()
    means = (weights @ known)[counted > 0] / counted[counted > 0]
    if not inverse:
        low, high = np.percentile(means, [2.5, 97.5])
        return Interval(float(mean), float(low), float(high), int(there.sum()))
    low, high = np.percentile(means, [2.5, 97.5])  # no two alike in some resamples: no upper bound
    return Interval(
        1 / float(mean) if mean else None, 1 / float(high) if high else None, 1 / float(low) if low else None,
        int(there.sum()),
    )  # fmt: skip
