"""task.reward = "code": the program in a response, run in a sandbox, judged outside of it (docs/code.md).

A program that prints is judged by what it printed, a function by what it returned: both cross the sandbox's
wall as plain data. Assertions run in a second sandbox, whose calls to the program cross the same way. So a
program cannot pass by lying about itself.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from flowrl_kernels.trainer.sandbox import Ended, Limits, Pool, Sandbox, SandboxUnavailable, Watch
from flowrl_kernels.trainer.sandbox.plain import MAX_FRAME, decode, encode
from flowrl_kernels.trainer.tasks.code_rows import CodeTests, parses, read_tests

if TYPE_CHECKING:
    from flowrl_kernels.trainer.config import TaskConfig

GRACE_SECONDS = 90.0  # beyond the program's deadline, for its sandbox to get warm and to be taken down
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n`]*$")
_PYTHON = ("python", "py", "python3", "")
_MOST_VALUE = 4 << 20  # bytes of what a call returns, as JSON
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?")
# what LeetCode's judge, and so LiveCodeBench's, has imported before a solution
_LEETCODE = """from typing import *
from collections import *
from itertools import *
from functools import *
from heapq import *
from bisect import *
from math import *
from operator import *
from builtins import *
import collections, itertools, functools, heapq, bisect, math, operator, random, re, string, sys
"""


class Failure(float):
    """A reward that says why it is lower: `why` "timed_out" or "raised", counted as those; `reason` in words."""

    why: str
    reason: str

    def __new__(cls, reward: float, why: str, reason: str) -> Failure:
        made = super().__new__(cls, reward)
        made.why, made.reason = why, reason
        return made


def row_reader(cfg: TaskConfig) -> Callable[[Mapping[str, Any], str], CodeTests]:
    """(row, where) -> its tests with the run's limits on them."""
    if not 0 <= cfg.code_tolerance < 1:
        raise ValueError(f"task.code_tolerance must be in [0, 1), got {cfg.code_tolerance}")
    if cfg.code_memory < 64:
        raise ValueError(f"task.code_memory must be at least 64 MiB, got {cfg.code_memory}")

    def read(row: Mapping[str, Any], where: str) -> CodeTests:
        tests = read_tests(row, where, cfg.answer_key)
        return replace(
            tests,
            deadline=cfg.reward_timeout,
            memory=cfg.code_memory << 20,
            partial=cfg.code_partial,
            tolerance=tests.tolerance or cfg.code_tolerance,
        )

    return read


def last_code_block(text: str) -> str | None:
    """The last fenced block, one marked as Python or unmarked before others; None where there is none.

    What stands before the last </think> does not count. A block that is never closed goes to the end.
    """
    text = text.rpartition("</think>")[2]
    blocks: list[tuple[str, str]] = []
    fence, language = "", ""
    lines: list[str] = []
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if not fence and match:
            fence, language, lines = match[1], match[2].lower(), []
        elif fence and match and match[1].startswith(fence) and not match[2]:
            blocks.append((language, "\n".join(lines)))
            fence = ""
        elif fence:
            lines.append(line)
    if fence:
        blocks.append((language, "\n".join(lines)))
    python = [code for language, code in blocks if language in _PYTHON] or [code for _, code in blocks]
    return python[-1] if python else None


def program(response: str, tests: CodeTests) -> str:
    """The program of a response: its last code block, else all of it, after the code that the prompt began."""
    block = last_code_block(response)
    code = response if block is None else block
    if tests.kind == "calls":
        return code if "from __future__" in code else _LEETCODE + code
    if not tests.prompt:
        return code
    whole = re.search(rf"^(?:async\s+)?(?:def|class)\s+{tests.entry_point}\b|^{tests.entry_point}\s*=", code, re.M)
    if not whole:
        return tests.prompt + code  # it goes on where the prompt stops
    if "from __future__" in code or not parses(tests.prompt):
        return code
    return f"{tests.prompt}\n\n{code}"


def code_reward(prompt: Any, response: str, answer: Any) -> float:
    """1.0 if the response's program passes all tests, else 0.0, or the share of them with `partial`.

    A program that fails by an exception, a signal or the deadline gives a `Failure`. Raises SandboxUnavailable
    where no sandbox starts, ValueError where the tests themselves cannot be put to a program.
    """
    if not isinstance(answer, CodeTests):
        raise TypeError(f"a code reward needs a row's tests, got {answer!r:.60}")
    judged = Judged(answer, program(response, answer))
    return judged.reward()


