"""Tasks by name. `build_task(config.task)` is all the loop calls; docs/tasks.md shows how to add one."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.tasks.base import OpenTask, Problem, Task
from flowrl_kernels.trainer.tasks.tokenizer import char_tokenizer, check_characters

__all__ = ["OpenTask", "Problem", "Task", "build_task", "char_tokenizer", "check_characters", "find_own"]


def find_own(name: str, wanted: str) -> Any:
    """What "module:function" names, the current folder included, as `python -m` has it and a console script has not.

    "file.py:function" names one in a file, which is run once as a module: what must not run with it stands behind
    `if __name__ == "__main__"`. Raises ValueError, which begins with `wanted`, for whatever the import raises and for
    what cannot be called.
    """
    module, _, way = name.partition(":")
    if not module or not way:
        raise ValueError(f"{wanted}, got {name!r}")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: a file here hides no installed package
    try:
        found: Any = _of_file(module) if module.endswith(".py") else importlib.import_module(module)
        for part in way.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:  # somebody's module: it may raise anything
        raise ValueError(f"{wanted}, got {name!r}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ValueError(f"{wanted}, got {name!r}, which is a {type(found).__name__}")
    return found


def _of_file(file: str) -> ModuleType:
    """The module that a file makes, under its whole path among `sys.modules`."""
    path = os.path.abspath(os.path.expanduser(file))
    if path not in sys.modules:
        spec = importlib.util.spec_from_file_location(path, path)
        if spec is None or spec.loader is None or not os.path.isfile(path):
            raise FileNotFoundError(f"no such file: {path}")
        made = importlib.util.module_from_spec(spec)
        if os.path.dirname(path) not in sys.path:
            sys.path.append(os.path.dirname(path))  # what it imports beside it
        sys.modules[path] = made
        try:
            spec.loader.exec_module(made)
        except BaseException:
            del sys.modules[path]
            raise
    return sys.modules[path]


def build_task(cfg: TaskConfig) -> Task:
    """The task of a run; the same on every rank.

    Raises ValueError for settings that make no task, a malformed row (named by file and line) or a reader that is not
    installed, FileNotFoundError for a missing file.
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
    if cfg.name == "maths":
        from flowrl_kernels.trainer.tasks.maths import Maths

        return Maths.load(cfg)
    if cfg.name.startswith("gym:"):
        from flowrl_kernels.trainer.tasks.gym import Gym

        return Gym.load(cfg)
    names = "sums, countdown, file, maths, gym:NAME"
    wanted = f"task.name must be {names} or module:function (a function of the task's settings)"
    return _whole(find_own(cfg.name, wanted)(cfg), cfg.name)


def _whole(task: Any, name: str) -> Task:
    """A task of somebody's own; refused by what it lacks."""
    if isinstance(task, type):
        raise ValueError(f"task.name: {name!r} must return a task, got the class {task.__name__} itself")
    lacking = [part for part in dir(Task) if not part.startswith("_") and not hasattr(task, part)]
    if lacking:
        raise ValueError(
            f"task.name: {name!r} must return a task, got {type(task).__name__}, which lacks {', '.join(lacking)}; "
            "OpenTask has all but name, trusted, problems, verify and correct"
        )
    return task
