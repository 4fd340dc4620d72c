"""Countdown: reach a target from given numbers, each used once. Problems from a seed, all solutions known.

The task of TinyZero (https://github.com/Jiayi-Pan/TinyZero) in a size that a small model learns on a CPU.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from flowrl_kernels.trainer.tasks.base import OpenTask, Problem, check_split
from flowrl_kernels.trainer.tasks.expressions import (
    Expression,
    chains,
    expressions,
    parse,
    read_chain,
    written,
)

ANSWERS = ("chain", "infix")


@lru_cache(maxsize=4096)
def _texts(numbers: tuple[int, ...], answer: str) -> dict[int, list[tuple[str, str]]]:
    """target -> texts that reach it, sorted, each with its canonical solution."""
    if answer == "chain":
        # a chain that can be read in two ways is read in one, the verifier's
        pairs = ((text, read_chain(text, numbers)) for text in set(chains(numbers)))
    else:
        pairs = ((text, solution) for text, solution in written(numbers))
    reached: dict[int, dict[str, str]] = {}
    for text, solution in pairs:
        if solution is not None and solution.value.denominator == 1:
            reached.setdefault(int(solution.value), {})[text] = solution.text
    return {target: sorted(texts.items()) for target, texts in reached.items()}


def _count(numbers: tuple[int, ...], answer: str, distinct: bool) -> dict[int, int]:
    """target -> number of solutions; without `distinct` only the keys are sure, which is quicker."""
    if answer == "chain" and distinct:
        return {target: len({key for _, key in texts}) for target, texts in _texts(numbers, answer).items()}
    values = [e.value for e in expressions(numbers, answer == "chain") if e.value.denominator == 1]
    return {int(value): values.count(value) for value in set(values)}


@dataclass(frozen=True)
class Countdown(OpenTask):
    """Prompt "2,3,6=15:" asks for 15 from 2, 3 and 6, always given in rising order.

    answer: "chain" wants one true step after another, "2*6=12,3+12=15", each intermediate a non-negative
    integer; "infix" one expression, "2*6+3", of any rational value underway. Problems are every reachable
    (numbers, target) with at least `min_solutions` different solutions, shuffled by the seed: `held_out` for
    test, as many for valid, the rest for train and the warm start. The same numbers may come with another
    target in another split, the same numbers and target never.

    Raises ValueError for numbers outside 2..4, an empty range, an unknown answer form or too few problems.
    """

    numbers: int = 3
    largest: int = 9
    max_target: int = 30
    min_solutions: int = 1
    held_out: int = 200
    answer: str = "chain"
    seed: int = 0
    name: str = "countdown"
    alphabet: str = "0123456789+-*/=,:()"
    trusted: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= 4:
            raise ValueError(f"task.numbers must be 2, 3 or 4 (all solutions are listed), got {self.numbers}")
        if self.answer not in ANSWERS:
            raise ValueError(f"task.answer must be one of {', '.join(ANSWERS)}, got {self.answer!r}")
        for field in ("largest", "max_target", "min_solutions", "held_out"):
            if getattr(self, field) < 1:
                raise ValueError(f"task.{field} must be at least 1, got {getattr(self, field)}")
        if self.largest > 99:
            raise ValueError(f"task.largest must be at most 99, got {self.largest}")

    @property
    def max_prompt_tokens(self) -> int:
        return self.numbers * (len(str(self.largest)) + 1) + len(str(self.max_target)) + 1

    @property
    def max_response_tokens(self) -> int:
        if self.answer == "infix":  # digits, operators, a pair of parentheses per inner operator, EOS
            return self.numbers * len(str(self.largest)) + (self.numbers - 1) + 2 * max(0, self.numbers - 2) + 1
        total = self.numbers - 1  # commas and EOS
        for step in range(1, self.numbers):
            last = step == self.numbers - 1
            result = self.max_target if last else self.largest ** (step + 1)
            total += len(str(self.largest**step)) + len(str(self.largest)) + len(str(result)) + 2
        return total + (1 if self.numbers == 4 else 0)  # two results of two numbers each, in the last step

    @cached_property
    def _splits(self) -> dict[str, list[Problem]]:
        found: list[tuple[tuple[int, ...], int]] = []
        for given in itertools.combinations_with_replacement(range(1, self.largest + 1), self.numbers):
            count = _count(given, self.answer, self.min_solutions > 1)
            found += [
                (given, target)
                for target in range(1, self.max_target + 1)
                if count.get(target, 0) >= self.min_solutions
            ]
        if len(found) <= 2 * self.held_out:
            raise ValueError(
                f"task.held_out = {self.held_out} for each of valid and test leaves nothing to train on: "
                f"there are {len(found)} problems with numbers={self.numbers}, largest={self.largest}, "
                f"max_target={self.max_target}, min_solutions={self.min_solutions}"
            )
        random.Random(self.seed).shuffle(found)
        cut = {
            "test": found[: self.held_out],
            "valid": found[self.held_out : 2 * self.held_out],
            "train": found[2 * self.held_out :],
        }
        return {
            split: [
                Problem(i, f"{','.join(map(str, given))}={target}:", {"numbers": list(given), "target": target})
                for i, (given, target) in enumerate(problems)
            ]
            for split, problems in cut.items()
        }

    def problems(self, split: str) -> Sequence[Problem]:
        return self._splits[check_split(split)]

    def _read(self, problem: Problem, response: str) -> Expression | None:
        given, target = problem.answer["numbers"], problem.answer["target"]
        if self.answer == "chain":
            solution = read_chain(response, given)
            return solution if solution is not None and solution.value == target else None
        return solve_infix(response, given, target)

    def verify(self, problem: Problem, response: str) -> float:
        return float(self._read(problem, response) is not None)

    def correct(self, reward: float) -> bool:
        return reward > 0.5

    def canonical(self, problem: Problem, response: str) -> str | None:
        solution = self._read(problem, response)
        return None if solution is None else solution.text

    def solutions(self, problem: Problem) -> list[str]:
        given, target = tuple(problem.answer["numbers"]), problem.answer["target"]
        if self.answer == "chain":
            return sorted({key for _, key in self._written(problem)})
        return sorted(e.text for e in expressions(given, False) if e.value == target)

    def _written(self, problem: Problem) -> list[tuple[str, str]]:
        return _texts(tuple(problem.answer["numbers"]), self.answer)[problem.answer["target"]]

    def correct_texts(self, problem: Problem) -> list[tuple[str, str]] | None:
        # needless parentheses make infinitely many infix texts
        return self._written(problem) if self.answer == "chain" else None

    def warm_start(self, rng: np.random.Generator, n: int) -> list[tuple[Problem, str]]:
        """Random train problems, each with one of its right texts drawn uniformly."""
        train = self._splits["train"]
        pairs = []
        for i in rng.integers(len(train), size=n):
            texts = self._written(train[i])
            pairs.append((train[i], texts[int(rng.integers(len(texts)))][0]))
        return pairs


def solve_infix(text: str, numbers: Sequence[int], target: int) -> Expression | None:
    """The solution an infix text spells, None unless it uses each number once and equals the target."""
    read = parse(text)
    if read is None or sorted(read[1]) != sorted(numbers) or read[0].value != target:
        return None
    return read[0]


def read_wanted(answer: Any) -> tuple[list[int], int] | None:
    """(numbers, target) of a row's answer, {"numbers": [...], "target": n} or its JSON text; None for another form."""
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except (ValueError, RecursionError):
            return None
    if not isinstance(answer, Mapping) or not isinstance(answer.get("numbers"), list | tuple):
        return None
    given = [*answer["numbers"], answer.get("target")]
    if len(given) < 2 or not all(isinstance(x, int) or (isinstance(x, float) and x.is_integer()) for x in given):
        return None
    *numbers, target = map(int, given)
    return numbers, target


def countdown_reward(prompt: Any, response: str, answer: Any) -> float:
    """Countdown for language models: 1.0 if the response's answer reaches the target, else 0.0.

    answer: {"numbers": [...], "target": n}, or its JSON text. The answer is what stands in the last
    <answer>...</answer>, else the last line; a trailing "= target" is allowed. Raises ValueError for an answer
    column of another form.
    """
    wanted = read_wanted(answer)
    if wanted is None:
        raise ValueError(f'the answer of a countdown row must be {{"numbers": [...], "target": n}}, got {answer!r:.80}')
    numbers, target = wanted
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    tagged = response[start + len("<answer>") : end] if 0 <= start < end else None
    lines = (response if tagged is None else tagged).strip().splitlines()
    text = lines[-1].strip() if lines else ""
    expression, _, value = text.partition("=")
    if value and value.strip() != str(target):
        return 0.0
    return float(solve_infix(expression, numbers, target) is not None)
