"""Scoring that cannot hurt the run: a reward that raises, hangs, dies or returns nonsense costs one sample.

A task whose verifier is quick and safe is scored in the training process. Every other reward runs in worker
processes, one response at a time, each killed with its children when a response takes longer than the
deadline. Such a response gets None: it is left out of its group's statistics, never counted as 0.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import numbers
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from decimal import Decimal
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from flowrl_kernels.trainer.config import TaskConfig, listed
from flowrl_kernels.trainer.tasks import find_own
from flowrl_kernels.trainer.tasks.base import Problem, Task

Reward = Callable[[Any, str, Any], float | None]
"""(prompt, response, answer) -> reward, None for "cannot be scored"."""

START_SECONDS = 300.0  # for a worker to import what its reward needs
REASONS = 20  # different ones that are counted apart
MAX_STARTS = 3  # of a worker that never gets ready
_BUILT_IN = {
    "math": "flowrl_kernels.trainer.tasks.dataset:math_reward",
    "exact": "flowrl_kernels.trainer.tasks.dataset:exact_reward",
    "countdown": "flowrl_kernels.trainer.tasks.countdown:countdown_reward",
    "code": "flowrl_kernels.trainer.tasks.code:code_reward",
}
GIVEN = "python:"  # names of functions that this process alone has, kept in `given`
given: dict[str, Reward] = {}
in_worker = False  # whether this process is one that scores


def find_reward(name: str) -> Reward:
    """The reward called "math", "exact", "countdown", "code", or named as module:function or file.py:function.

    Raises ValueError naming what could not be imported or found.
    """
    wanted = "task.reward must be math, exact, countdown, code or module:function"
    if name.startswith(GIVEN):
        if name not in given:
            raise ValueError(f"{wanted}, got {name!r}: a function that was handed to train() and has no name to find")
        return given[name]
    found = find_own(_BUILT_IN.get(name, name), wanted)
    if name == "math":
        try:
            importlib.import_module("math_verify")
        except ImportError as error:
            raise ValueError(f"{wanted}, got {name!r}: {error} (pip install math-verify)") from error
    if name == "code":
        from flowrl_kernels.trainer.tasks.code import require_sandbox

        try:
            require_sandbox()
        except RuntimeError as error:
            raise ValueError(f"task.reward = {name!r} needs a sandbox, and none can run here: {error}") from error
    if inspect.isclass(found) or inspect.iscoroutinefunction(found):
        what = "a class" if inspect.isclass(found) else "asynchronous"
        raise ValueError(f"{wanted}, got {name!r}, which is {what}; name a plain function (prompt, response, answer)")
    try:
        inspect.signature(found).bind("prompt", "response", "answer")
    except TypeError as error:
        raise ValueError(f"{wanted}, got {name!r}: it must take (prompt, response, answer): {error}") from None
    except ValueError:
        pass  # written in C: no signature to look at
    return found


def _why(error: BaseException) -> str:
    """One line of at most 300 characters, whatever the error's own text does."""
    try:
        text = " ".join(str(error).split())
    except Exception:
        text = "(its text cannot be made)"
    return f"{type(error).__name__}: {text}"[:300]


def _one(value: Any) -> bool:
    """A numpy number, or an array or tensor of one element."""
    count = value.numel if hasattr(value, "numel") else getattr(value, "size", None)
    return hasattr(value, "item") and (count() if callable(count) else count) == 1


def _checked(value: Any) -> float | None:
    if value is None:
        return None
    if _one(value):
        value = value.item()  # a numpy number, or an array or tensor that holds one
    if not isinstance(value, numbers.Real | Decimal):
        raise TypeError(f"the reward must be a number or None, got {type(value).__name__} {value!r:.80}")
    if not math.isfinite(value):
        raise ValueError(f"the reward must be finite, got {value}")
    return float(value)


def labels(names: Sequence[str]) -> list[str]:
    """What rewards are called in the log: "math", a function's own name; its whole one where two share that."""
    short = [name.rpartition(":")[2] or "task" for name in names]
    long = [name if short.count(label) > 1 else label for name, label in zip(names, short)]
    return [f"{label}#{i}" if long.count(label) > 1 else label for i, label in enumerate(long, 1)]


