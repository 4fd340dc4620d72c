"""Your own prompts (JSONL, parquet, a `datasets` folder or name) and the rewards for them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowrl_kernels.trainer.tasks.base import Problem, check_split

if TYPE_CHECKING:
    from flowrl_kernels.trainer.config import TaskConfig

_BOXED = re.compile(r"\\boxed\s*\{")


@dataclass(frozen=True)
class FileTask:
    """Prompts and answers from files, one per split. Without `task.reward` a response is compared exactly.

    Right answers cannot be listed, so there is no warm start and no exact figure; equal final answers (what
    stands in the last \\boxed{}, else the whole text) are the same solution.
    """

    rows: Mapping[str, Sequence[Problem]]
    name: str = "file"
    alphabet: None = None
    max_prompt_tokens: None = None
    max_response_tokens: None = None
    solved: float = 0.5  # a reward above this counts as solved
    trusted: bool = True  # exact comparison; other rewards run in their own processes

    @classmethod
    def load(cls, cfg: TaskConfig) -> FileTask:
        """Read the files of `cfg`. Raises ValueError naming the setting, or the file and line."""
        if not cfg.train and not cfg.valid and not cfg.test:
            raise ValueError('task.name = "file" needs task.train, or task.test to evaluate; all are empty')
        read_answer = None
        if cfg.reward == "code":
            from flowrl_kernels.trainer.tasks.code import row_reader

            read_answer = row_reader(cfg)
        rows = {
            split: read_problems(source, cfg.prompt_key, cfg.answer_key, cfg.system, read_answer) if source else []
            for split, source in (("train", cfg.train), ("valid", cfg.valid), ("test", cfg.test))
        }
        return cls(rows, solved=1 - 1e-9 if cfg.reward == "code" else 0.5)

    def problems(self, split: str) -> Sequence[Problem]:
        return self.rows[check_split(split)]

    def verify(self, problem: Problem, response: str) -> float:
        return exact_reward(problem.prompt, response, problem.answer)

    def correct(self, reward: float) -> bool:
        return reward > self.solved

    def canonical(self, problem: Problem, response: str) -> str | None:
        return None

    def solutions(self, problem: Problem) -> None:
        return None

    def correct_texts(self, problem: Problem) -> None:
        return None

    def responses(self, problem: Problem) -> None:
        return None

    def warm_start(self, rng: np.random.Generator, n: int) -> None:
        return None


def read_problems(
    source: str,
    prompt_key: str,
    answer_key: str,
    system: str = "",
    read_answer: Callable[[Mapping[str, Any], str], Any] | None = None,
) -> list[Problem]:
    """Read one split: a .jsonl or .parquet file, a folder saved by `datasets`, or a `datasets` name.

    A prompt is text or a list of chat messages; with `system`, every prompt becomes chat messages behind that
    system message. read_answer: makes the answer of a whole row, (row, where) -> answer, instead of its
    `answer_key`. Raises FileNotFoundError for a path that is not there, ValueError for a malformed row, named
    by file and line (JSONL) or row, RuntimeError where a reader is not installed.
    """
    problems: list[Problem] = []
    for where, row in _rows(source):
        if not isinstance(row, Mapping):
            raise ValueError(f"{where}: wanted an object with {prompt_key!r}, {answer_key!r}, got {row!r:.80}")
        for key in (prompt_key,) if read_answer else (prompt_key, answer_key):
            if row.get(key) is None:
                columns = ", ".join(map(repr, row))
                raise ValueError(f"{where}: no {key!r} in this row (it has {columns or 'nothing'})")
        answer = read_answer(row, where) if read_answer else row[answer_key]
        problems.append(Problem(len(problems), _prompt(row[prompt_key], system, where), answer))
    if not problems:
        raise ValueError(f"{source}: no rows")
    return problems


def _prompt(prompt: Any, system: str, where: str) -> str | list[dict[str, str]]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty")
        if not system:
            return prompt
        return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
    messages = list(prompt) if isinstance(prompt, Iterable) and not isinstance(prompt, Mapping) else []
    if not messages or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise ValueError(f'{where}: the prompt must be text or a list of {{"role", "content"}}, got {prompt!r:.60}')
    chat = [{"role": m["role"], "content": m["content"]} for m in messages]
    if system and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": system})
    return chat


def _rows(source: str) -> Iterator[tuple[str, Any]]:
    path = Path(source).expanduser()
    if path.is_dir():
        for index, row in enumerate(_datasets(source).load_from_disk(str(path))):
            yield f"{source}: row {index + 1}", row
    elif path.suffix in (".jsonl", ".json"):
        with path.open(encoding="utf-8") as file:
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    yield f"{source}:{line}", json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{source}:{line}: not JSON ({error}): {text.strip()[:80]!r}") from None
    elif path.suffix == ".parquet":
        if not path.is_file():
            raise FileNotFoundError(f"{source}: no such file")
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise RuntimeError(f"{source}: reading parquet needs pyarrow (pip install pyarrow)") from error
        for index, row in enumerate(parquet.read_table(path).to_pylist()):
            yield f"{source}: row {index + 1}", row
    elif path.suffix or source.startswith((".", "/", "~")):
        wanted = "a .jsonl or .parquet file, a folder saved by `datasets`, or a name like org/data:split"
        if path.exists():
            raise ValueError(f"{source}: wanted {wanted}")
        raise FileNotFoundError(f"{source}: no such file; wanted {wanted}")
    else:
        name, _, split = source.partition(":")
        for index, row in enumerate(_datasets(source).load_dataset(name, split=split or "train")):
            yield f"{source}: row {index + 1}", row


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            f"{source}: is no .jsonl or .parquet file, and `datasets` is not installed (pip install datasets)"
        ) from error
    return datasets


def last_boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} with matching braces; None where there is none."""
    found = None
    for match in _BOXED.finditer(text):
        depth = 1
        for at in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                found = text[match.end() : at]
                break
    return found


def exact_reward(prompt: Any, response: str, answer: Any) -> float:
    """1.0 if the last \\boxed{} of the response, or without one the whole response, is the answer's text."""
    boxed = last_boxed(response)
    return float((response if boxed is None else boxed).strip() == str(answer).strip())


def math_reward(prompt: Any, response: str, answer: Any) -> float | None:
    """1.0 if math-verify finds the response's final answer equal to `answer`, else 0.0.

    None where math-verify cannot read `answer` itself: no response could then be scored. Must run where a
    hang can be killed (reward.Scorer does): the library's own time limits need the main thread and are turned
    off.
    """
    from math_verify import parse, verify

    text = str(answer)
    # bare LaTeX is only read whole between dollars: plain "3\\sqrt{2}" would parse as 3
    tries = [text] if "$" in text or "\\boxed" in text else [f"${text}$", text]
    gold = next((found for t in tries if (found := parse(t, parsing_timeout=None))), None)
    if not gold:
        return None
    # raise_on_error: a crash in the comparison is a crash, not a wrong answer
    read = parse(response, parsing_timeout=None)
    return float(verify(gold, read, timeout_seconds=None, raise_on_error=True))
