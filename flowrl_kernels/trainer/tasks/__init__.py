"""Tasks by name. `build_task(config.task)` is all the loop calls; docs/tasks.md shows how to add one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from flowrl_kernels.trainer.tasks.base import Problem, Task
from flowrl_kernels.trainer.tasks.tokenizer import char_tokenizer

if TYPE_CHECKING:
    from flowrl_kernels.trainer.config import TaskConfig

__all__ = ["Problem", "Task", "build_task", "char_tokenizer"]


def build_task(cfg: TaskConfig) -> Task:
    """The task of a run; the same on every rank.

    Raises ValueError for settings that make no task or a malformed row (named by file and line),
    FileNotFoundError for a missing file, RuntimeError where a reader is not installed.
    """
    if cfg.name == "sums":
        from flowrl_kernels.trainer.tasks.sums import Sums

        return Sums()
    if cfg.name == "countdown":
        from flowrl_kernels.trainer.tasks.countdown import Countdown

        return Countdown(
            numbers=cfg.numbers,
            largest=cfg.largest,
            max_target=cfg.max_target,
            min_solutions=cfg.min_solutions,
            held_out=cfg.held_out,
            answer=cfg.answer,
            seed=cfg.seed,
        )
    if cfg.name == "file":
        from flowrl_kernels.trainer.tasks.dataset import FileTask

        return FileTask.load(cfg)
    wanted = "task.name must be sums, countdown, file or module:function (a function of the task's settings)"
    module, _, function = cfg.name.partition(":")
    if not module or not function:
        raise ValueError(f"{wanted}, got {cfg.name!r}")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{wanted}, got {cfg.name!r}: {error}") from error
    return make(cfg)