class Scorer:
    """Scores responses by a task's verifier or by `cfg.reward`; workers start at the first call that needs
    them.

    counts: {"raised", "timed_out", "unscorable"} since the last `take_counts`; unscorable counts every None,
    the other two say why. A program (reward "code") that fails counts in those two as well and is worth 0.
    last_error: the latest reason of the latest `score`, None where all were scored; reasons:
    how often each came in it, at most 20 different ones. Of several rewards, each has a scorer of its own: the sum is
    by `cfg.reward_weights`, None where one of them is, and `parts` has the rewards of the latest `score` by name.
    Raises ValueError for a reward that cannot be imported, RuntimeError where workers do not start.
    """

    def __init__(self, cfg: TaskConfig, task: Task):
        self._task = task
        self.counts = {"raised": 0, "timed_out": 0, "unscorable": 0}
        self.last_error: str | None = None
        self.reasons: Counter[str] = Counter()
        self.parts: dict[str, list[float | None]] = {}
        self._workers: list[_Worker | None] = []
        self._each: dict[str, tuple[float, Scorer]] = {}
        names = listed(cfg.reward)
        if cfg.reward_weights and len(cfg.reward_weights) != len(names):
            raise ValueError(f"task.reward_weights must be {len(names)}, one for each of task.reward, "
                             f"got {len(cfg.reward_weights)}")  # fmt: skip
        if not all(map(math.isfinite, cfg.reward_weights)):
            raise ValueError(f"task.reward_weights must be finite, got {list(cfg.reward_weights)}")
        if len(names) > 1 or cfg.reward_weights:
            single = [dataclasses.replace(cfg, reward=name, reward_weights=()) for name in names]
            self._each = {
                label: (weight, Scorer(one, task))
                for label, weight, one in zip(labels(names), cfg.reward_weights or (1.0,) * len(names), single)
            }
            return
        (name,) = names
        self._timeout = cfg.reward_timeout
        if self._timeout <= 0:
            raise ValueError(f"task.reward_timeout must be above 0 seconds, got {self._timeout}")
        if cfg.reward_workers < 0:
            raise ValueError(f"task.reward_workers must be at least 0, got {cfg.reward_workers}")
        self._inline = task.trusted if not name else name in ("exact", "countdown")
        self._reward = find_reward(name) if name else None
        if cfg.reward_workers == 0 and not self._inline:
            if not name or name in _BUILT_IN:
                raise ValueError(f"task.reward_workers must be at least 1 for {name or task.name!r}, which may hang")
            self._inline = True
        if name.startswith(GIVEN) and not self._inline:
            raise ValueError(f"task.reward_workers must be 0 for {name!r}: another process cannot find it")
        # rewards travel by name, tasks by value
        self._spec: str | Task = name or task
        self._workers = [None] * cfg.reward_workers
        if name == "code" and cfg.name in ("sums", "countdown"):
            raise ValueError(f"task.reward = 'code' needs rows with tests (task.name = 'file'), got {cfg.name!r}")
        if name == "code":  # its own deadline comes first: a program that runs on is wrong, not unscorable
            self._timeout += importlib.import_module("flowrl_kernels.trainer.tasks.code").GRACE_SECONDS
        self._failed_starts = 0

    @property
    def first(self) -> Scorer:
        """The scorer of the first of several rewards, by which an evaluation goes; else this one."""
        return next(iter(self._each.values()))[1] if self._each else self

    def score(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float | None]:
        """The reward of each response; takes at most about ceil(n / workers) times the deadline."""
        if len(problems) != len(responses):
            raise ValueError(f"need one problem per response, got {len(problems)} for {len(responses)}")
        self.last_error, self.reasons = None, Counter()
        if self._each:
            return self._score_each(problems, responses)
        if self._inline:
            result = self._score_here(problems, responses)
        else:
            result = self._score_apart(problems, responses)
        none = result.count(None)
        self.counts["unscorable"] += none
        if plain := none - self.reasons.total():
            self._note("the reward gave None", plain)
        return result

    def take_counts(self) -> dict[str, int]:
        """The counts so far, set back to zero."""
        counts, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return counts

    def close(self) -> None:
        """Kill the workers; a later `score` starts new ones."""
        for _, scorer in self._each.values():
            scorer.close()
        for worker in self._workers:
            if worker is not None:
                worker.kill()
        self._workers = [None] * len(self._workers)

    def _score_each(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float | None]:
        self.parts = {}
        for label, (_, scorer) in self._each.items():
            self.parts[label] = scorer.score(problems, responses)
            counts = scorer.take_counts()
            self.counts = {why: self.counts[why] + counts[why] * (why != "unscorable") for why in counts}
            for reason, count in scorer.reasons.items():
                self._note(f"{label}: {reason}", count)
        weights = [weight for weight, _ in self._each.values()]
        result = [
            None if None in row else math.fsum(w * r for w, r in zip(weights, row)) for row in zip(*self.parts.values())
        ]
        self.counts["unscorable"] += result.count(None)
        return result

    def _score_here(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float | None]:
        result: list[float | None] = []
        for problem, response in zip(problems, responses):
            try:
                if self._reward is None:
                    value = self._task.verify(problem, response)
                else:
                    value = self._reward(problem.prompt, response, problem.answer)
                result.append(_checked(value))
            except (Exception, SystemExit) as error:  # a reward is user code: whatever it raises costs one sample
                self._lose("raised", _why(error))
                result.append(None)
        return result

    def _lose(self, why: str, error: str) -> None:
        self.counts[why] += 1
        self._note(error)

    def _note(self, reason: str, count: int = 1) -> None:
        self.last_error = reason
        self.reasons[reason if reason in self.reasons or len(self.reasons) < REASONS else "other reasons"] += count

    def _score_apart(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[float | None]:
        result: list[float | None] = [None] * len(problems)
        waiting = list(range(len(problems)))[::-1]
        while waiting or any(w is not None and w.job is not None for w in self._workers):
            for slot, worker in enumerate(self._workers):
                if worker is None and waiting:
                    worker = self._workers[slot] = _Worker(self._spec)
                if worker is not None and worker.ready and worker.job is None and waiting:
                    job = waiting.pop()
                    if error := worker.send(job, (problems[job], responses[job]), self._timeout):
                        self._lose("raised", error)
            alive = [w for w in self._workers if w is not None and (w.job is not None or not w.ready)]
            if not alive:  # every job handed out just now could not be sent
                continue
            now = time.monotonic()
            ready = wait([w.pipe for w in alive], timeout=max(0.0, min(w.deadline for w in alive) - now))
            for slot, worker in enumerate(self._workers):
                if worker is None or (worker.job is None and worker.ready):
                    continue
                if worker.pipe in ready:
                    self._receive(slot, worker, result)
                elif time.monotonic() >= worker.deadline:
                    self._replace(slot, worker, "timed_out", f"no reward within {self._timeout:g} s, killed")
        return result

    def _receive(self, slot: int, worker: _Worker, result: list[float | None]) -> None:
        try:
            kind, value = worker.pipe.recv()
        except (EOFError, OSError):
            code = worker.process.wait()
            self._replace(slot, worker, "raised", f"the worker process ended with code {code}")
            return
        if kind == "ready":
            worker.ready, self._failed_starts = True, 0
        elif kind == "broken":
            self.close()
            raise RuntimeError(f"a reward worker could not start: {value}")
        else:
            job, worker.job = worker.job, None
            assert job is not None
            if kind == "raised":
                self._lose("raised", value)
            elif kind == "failed":
                result[job], why, self.last_error = value
                self.counts[why] += 1
            else:
                result[job] = value

    def _replace(self, slot: int, worker: _Worker, why: str, error: str) -> None:
        worker.kill()
        self._workers[slot] = None
        if worker.job is not None:
            self._lose(why, error)
            return
        self._failed_starts += 1
        if self._failed_starts >= MAX_STARTS:
            self.close()
            raise RuntimeError(f"{MAX_STARTS} reward workers did not start: {error}")


class _Worker:
    """One process and the job it has; its deadline is for the job, or for getting ready."""

    def __init__(self, spec: str | Task):
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(theirs.fileno()), str(os.getpid())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # so that the kill takes the reward's own children along
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        theirs.close()
        self.ready = False
        self.job: int | None = None
        self.deadline = time.monotonic() + START_SECONDS
        self.pipe.send((list(sys.path), spec))

    def send(self, job: int, item: tuple[Problem, str], timeout: float) -> str | None:
        """Hand over a job; the reason where its problem cannot be pickled, and the worker stays free."""
        try:
            data = pickle.dumps(item)
        except Exception as error:
            return f"this problem cannot be sent to a reward worker: {_why(error)}"
        self.job, self.deadline = job, time.monotonic() + timeout
        with suppress(OSError):  # it died while idle: the next look at the pipe sees the end of file
            self.pipe.send_bytes(data)
        return None

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.pipe.close()


_CHILD = "import sys; sys.path.insert(0, ''); from flowrl_kernels.trainer.reward import work; work()"


def _die_with(parent: int) -> None:
    """On Linux, ask for SIGKILL when the trainer goes away, however it goes."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def work() -> None:
    """The worker's main: reads (problem, response), answers ("ok", reward) or ("raised", reason), until
    EOF.
    """
    global in_worker
    in_worker = True
    pipe = Connection(int(sys.argv[1]))
    _die_with(int(sys.argv[2]))
    os.dup2(2, 1)  # what a reward prints must not mix with the trainer's stdout
    path, spec = pipe.recv()
    sys.path[:] = path
    try:
        reward = find_reward(spec) if isinstance(spec, str) else None
        if spec == "math":
            import logging

            logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    except Exception as error:
        pipe.send(("broken", _why(error)))
        return
    pipe.send(("ready", None))
    while True:
        try:
            data = pipe.recv_bytes()
        except EOFError:
            return
        try:
            problem, response = pickle.loads(data)  # by the trainer, which made the problem
            if reward is None:
                value = spec.verify(problem, response)
            else:
                value = reward(problem.prompt, response, problem.answer)
            answer: tuple[str, Any] = ("ok", _checked(value))
            if hasattr(value, "why"):
                answer = ("failed", (_checked(value), value.why, value.reason))
        except Exception as error:
            answer = ("raised", _why(error))
        pipe.send(answer)
