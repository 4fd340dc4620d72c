"""task.name = "maths": your own file of a published mathematics set, read by the columns that its copies have.

AIME 2024 and 2025, AMC 2023, MATH-500, Minerva and OlympiadBench go round with a dozen names for the same two things.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.tasks import dataset
from flowrl_kernels.trainer.tasks.answers import read, read_gold
from flowrl_kernels.trainer.tasks.base import Problem
from flowrl_kernels.trainer.tasks.notation import final_answer, last_boxed, tidy
from flowrl_kernels.trainer.tasks.rows import rows

# columns in the order in which they are looked for, whatever their case; dots lead into objects
PROMPTS = ("problem", "question", "prompt")
ANSWERS = ("final_answer", "answer", "expected_answer", "reward_model.ground_truth")
SOLUTIONS = ("solution", "solutions")  # the answer is in the last \\boxed{}


@dataclass(frozen=True)
class Maths(dataset.FileTask):
    """Prompts and final answers; scored by math-verify within the tolerance that a row may have."""

    name: str = "maths"
    trusted: bool = False  # math-verify may hang: it runs in the reward workers

    @classmethod
    def load(cls, cfg: TaskConfig) -> Maths:
        """Read the files of `cfg`. Raises ValueError or FileNotFoundError naming the setting, and the file and line."""
        if not cfg.train and not cfg.valid and not cfg.test:
            raise ValueError('task.name = "maths" needs task.train, or task.test to evaluate; all are empty')
        if cfg.reward not in ("", "math"):
            raise ValueError(f"task.reward: wanted math, or nothing, for task.name = 'maths'; got {cfg.reward!r}")
        splits = dataset.read_splits(cfg, lambda source: read_set(source, cfg.system))
        return cls({split: dataset.one_behind_the_other(parts, cfg.suffix) for split, parts in splits})

    def verify(self, problem: Problem, response: str) -> float | None:
        return maths_reward(problem.prompt, response, problem.answer)


def maths_reward(prompt: Any, response: str, answer: Any) -> float | None:
    """`math_reward`; an answer {"answer": ..., "error": e} also takes every number within e of it."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    if not isinstance(answer, Mapping):
        return dataset.math_reward(prompt, response, answer)
    reward = dataset.math_reward(prompt, response, answer["answer"])
    gold, text = read_gold(answer["answer"]), final_answer(response)
    if reward == 0.0 and gold is not None and text is not None:
        got = read(tidy(text))
        if got is not None and got.kind == gold.kind == "number":
            return float(abs(got.value - gold.value) <= Fraction(answer["error"]))
    return reward


def read_set(source: str, system: str = "") -> list[Problem]:
    """The problems of one split. Raises ValueError naming the row and the columns that it has, and what was wanted."""
    problems: list[Problem] = []
    for where, row in rows(source):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: wanted an object with a problem and an answer, got {row!r:.80}")
        plain = dataset.plain(row)
        refuse_unaskable(plain, where)
        prompt = dataset.as_prompt(with_context(plain, where), system, where)
        problems.append(Problem(len(problems), prompt, answer_of(plain, where)))
    if not problems:
        raise ValueError(f"{source}: no rows")
    return problems


def column(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What stands in the first of these columns that the row has and that is not empty."""
    lower = {str(key).casefold(): value for key, value in row.items()}
    for name in names:
        found = dataset.walk(lower, name.split("."))
        if found is not None and found != "" and found != []:
            return found
    return None


def with_context(row: Mapping[str, Any], where: str) -> Any:
    """The prompt; a text behind the `context` that it goes on from (OlympiadBench)."""
    prompt = column(row, PROMPTS)
    if prompt is None:
        raise ValueError(f"{where}: no {' or '.join(PROMPTS)} in this row (it has {', '.join(map(repr, row))})")
    context = column(row, ("context",))
    return f"{context}\n\n{prompt}" if isinstance(context, str) and isinstance(prompt, str) else prompt


def answer_of(row: Mapping[str, Any], where: str) -> Any:
    """The final answer: its own column, else the last box of the solution; of a list, its elements in any order."""
    answer = column(row, ANSWERS)
    if answer is None:
        solution = column(row, SOLUTIONS)
        texts = [str(part) for part in (solution if isinstance(solution, list) else [solution]) if part is not None]
        boxed = [inside for text in texts if (inside := last_boxed(text)) is not None]
        if not boxed:
            columns = ", ".join(map(repr, row))
            raise ValueError(f"{where}: no {' or '.join(ANSWERS)}, and no \\boxed{{}} in a solution (it has {columns})")
        answer = boxed[-1]
    if isinstance(answer, list):
        if not all(isinstance(part, str | int | float) for part in answer):
            raise ValueError(f"{where}: wanted an answer of texts or numbers, got {answer!r:.80}")
        answer = answer[0] if len(answer) == 1 else ", ".join(map(str, answer))
    if not isinstance(answer, str | int | float):
        raise ValueError(f"{where}: wanted an answer that is text or a number, got {answer!r:.80}")
    answer = dataset.checked_answer(answer, "answer", where)
    error = column(row, ("error",))
    return answer if error is None else {"answer": answer, "error": tolerance(error, where)}


def tolerance(error: Any, where: str) -> str:
    """A row's tolerance as text that Fraction reads."""
    try:
        if Fraction(str(error)) >= 0:
            return str(error)
    except ValueError:
        pass
    raise ValueError(f"{where}: wanted an error (tolerance) of at least 0, got {error!r:.80}")


def refuse_unaskable(row: Mapping[str, Any], where: str) -> None:
    """Rows of OlympiadBench that a text model with a final answer cannot be asked."""
    lower = {str(key).casefold(): value for key, value in row.items()}
    if any(value is not None and value != [] for key, value in lower.items() if key.startswith("image")):
        raise ValueError(f"{where}: the row has images; take the text-only part (OE_TO_maths_en_COMP)")
    if str(lower.get("modality", "")).startswith("Multi"):
        raise ValueError(f"{where}: the row is multimodal; take the text-only part (OE_TO_maths_en_COMP)")
    if "proof" in str(lower.get("question_type", "")).lower():
        raise ValueError(f"{where}: the row wants a proof, which has no final answer; leave it out")
