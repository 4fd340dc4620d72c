"""A contest rating by maximum likelihood over the problems' own ratings (docs/maths.md, eq. 37)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flowrl_kernels.trainer.suites.file import Percentile
from flowrl_kernels.trainer.tasks.rows import rows

SCALE = math.log(10) / 400  # of the Elo curve: 400 points are odds of ten to one
SURE = 0.05  # chance of what was seen, at the bound that stands for a rating where all or nothing was solved
FAR = 8000.0  # points beyond the problems' ratings; odds of 10^20


class Rating(NamedTuple):
    rating: float | None  # None: no maximum, everything or nothing was solved; then one of the bounds stands
    se: float  # clustered by problem; NaN without a rating or with a single problem
    at_least: float | None
    at_most: float | None
    problems: int


def solved(rating: float, difficulty: float) -> float:
    """Chance that somebody of `rating` solves a problem of `difficulty`."""
    return 1 / (1 + math.exp(SCALE * (difficulty - rating)))


def fit(difficulties: Sequence[float], rates: Sequence[float]) -> Rating:
    """The rating under which the solved shares are likeliest, each problem counting as one.

    difficulties: the problems' ratings. rates: share of each one's samples that solved it, in [0, 1].
    All solved: at_least is the rating at which that much luck, one try a problem, has a chance of 5 %; at_most where
    nothing was. Raises ValueError for no problems, different numbers of the two, or a rating that is not finite.
    """
    if len(difficulties) != len(rates) or not rates:
        raise ValueError(f"wanted a rating for every result; got {len(difficulties)} and {len(rates)}")
    if not all(map(math.isfinite, difficulties)):
        raise ValueError("wanted finite ratings of problems")
    low, high = min(difficulties) - FAR, max(difficulties) + FAR
    many = len(rates)
    if all(rate == 1 for rate in rates):
        bound = _root(lambda r: math.fsum(math.log(solved(r, d)) for d in difficulties) - math.log(SURE), low, high)
        return Rating(None, math.nan, bound, None, many)
    if not any(rates):
        bound = _root(lambda r: math.log(SURE) - math.fsum(math.log(solved(d, r)) for d in difficulties), low, high)
        return Rating(None, math.nan, None, bound, many)
    best = _root(lambda r: math.fsum(solved(r, d) - rate for d, rate in zip(difficulties, rates)), low, high)
    chances = [solved(best, d) for d in difficulties]
    steepness = SCALE * math.fsum(p * (1 - p) for p in chances)
    scatter = math.fsum((rate - p) ** 2 for rate, p in zip(rates, chances))
    se = math.sqrt(scatter * many / (many - 1)) / steepness if many > 1 else math.nan
    return Rating(best, se, None, None, many)


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def of_problems(source: str, column: str, count: int) -> list[float | None]:
    """The ratings of the first `count` rows of a data file; None where a row has none.

    Raises ValueError for a rating that is no number, or where no row has one.
    """
    found: list[float | None] = []
    for where, row in rows(source):
        value = row.get(column)
        empty = value in (None, "") or value != value
        try:
            found.append(None if empty else float(value))
        except (TypeError, ValueError):
            raise ValueError(f"rating: {where}: wanted a number in {column!r}; got {value!r:.40}") from None
        if len(found) == count:
            break
    if not any(rating is not None for rating in found):
        raise ValueError(f"rating: no row of {source} has a number in {column!r}")
    return found


class Population(NamedTuple):
    """Users of a contest by rating."""

    ratings: list[float]
    counts: list[float]

    def below(self, rating: float) -> float:
        """Percent of the users with a lower rating."""
        lower = math.fsum(count for r, count in zip(self.ratings, self.counts) if r < rating)
        return 100 * lower / math.fsum(self.counts)


def population(table: Percentile) -> Population:
    """The user's own table of ratings; none comes with this package. Raises ValueError naming the row."""
    ratings, counts = [], []
    for where, row in rows(table.file):
        try:
            rating, count = float(row["rating"]), float(row.get("count", 1))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ValueError(f"percentile: {where}: wanted a `rating`, and numbers; got {row!r:.80}") from None
        if not (math.isfinite(rating) and math.isfinite(count) and count >= 0):
            raise ValueError(f"percentile: {where}: wanted finite numbers and a count of at least 0; got {row!r:.80}")
        ratings.append(rating)
        counts.append(count)
    if not sum(counts):
        raise ValueError(f"percentile: {table.file}: no users in it")
    return Population(ratings, counts)


def told(rating: Rating, people: Population | None, source: str) -> dict[str, float | str | None]:
    """What results.json says of a rating; the percentile, where there is a table, with the table's source."""
    found: dict[str, float | str | None] = dict(rating._asdict())
    if people is not None:
        shown = next(r for r in (rating.rating, rating.at_least, rating.at_most) if r is not None)
        found |= {"percentile": people.below(shown), "percentile_source": source}
    return found