class Judged:
    """One program on its way through its tests."""

    def __init__(self, tests: CodeTests, source: str):
        self._tests, self._source = tests, source
        self._limits = Limits(seconds=tests.deadline, memory=tests.memory)
        self._pool = _pool(2 if tests.kind == "asserts" else 1)
        self._boxes: list[Sandbox] = []
        self._watched: list[Watch] = []
        self._until = math.inf
        self._why = self._reason = ""
        self.passed = self.failed = 0
        self.seen: list[Any] = []  # what the program printed or returned, test by test, as plain data
        self.seconds = 0.0  # from the program's start until nothing of it is left

    def reward(self) -> float:
        try:
            box = self._take()
            other = self._take() if self._tests.kind == "asserts" else None
            self._until = time.monotonic() + self._tests.deadline
            try:
                if other is not None:
                    self._asserts(box, other)
                elif self._tests.kind == "calls":
                    self._calls(box)
                else:
                    self._programs(box)
            except Ended as ended:
                if ended.why == "time":
                    self._fail("timed_out", f"no end within {self._tests.deadline:g} s, killed")
                else:
                    self._fail("raised", f"the sandbox was ended: {ended.why}")
        finally:
            for box in self._boxes:
                box.close()
            self.seconds = time.monotonic() - (self._until - self._tests.deadline)
        total = len(self._tests.inputs) or self.passed + self.failed
        share = self.passed / total if total else 0.0
        reward = share if self._tests.partial else float(share == 1)
        return Failure(reward, self._why, self._reason) if self._why and reward < 1 else reward

    def _take(self) -> Sandbox:
        box = self._pool.take()
        self._boxes.append(box)
        self._watched.append(Watch(box, self._limits))
        return box

    def _fail(self, why: str = "", reason: str = "") -> None:
        self.failed += 1
        if not self._why:
            self._why, self._reason = why, reason

    def _start(self, box: Sandbox, role: str, **job: Any) -> None:
        job = {"role": role, "limits": self._limits.resources(), **job}
        box.send(job, self._until, self._watched)

    def _until_of_one(self) -> float:
        return min(self._until, time.monotonic() + (self._tests.seconds or math.inf))

    def _programs(self, box: Sandbox) -> None:
        self._start(box, "programs", source=self._source)
        self._pool.fill()
        for given, wanted in zip(self._tests.inputs, self._tests.outputs):
            most = max(self._limits.output, 2 * len(wanted.encode("utf-8", "replace")))
            seconds = max(0.0, self._until_of_one() - time.monotonic())
            box.send({"stdin": given, "seconds": seconds, "output": most}, self._until, self._watched)
            # JSON escapes: up to six bytes for one
            run = self._receive(box, self._until, 6 * (most + 65536))
            how, code = run.get("how"), run.get("code")
            self.seen.append([how, code, str(run.get("stdout", "")).split()])
            if how == "time":
                self._fail("timed_out", f"no end within {seconds:.3g} s")
            elif how != "exit" or code != 0:
                reason = str(run.get("stderr", "")).strip().rpartition("\n")[2]
                self._fail("raised", f"{how}, code {code}: {reason:.200}")
            elif same_output(str(run.get("stdout", "")), wanted, self._tests.tolerance):
                self.passed += 1
            else:
                self._fail()
            if self.failed and not self._tests.partial:
                return

    def _calls(self, box: Sandbox) -> None:
        self._start(box, "serve", source=self._source, only=[self._tests.entry_point, "Solution"])
        self._pool.fill()
        loaded = self._receive(box, self._until, _MOST_VALUE)
        names = loaded.get("names")
        if not isinstance(names, dict):
            self.seen.append(_kind(loaded))
            self._fail("raised", f"the program does not load: {_raised(loaded)}")
            return
        target = names.get(self._tests.entry_point)
        until = self._until_of_one()
        if target is None and "Solution" in names:
            made = self._call(box, names["Solution"], "__call__", [], until)
            target = self._call(box, made.get("value"), "__getattr__", [self._tests.entry_point], until).get("value")
        if not isinstance(target, dict) or "object" not in target:
            self._fail("raised", f"the program defines no {self._tests.entry_point}")
            return
        for given, wanted in zip(self._tests.inputs, self._tests.outputs):
            answer = self._call(box, target, "__call__", encode(given), self._until_of_one())
            self.seen.append(_kind(answer))
            try:
                good = "value" in answer and same_value(decode(answer["value"]), wanted, self._tests.tolerance)
            except (ValueError, TypeError, RecursionError, ArithmeticError):
                good = False
            if good:
                self.passed += 1
            else:
                self._fail(*(("raised", _raised(answer)) if "raised" in answer else ()))
                if not self._tests.partial:
                    return

    def _call(self, box: Sandbox, target: Any, method: str, args: Any, until: float) -> dict[str, Any]:
        number = target.get("object") if isinstance(target, dict) else None
        box.send({"object": number, "method": method, "args": args, "kwargs": {"dict": []}}, until, self._watched)
        return self._receive(box, until, _MOST_VALUE)

    def _receive(self, box: Sandbox, until: float, most: int = MAX_FRAME) -> dict[str, Any]:
        message = box.receive(until, self._watched, most)
        if not isinstance(message, dict):
            raise Ended("garbage")
        return message

    def _asserts(self, box: Sandbox, judge: Sandbox) -> None:
        """`judge` runs the tests; each of their calls goes through here to `box` and back."""
        tests = self._tests
        self._start(box, "serve", source=self._source, only=[])
        self._pool.fill()
        prelude = tests.prompt if parses(tests.prompt) else ""
        job = {"prelude": prelude, "tests": tests.tests, "entry_point": tests.entry_point, "module": tests.module}
        self._start(judge, "tests", **job, partial=tests.partial)
        judge.send_bytes(box.receive_bytes(self._until, self._watched), self._until, self._watched)
        while True:
            message = self._receive(judge, self._until)
            if "call" not in message:
                break
            box.send(message["call"], self._until, self._watched)
            answer = box.receive_bytes(self._until_of_one(), self._watched)
            self.seen.append(answer)
            judge.send_bytes(answer, self._until, self._watched)
        if message["unsupported"]:
            raise ValueError(f"these tests cannot be put to a program in a sandbox: {message['unsupported']}")
        self.passed += message["passed"]
        if message["failed"]:
            self._fail("" if message["error"].startswith("an assertion") else "raised", message["error"])
            self.failed += message["failed"] - 1


