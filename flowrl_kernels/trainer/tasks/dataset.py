"""Your own prompts, from whatever `rows` reads, and the rewards for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from flowrl_kernels.trainer.config import TaskConfig, listed
from flowrl_kernels.trainer.tasks.answers import equal, read_gold
from flowrl_kernels.trainer.tasks.base import OpenTask, Problem, check_split
from flowrl_kernels.trainer.tasks.countdown import read_wanted
from flowrl_kernels.trainer.tasks.notation import after_marks, last_boxed
from flowrl_kernels.trainer.tasks.rows import rows


@dataclass(frozen=True)
class FileTask(OpenTask):
    """Prompts and answers from files, one per split. Without `task.reward` a response is compared exactly.

    Right answers cannot be listed, so there is no warm start and no exact figure; equal final answers (what
    stands in the last \\boxed{}, else the whole text) are the same solution.
    """

    rows: Mapping[str, Sequence[Problem]]
    name: str = "file"
    solved: float = 0.5  # a reward above this counts as solved
    sources: tuple[int, ...] = ()  # how many of the training rows are from each file, one behind the other
    trusted: bool = True  # exact comparison; other rewards run in their own processes

    @classmethod
    def load(cls, cfg: TaskConfig) -> FileTask:
        """Read the files of `cfg`. Raises ValueError or FileNotFoundError naming the setting, and the file and line."""
        if not cfg.train and not cfg.valid and not cfg.test:
            raise ValueError('task.name = "file" needs task.train, or task.test to evaluate; all are empty')
        read_answer = None
        if "code" in listed(cfg.reward):
            from flowrl_kernels.trainer.tasks.code import row_reader

            read_answer = row_reader(cfg)
        keys = (cfg.prompt_key, cfg.answer_key, cfg.system, read_answer)
        found: dict[str, list[Problem]] = {}
        sources: list[int] = []
        for split, parts in read_splits(cfg, lambda source: read_problems(source, *keys)):
            found[split] = one_behind_the_other(parts, cfg.suffix)
            sources += [len(part) for part in parts] if split == "train" else []
            for reward in listed(cfg.reward) if read_answer is None else ():
                _comparable(found[split], split, reward)
        solved = 1 - 1e-9 if listed(cfg.reward)[0] == "code" else 0.5
        return cls(found, solved=solved, sources=tuple(sources))

    def problems(self, split: str) -> Sequence[Problem]:
        return self.rows[check_split(split)]

    def verify(self, problem: Problem, response: str) -> float | None:
        return exact_reward(problem.prompt, response, problem.answer)

    def correct(self, reward: float) -> bool:
        return reward > self.solved


def read_splits(cfg: TaskConfig, read: Callable[[str], list[Problem]]) -> Iterator[tuple[str, list[list[Problem]]]]:
    """Each split and the problems of its files. Raises ValueError or FileNotFoundError, which name the setting."""
    for split, source in (("train", cfg.train), ("valid", cfg.valid), ("test", cfg.test)):
        try:
            parts = [read(one) for one in listed(source) if one]
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"task.{split}: {error}") from None
        yield split, parts


def one_behind_the_other(parts: list[list[Problem]], suffix: str) -> list[Problem]:
    """The problems of several files, numbered anew, `suffix` behind every prompt."""
    problems = [replace(p, id=i) for i, p in enumerate(itertools.chain.from_iterable(parts))]
    return [replace(p, prompt=with_suffix(p.prompt, suffix)) for p in problems] if suffix else problems


def _comparable(problems: Sequence[Problem], split: str, reward: str) -> None:
    """Refuse answers that a built-in reward could never compare, before the first step."""
    if reward in ("", "exact", "math"):
        wanted, fits = "text or a number", lambda answer: isinstance(answer, str | int | float)
    elif reward == "countdown":
        wanted, fits = '{"numbers": [...], "target": n}, or its JSON text', lambda a: read_wanted(a) is not None
    else:
        return
    for problem in problems:
        if not fits(problem.answer):
            raise ValueError(
                f"task.answer_key: the answer of problem {problem.id} of task.{split} must be {wanted} for "
                f"task.reward = {reward or 'exact'!r}, got {problem.answer!r:.80}"
            )


def read_problems(
    source: str,
    prompt_key: str,
    answer_key: str,
    system: str = "",
    read_answer: Callable[[Mapping[str, Any], str], Any] | None = None,
) -> list[Problem]:
    """Read one split from anything that `rows.rows` reads.

    prompt_key, answer_key: a column, or a way into one by keys and list positions: `reward_model.ground_truth`,
    `prompt.0.content`. read_answer: makes the answer of a whole row, (row, where) -> answer, instead of its
    `answer_key`. A prompt is text or a list of chat messages; with `system`, every prompt becomes chat messages
    behind that system message. Raises FileNotFoundError for a path that is not there, ValueError for a malformed row,
    named by file and line (text) or row (tables), or a reader that is not installed.
    """
    problems: list[Problem] = []
    for where, row in rows(source):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: wanted an object with {prompt_key!r}, {answer_key!r}, got {row!r:.80}")
        prompt = as_prompt(_value(row, prompt_key, where), system, where)
        if read_answer is None:
            answer = checked_answer(_value(row, answer_key, where), answer_key, where)
        else:
            answer = read_answer(plain(row), where)
        problems.append(Problem(len(problems), prompt, answer))
    if not problems:
        raise ValueError(f"{source}: no rows")
    return problems


def _value(row: Mapping[str, Any], key: str, where: str) -> Any:
    """The cell called `key`, or at the end of its dotted way; as plain Python."""
    found: Any = row.get(key)
    if "." in key and (way := walk(row, key.split("."))) is not None:
        if found is not None:
            raise ValueError(f"{where}: {key!r} is both a column and a way into one; rename the column")
        found = way
    if found is None:
        columns = ", ".join(map(repr, row))
        raise ValueError(f"{where}: no {key!r} in this row (it has {columns or 'nothing'})")
    return plain(found)


def walk(value: Any, way: list[str]) -> Any:
    for key in way:
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list | tuple | np.ndarray) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def plain(value: Any) -> Any:
    """Numpy arrays and numbers as lists and numbers: they come out of tables made by pandas."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def checked_answer(answer: Any, key: str, where: str) -> Any:
    if isinstance(answer, float) and not math.isfinite(answer):
        raise ValueError(f"{where}: {key!r} is {answer}: no answer (an empty cell of a table?)")
    if isinstance(answer, str | list | dict) and not (answer.strip() if isinstance(answer, str) else answer):
        raise ValueError(f"{where}: {key!r} is empty")
    return answer


