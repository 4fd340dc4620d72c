"""What the training loop asks of a task: problems by split, a verifier, and whatever can be enumerated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Problem:
    """One prompt and what its verifier needs.

    id: stable inside its split. prompt: text, or chat messages `[{"role", "content"}]` for the tokenizer's
    chat template. answer: whatever the reward reads; must pickle, since rewards may run in other processes.
    """

    id: int
    prompt: str | list[dict[str, str]]
    answer: Any


class Task(Protocol):
    """A task is data and pure functions: every rank builds the same one from the same settings.

    Responses are texts without the end-of-sequence token. A task that has no notion of something returns
    None.
    """

    @property
    def name(self) -> str: ...

    @property
    def alphabet(self) -> str | None:
        """Characters of a character-level task (tasks/tokenizer.py); None: any tokenizer."""

    @property
    def max_prompt_tokens(self) -> int | None:
        """The longest prompt, None where unknown before tokenizing."""

    @property
    def max_response_tokens(self) -> int | None:
        """The longest right answer with its EOS, None where unknown."""

    @property
    def trusted(self) -> bool:
        """verify() is quick, safe and never hangs: it is called in the training process."""

    def problems(self, split: str) -> Sequence[Problem]:
        """The problems of "train", "valid" (chooses hyper-parameters) or "test" (held out)."""

    def verify(self, problem: Problem, response: str) -> float | None:
        """The reward; None where this response cannot be scored (it is then left out, never counted as 0)."""

    def correct(self, reward: float) -> bool:
        """Does this reward count as solved?"""

    def canonical(self, problem: Problem, response: str) -> str | None:
        """The same key for answers that are the same solution; None for a wrong answer or no such notion."""

    def solutions(self, problem: Problem) -> list[str] | None:
        """Every canonical key of a right answer, sorted."""

    def correct_texts(self, problem: Problem) -> list[tuple[str, str]] | None:
        """Every response text the verifier accepts, with its canonical key."""

    def responses(self, problem: Problem) -> list[str] | None:
        """Every well-formed response text, right or wrong."""

    def warm_start(self, rng: np.random.Generator, n: int) -> list[tuple[Problem, str]] | None:
        """n supervised (problem, response) pairs, from the train split only; None: the task has no warm
        start.
        """


class OpenTask:
    """What a task inherits whose answers nobody can list: each notion that a `Task` may lack, lacking."""

    alphabet: str | None = None

    @property
    def max_prompt_tokens(self) -> int | None:
        return None

    @property
    def max_response_tokens(self) -> int | None:
        return None

    def canonical(self, problem: Problem, response: str) -> str | None:
        return None

    def solutions(self, problem: Problem) -> list[str] | None:
        return None

    def correct_texts(self, problem: Problem) -> list[tuple[str, str]] | None:
        return None

    def responses(self, problem: Problem) -> list[str] | None:
        return None

    def warm_start(self, rng: np.random.Generator, n: int) -> list[tuple[Problem, str]] | None:
        return None


def check_split(split: str) -> str:
    """Return `split`, or raise ValueError naming the three there are."""
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return split
