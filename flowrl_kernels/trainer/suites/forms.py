"""What makes two responses the same solution: a label on each, None where it is none that counts.

- canonical: the task's own form of a right answer.
- syntax: a right program's syntax tree without names, hints and comments (`suites.syntax`).
- behaviour: what a program, right or wrong, prints or returns on its row's tests, in the sandbox. Right programs behave
  alike there; what differs is how the others fail.
- expression: the final answer as it is written, numbers by value, of every response that has one.
- paths: clusters of right responses by an embedding model (`suites.paths`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.suites.figures import Outcome
from flowrl_kernels.trainer.suites.paths import Embed, clusters
from flowrl_kernels.trainer.suites.syntax import normal_form
from flowrl_kernels.trainer.tasks import Problem, Task
from flowrl_kernels.trainer.tasks.answers import read
from flowrl_kernels.trainer.tasks.code import behaviour, program
from flowrl_kernels.trainer.tasks.code_rows import CodeTests
from flowrl_kernels.trainer.tasks.notation import LONGEST, final_answer, plain, tidy
from flowrl_kernels.trainer.tasks.quantities import Answer

Labels = list[str | None]
RIGHT = ("canonical", "syntax", "paths")  # of right responses alone


class Tools(NamedTuple):
    """What labels are made with."""

    task: Task
    embed: Embed | None = None
    threshold: float = 1.0


def by_default(cfg: TaskConfig) -> tuple[str, ...]:
    """The forms that cost next to nothing and may say something of a task."""
    if cfg.reward == "code":
        return ("canonical", "syntax")
    return ("canonical", "expression") if cfg.name == "maths" or cfg.reward == "math" else ("canonical",)


def check_form(form: str, cfg: TaskConfig) -> None:
    """Refuses a form that a task cannot have. Raises ValueError naming it."""
    if form in ("syntax", "behaviour") and cfg.reward != "code":
        raise ValueError(f"diversity: {form!r} is for task.reward = 'code'; got {cfg.reward!r}")


def labels(form: str, tools: Tools, problem: Problem, outcome: Outcome) -> Labels:
    """One label for each scored response of a problem."""
    rows = [(text, right) for text, right in zip(outcome.responses, outcome.correct) if right is not None]
    counted = [text for text, right in rows if right or form not in RIGHT]
    found = iter(_LABELS[form](tools, problem, counted))
    return [next(found) if right or form not in RIGHT else None for _, right in rows]


def _canonical(tools: Tools, problem: Problem, texts: Sequence[str]) -> Labels:
    return [tools.task.canonical(problem, text) for text in texts]


def _syntax(tools: Tools, problem: Problem, texts: Sequence[str]) -> Labels:
    tests = _tests(problem)
    forms = [normal_form(program(text, tests)) for text in texts]
    return [form and hashlib.sha256(form.encode("utf-8", "surrogatepass")).hexdigest()[:16] for form in forms]


def _behaviour(tools: Tools, problem: Problem, texts: Sequence[str]) -> Labels:
    tests = _tests(problem)
    known: dict[str, str] = {}
    for text in texts:
        source = program(text, tests)
        if source not in known:
            known[source] = behaviour(source, tests)
    return [known[program(text, tests)] for text in texts]


def _tests(problem: Problem) -> CodeTests:
    if not isinstance(problem.answer, CodeTests):
        raise ValueError(f"diversity: problem {problem.id} has no tests")
    return problem.answer


def _expression(tools: Tools, problem: Problem, texts: Sequence[str]) -> Labels:
    return [final_form(text) for text in texts]


def final_form(response: str) -> str | None:
    """A response's final answer in one way of writing: numbers by value and unit, lists in any order."""
    text = final_answer(response)
    if text is None or len(text) > LONGEST:
        return None
    answer = read(tidy(text))
    return None if answer is None else _written(answer)


def _written(answer: Answer) -> str:
    if answer.kind == "number":
        return f"{answer.value} {answer.unit}".strip()
    if answer.kind in ("choice", "word"):
        return str(answer.value)
    if answer.kind == "list":
        return "{" + ", ".join(sorted(map(_written, answer.value))) + "}"
    if answer.kind == "tuple":
        return answer.unit[0] + ", ".join(map(_written, answer.value)) + answer.unit[1]
    if answer.kind == "matrix":
        return answer.unit + "; ".join(", ".join(map(_written, row)) for row in answer.value)
    return re.sub(r"\s+", "", plain(answer.text))


def _paths(tools: Tools, problem: Problem, texts: Sequence[str]) -> Labels:
    if tools.embed is None or not texts:
        return [None for _ in texts]
    return [str(cluster) for cluster in clusters(tools.embed(texts), tools.threshold)]


_LABELS: dict[str, Callable[[Tools, Problem, Sequence[str]], Labels]] = {
    "canonical": _canonical, "syntax": _syntax, "behaviour": _behaviour, "expression": _expression, "paths": _paths,
}  # fmt: skip
