"""Training from Python: settings, rewards and data as objects, made into the names and files that a run is made of.

What is handed over here stands in the run folder as it would had it come from a TOML file, so `flowrl eval`, `--resume`
and `flowrl plot` know such a run as they know any other.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl_kernels.trainer import config_file, reward
from flowrl_kernels.trainer.config import Config, TaskConfig
from flowrl_kernels.trainer.log import read_lines
from flowrl_kernels.trainer.tasks.base import SPLITS
from flowrl_kernels.trainer.tasks.dataset import plain

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Trained:
    """What a run leaves.

    folder: the run folder. figures: of the final evaluation. model: a Hugging Face folder, None where
    `checkpoint.export` is false.
    """

    folder: Path
    figures: dict[str, float]
    model: Path | None

    def metrics(self, kind: str = "train") -> list[dict[str, Any]]:
        """One dict a step, or of another kind of line: "eval", "warm", "note", "final"."""
        return read_lines(self.folder / "metrics.jsonl", kind)


def train(
    config: Config | Mapping[str, Any] | str | os.PathLike[str],
    *,
    rewards: str | reward.Reward | Sequence[str | reward.Reward] | None = None,
    weights: Sequence[float] | None = None,
    data: Rows | Mapping[str, Rows] | None = None,
) -> Trained:
    """Trains, and evaluates at the end; under torchrun every rank calls it with the same arguments.

    Args:
        config: a `Config`, tables as a TOML file holds them, {"run": {"dir": "runs/a"}}, or the path of such a file.
        rewards: functions (prompt, response, answer) -> float, or None for "cannot be scored", or names as in
            `task.reward`; one or several. A function in a module or a script is found there by the processes that score
            with a deadline; one that is in neither (a lambda, a notebook's) needs `task.reward_workers = 0`.
        weights: of each reward in the sum; by default 1 each.
        data: rows with a prompt and an answer (`task.prompt_key`, `task.answer_key`), the training split; or a mapping
            of "train", "valid" and "test" to rows. Any iterable of mappings: a list, a `datasets.Dataset`. They are
            kept as JSON lines in `run.cache`, by their hash.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as `loop.train`, naming what will not do.
    """
    if reward.in_worker:
        raise RuntimeError("train() ran while a reward was looked up in its file: put it behind "
                           'if __name__ == "__main__":')  # fmt: skip
    if isinstance(config, str | os.PathLike):
        settled = config_file.load(os.fspath(config))
    else:
        settled = config_file.make(config if isinstance(config, Config) else dict(config))
    settled = config_file.expand(settled)
    task = settled.task
    if rewards is not None:
        if task.reward:
            raise ValueError(f"rewards: task.reward is {task.reward!r} already; give one of them")
        several = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
        if not several:
            raise ValueError("rewards: wanted at least one; got none")
        names = tuple(name_of(one, i, task) for i, one in enumerate(several))
        task = dataclasses.replace(task, reward=names[0] if len(names) == 1 else names)
    if weights is not None:
        task = dataclasses.replace(task, reward_weights=tuple(map(float, weights)))
    if data is not None:
        splits = data if isinstance(data, Mapping) else {"train": data}
        if unknown := sorted(set(splits) - set(SPLITS)):
            raise ValueError(f"data: wanted splits among {', '.join(SPLITS)}; got {unknown[0]!r}")
        if given := [split for split in SPLITS if getattr(task, split)]:
            raise ValueError(f"data: task.{given[0]} is set already; give one of them")
        cache = Path(settled.run.cache)
        files: dict[str, Any] = {split: str(write(rows, cache, f"data[{split!r}]")) for split, rows in splits.items()}
        task = dataclasses.replace(task, name="file", **files)
    settled = dataclasses.replace(settled, task=task)
    from flowrl_kernels.trainer import loop  # here: a process that scores imports this file, and needs no torch

    figures = loop.train(settled)
    folder = Path(settled.run.dir)
    return Trained(folder, figures, folder / "final" if settled.checkpoint.export else None)


def name_of(function: str | Callable[..., Any], number: int, task: TaskConfig) -> str:
    """The name by which another process finds a reward, or, with `task.reward_workers` 0, one that this one knows.

    Raises:
        ValueError: there is none; names the reward by its number.
    """
    what = f"rewards[{number}]"
    if isinstance(function, str):
        return function
    if not callable(function):
        raise ValueError(f"{what}: wanted a function or a name; got {type(function).__name__}")
    module, way = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module == "__main__":
        module = getattr(sys.modules[module], "__file__", None)
        module = os.path.abspath(module) if module and module.endswith(".py") and os.path.isfile(module) else None
        if module:
            sys.modules.setdefault(module, sys.modules["__main__"])  # here it has run already
    if module and way and "<" not in way:
        try:
            home = sys.modules[module] if module in sys.modules else importlib.import_module(module)
            if functools.reduce(getattr, way.split("."), home) is function:
                return f"{module}:{way}"
        except (ImportError, AttributeError):
            pass
    label = way or type(function).__name__
    if task.reward_workers:
        raise ValueError(
            f"{what}: {label!r} cannot be found by another process: define it in a module or a script, or set "
            "task.reward_workers to 0 to score in this process, without a deadline"
        )
    name = f"{reward.GIVEN}{number}:{label}"
    reward.given[name] = function
    return name


def write(rows: Rows, cache: Path, what: str) -> Path:
    """Rows as JSON lines in `cache`, named by their hash. Raises ValueError, which begins with `what`."""
    lines = []
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{what}: row {i} must be a mapping, got {type(row).__name__}")
        try:
            lines.append(json.dumps(plain(row), ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{what}: row {i} cannot be written as JSON: {error}") from None
    if not lines:
        raise ValueError(f"{what}: no rows")
    text = "".join(lines).encode("utf-8", "surrogatepass")
    path = cache / f"data-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    if not path.is_file() or path.read_bytes() != text:
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.incomplete")
        partial.write_bytes(text)
        os.replace(partial, path)
    return path