def behaviour(source: str, tests: CodeTests) -> str:
    """A hash of what a program does on all of its row's tests, right or wrong: of the words it prints with its exit
    code, of the values it returns, of the kinds of its exceptions; and of how it ends where its sandbox was ended.

    Raises SandboxUnavailable where no sandbox starts.
    """
    judged = Judged(replace(tests, partial=True), source)
    judged.reward()
    seen = [_parsed(part) if isinstance(part, bytes) else part for part in judged.seen]
    ended = judged._why if len(seen) < len(tests.inputs) or judged._why == "timed_out" else ""
    return hashlib.sha256(json.dumps([seen, ended], sort_keys=True).encode()).hexdigest()[:16]


def _parsed(answer: bytes) -> Any:
    try:
        return _kind(json.loads(answer))
    except (ValueError, RecursionError):
        return "garbage"


def _kind(answer: Any) -> Any:
    """A program's answer with the kind of an exception in place of its text, which may name addresses."""
    raised = answer.get("raised") if isinstance(answer, dict) else None
    return {"raised": raised[0] if isinstance(raised, list) and raised else ""} if raised is not None else answer


def _raised(answer: dict[str, Any]) -> str:
    raised = answer.get("raised")
    return str(raised[1])[:200] if isinstance(raised, list) and len(raised) == 2 else "no answer"


def same_output(printed: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Equal line by line and word by word, blank lines at the end aside; numbers by value, not by digits."""
    ours, theirs = printed.rstrip().split("\n"), wanted.rstrip().split("\n")
    return len(ours) == len(theirs) and all(
        len(a) == len(b) and all(x == y or _close(x, y, tolerance) for x, y in zip(a, b))
        for a, b in ((left.split(), right.split()) for left, right in zip(ours, theirs))
    )


def _close(printed: str, wanted: str, tolerance: float) -> bool:
    if max(len(printed), len(wanted)) > 400 or not (_NUMBER.fullmatch(printed) and _NUMBER.fullmatch(wanted)):
        return False
    try:
        a, b = Decimal(printed), Decimal(wanted)
    except InvalidOperation:
        return False
    if a == b:
        return True
    return abs(a - b) <= Decimal(tolerance) * max(abs(a), abs(b), Decimal(1))


def same_value(value: Any, wanted: Any, tolerance: float = 0.0) -> bool:
    """Equal as JSON has it (a tuple is a list, keys are texts); a single wanted value may stand in a list."""
    one = isinstance(wanted, list) and len(wanted) == 1
    return _same(value, wanted, tolerance) or (one and _same(value, wanted[0], tolerance))


def _same(value: Any, wanted: Any, tolerance: float) -> bool:
    if type(value).__name__ == "ndarray":
        value = value.tolist()
    if isinstance(value, list | tuple) and isinstance(wanted, list | tuple):
        return len(value) == len(wanted) and all(_same(a, b, tolerance) for a, b in zip(value, wanted))
    if isinstance(value, dict) and isinstance(wanted, dict):
        ours, theirs = ({str(k): v for k, v in d.items()} for d in (value, wanted))
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k], tolerance) for k in ours)
    if isinstance(value, float) or isinstance(wanted, float):
        if not all(isinstance(x, int | float) for x in (value, wanted)):
            return False
        return math.isclose(value, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return bool(value == wanted)


_pools: dict[int, Pool] = {}


def _pool(spare: int) -> Pool:
    """This process's warm sandboxes."""
    if not _pools:
        _pools[0] = Pool(spare=spare)
        atexit.register(close_pool)
    _pools[0].spare = max(_pools[0].spare, spare)
    return _pools[0]


def close_pool() -> None:
    """Kill the sandboxes that wait for a program."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


_PROBE = """
import socket
try:
    print(len(open({path!r}).read()))
except OSError:
    print("no file")
try:
    socket.create_connection(("127.0.0.1", 9), 1)
except OSError as error:
    print("no socket" if error.errno == 38 else error)
"""


def require_sandbox() -> None:
    """Run one program that looks around. Raises SandboxUnavailable where it cannot run or sees too much."""
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("seen")
        file.flush()
        tests = CodeTests("programs", ("",), ("no file\nno socket",), deadline=30.0)
        judged = Judged(tests, _PROBE.format(path=file.name))
        if judged.reward() != 1.0:
            raise SandboxUnavailable(f"a sandbox runs, but does not hold: {judged._reason or 'it sees this machine'}")
    close_pool()
