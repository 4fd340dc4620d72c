"""avg@k and pass@k with standard errors clustered by problem, and two results compared problem by problem."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from flowrl_kernels.trainer.evaluate import pass_at_k, powers_of_two


class Outcome(NamedTuple):
    """One problem's results: a line of a suite's JSONL file."""

    id: int
    problem: str  # SHA-256 of prompt and answer
    correct: list[bool | None]  # None: could not be scored
    tokens: list[int]
    finished: list[bool]
    responses: list[str]

    @classmethod
    def read(cls, row: dict[str, Any]) -> Outcome:
        return cls(*(row[name] for name in cls._fields))

    @property
    def scored(self) -> list[bool]:
        return [right for right in self.correct if right is not None]

    @property
    def rate(self) -> float:
        return sum(self.scored) / len(self.scored)


class Estimate(NamedTuple):
    mean: float
    se: float  # NaN for fewer than two problems


def estimate(values: Sequence[float]) -> Estimate:
    """Mean over problems and its standard error, one value a problem: samples of one problem are no independent
    trials (docs/maths.md, eq. 36; Miller 2024, arXiv:2411.00640).
    """
    if not values:
        return Estimate(math.nan, math.nan)
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, math.nan)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Estimate(mean, math.sqrt(squares / (len(values) - 1) / len(values)))


def sampling_error(outcomes: Sequence[Outcome]) -> float:
    """Standard error of avg@k that is left when the problems stay the same and only the samples are drawn again."""
    rows = [(outcome.rate, len(outcome.scored)) for outcome in outcomes if outcome.scored]
    if not rows or any(n < 2 for _, n in rows):
        return math.nan
    return math.sqrt(math.fsum(p * (1 - p) / (n - 1) for p, n in rows)) / len(rows)


def passes(outcomes: Sequence[Outcome], k: int) -> list[float] | None:
    """Each problem's unbiased pass@k; None where one has fewer than k scored samples."""
    rows = [(len(outcome.scored), sum(outcome.scored)) for outcome in outcomes if outcome.scored]
    return [pass_at_k(n, right, k) for n, right in rows] if rows and min(n for n, _ in rows) >= k else None


def figures(outcomes: Sequence[Outcome], samples: int) -> dict[str, float]:
    """avg@k and pass@k for k = 1, 2, 4, ... to `samples`, each with its `_se`; sampling_se; problems; unscorable and
    truncated (shares of the responses); length (mean, tokens with the end token).

    A response that could not be scored is left out of its problem's n; a problem with none left is left out, and
    pass@k is missing where a problem has fewer than k.
    """
    mean, se = estimate([outcome.rate for outcome in outcomes if outcome.scored])
    found = {f"avg@{samples}": mean, f"avg@{samples}_se": se, "sampling_se": sampling_error(outcomes)}
    for k in powers_of_two(samples):
        if (values := passes(outcomes, k)) is not None:
            found[f"pass@{k}"], found[f"pass@{k}_se"] = estimate(values)
    tokens = [n for outcome in outcomes for n in outcome.tokens]
    found["truncated"] = sum(not done for outcome in outcomes for done in outcome.finished) / len(tokens)
    found["length"] = sum(tokens) / len(tokens)
    found["unscorable"] = sum(right is None for outcome in outcomes for right in outcome.correct) / len(tokens)
    found["problems"] = float(sum(bool(outcome.scored) for outcome in outcomes))
    return found


# ------------------------------------------------------------------------------------------------ two results


class Difference(NamedTuple):
    """b - a over the same problems; low and high bound its 95 % interval."""

    mean: float
    se: float
    low: float
    high: float
    better: int  # problems where b is better
    worse: int
    problems: int


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """The mean difference of two results on the same problems, with Student's interval (docs/maths.md, eq. 36).

    Raises ValueError for results of different numbers of problems, or of none.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"wanted two results on the same problems, at least one; got {len(a)} and {len(b)} problems")
    differences = [y - x for x, y in zip(a, b)]
    mean, se = estimate(differences)
    half = t_quantile(0.975, len(a) - 1) * se if len(a) > 1 else math.nan
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return Difference(mean, se, mean - half, mean + half, better, worse, len(a))


@functools.cache
def t_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's t, 0.5 <= p < 1, freedom >= 1; by bisection of the incomplete beta function."""
    import mpmath  # comes with torch, through sympy

    low, high = 0.0, 1.0

    def above(t: float) -> bool:
        tail = mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True) / 2
        return bool(tail < 1 - p)

    while not above(high):
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if above(middle) else (middle, high)
    return high