ROLES = ("system", "developer", "user", "assistant", "tool")


def as_prompt(prompt: Any, system: str, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty")
        if not system:
            return prompt
        return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    messages = prompt if isinstance(prompt, list) else []
    chat = [_message(message, where) for message in messages if isinstance(message, Mapping)]
    if not messages or len(chat) < len(messages):
        raise ValueError(f'{where}: the prompt must be text or a list of {{"role", "content"}}, got {prompt!r:.60}')
    if chat[-1]["role"] == "assistant":
        raise ValueError(f"{where}: the prompt ends with the assistant's message; wanted what comes before the answer")
    if system and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": system})
    return chat


def with_suffix(prompt: str | list[dict[str, str]], suffix: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        return prompt + suffix
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + suffix}]


def _message(message: Mapping[str, Any], where: str) -> dict[str, str]:
    """A chat message; its content may come in parts, all of them text. Other fields must be empty."""
    role, content = message.get("role"), message.get("content")
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)
    ):
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        got = f"got {dict(message)!r:.60}"
        raise ValueError(f'{where}: the prompt must be text or a list of {{"role", "content"}}, {got}')
    if role not in ROLES:
        raise ValueError(f"{where}: a message's role must be one of {', '.join(ROLES)}, got {role!r}")
    more = [key for key, value in message.items() if key not in ("role", "content") and value not in (None, "", [])]
    if more:
        raise ValueError(f"{where}: a message has {', '.join(map(repr, more))} beside role and content; remove it")
    return {"role": role, "content": content}


def exact_reward(prompt: Any, response: str, answer: Any) -> float:
    """1.0 if the last \\boxed{} of the response, or without one the whole response, is the answer's text.

    Where the answer ends in "#### 18" as GSM8K's do, 18 is wanted, and a response may end that way too. 42.0 is "42":
    tables make floats of whole numbers.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    marked = after_marks(str(answer))
    wanted = str(answer) if marked is None else marked
    boxed = last_boxed(response)
    if boxed is None and marked is not None:
        boxed = after_marks(response)
    return float((response if boxed is None else boxed).strip() == wanted.strip())


def math_reward(prompt: Any, response: str, answer: Any) -> float | None:
    """1.0 if the response's final answer equals `answer` as mathematics (tasks/answers.py), else 0.0.

    answer: text or a number; of a text with a \\boxed{} or a "####" what stands there. None where `answer` itself
    cannot be read: no response could then be scored. Must run where a hang can be killed (reward.Scorer does):
    math-verify's own time limits need the main thread and are turned off. Raises TypeError for another answer.
    """
    if not isinstance(answer, str | int | float):
        raise TypeError(f"the answer must be text or a number, got {type(answer).__name__}")
    gold = read_gold(answer)
    return None if gold is None else float(equal(gold, response))
