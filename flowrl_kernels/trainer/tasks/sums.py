"""Sums: name three digits that add up to a total. 15 to 75 right answers per prompt, 1,000 well-formed ones.

Every response can be listed, so the distribution that makes FlowRL's residual vanish, its log Z and the
policy's distance from it are known exactly (`flowrl_kernels.trainer.evaluate.exact`), not estimated.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from flowrl_kernels.trainer.tasks.base import Problem, check_split

TOTALS = range(4, 24)  # below 4 and above 23 a prompt has fewer than 15 right answers
_ANSWER = re.compile(r"([0-9])\+([0-9])\+([0-9])")


@dataclass(frozen=True)
class Sums:
    """Prompt "07=", answers such as "1+2+4": the order of the digits counts, as it does for the policy.

    The three splits are the same 20 totals: the task measures how a policy spreads over answers, not whether
    it generalises (Countdown has held-out problems). The warm start shows uniformly random well-formed
    answers, so the format is known and the arithmetic is not: about 5 % of its samples are right.
    """

    name: str = "sums"
    alphabet: str = "0123456789+="
    max_prompt_tokens: int = 3
    max_response_tokens: int = 6
    trusted: bool = True

    @cached_property
    def _problems(self) -> list[Problem]:
        return [Problem(id=i, prompt=f"{total:02d}=", answer=total) for i, total in enumerate(TOTALS)]

    @cached_property
    def _responses(self) -> list[str]:
        return ["+".join(digits) for digits in itertools.product("0123456789", repeat=3)]

    @cached_property
    def _right(self) -> dict[int, list[str]]:
        right: dict[int, list[str]] = {total: [] for total in range(28)}
        for text in self._responses:
            right[sum(map(int, text.split("+")))].append(text)
        return right

    def problems(self, split: str) -> Sequence[Problem]:
        check_split(split)
        return self._problems

    def verify(self, problem: Problem, response: str) -> float:
        match = _ANSWER.fullmatch(response)
        return float(match is not None and sum(map(int, match.groups())) == problem.answer)

    def correct(self, reward: float) -> bool:
        return reward > 0.5

    def canonical(self, problem: Problem, response: str) -> str | None:
        return response if self.verify(problem, response) else None

    def solutions(self, problem: Problem) -> list[str]:
        return self._right[problem.answer]

    def correct_texts(self, problem: Problem) -> list[tuple[str, str]]:
        return [(text, text) for text in self._right[problem.answer]]

    def responses(self, problem: Problem) -> list[str]:
        return self._responses

    def warm_start(self, rng: np.random.Generator, n: int) -> list[tuple[Problem, str]]:
        which = rng.integers(len(self._problems), size=n)
        answer = rng.integers(len(self._responses), size=n)
        return [(self._problems[i], self._responses[j]) for i, j in zip(which, answer)]
