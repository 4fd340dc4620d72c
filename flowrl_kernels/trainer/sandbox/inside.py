"""What runs inside a sandbox: a warm interpreter that takes one job, runs it, and is thrown away.

Imports the standard library only (and plain.py, which is put beside it): nothing else of ours is in there.
"programs" runs a program once per input, each time in a fresh process, and sends what it printed. "serve"
loads a program and answers calls. "tests" runs test code, whose calls go out to another sandbox's "serve".
What a program can reach is its own process and this one's signals; nothing that is decided here about a
program is believed outside but what it printed or returned.
"""

from __future__ import annotations

import ast
import atexit
import builtins
import functools
import io
import json
import operator
import os
import random
import resource
import select
import signal
import socket
import sys
import threading
import time
import traceback
import types
import unittest
from contextlib import suppress
from typing import Any

from flowrl_kernels.trainer.sandbox.plain import MAX_FRAME, decode, encode, frame

# what most programs import, so that it is there already
WARM = "bisect collections copy dataclasses decimal fractions functools heapq itertools math operator re string typing"
_FILE_NAME = "program.py"
_FDS = 1 << 16  # more than a process has open
_TAIL = 2000  # bytes of a program's stderr that are kept


class Channel:
    """The only way out: frames over a socket that the host holds the other end of."""

    def __init__(self, number: int):
        self.socket = socket.socket(fileno=number)

    def send(self, message: Any) -> None:
        self.socket.sendall(frame(message))

    def receive(self) -> Any:
        size = int.from_bytes(self._exactly(4), "big")
        if size > MAX_FRAME:
            raise ValueError(f"a message of {size} bytes is above {MAX_FRAME}")
        return json.loads(self._exactly(size))

    def _exactly(self, size: int) -> bytes:
        parts = []
        while size:
            part = self.socket.recv(min(size, 1 << 20))
            if not part:
                os._exit(0)  # the host went away
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def main(number: int, paths: list[str]) -> None:
    """Get warm, say so, take one job."""
    if (os.getpid(), os.getppid()) != (2, 1):
        sys.exit("not in a process namespace of its own")  # where kill(-1) would reach others
    os.dup2(number, 3)
    os.closerange(4, _FDS)
    channel = Channel(3)
    for name in WARM.split():
        __import__(name)
    sys.path.extend(paths)
    os.environ.clear()
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS") if paths else ():
        os.environ[name] = "1"  # a thread per core would meet the limit on processes
    channel.send({"ready": True})
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    job = channel.receive()
    {"programs": programs, "serve": serve, "tests": tests}[job["role"]](channel, job)


def limit(limits: dict[str, int]) -> None:
    """Lower this process's limits for good: hard limits cannot be raised again."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def _module(name: str, source: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__["__file__"] = _FILE_NAME
    sys.modules[name] = module
    sys.argv = [_FILE_NAME]
    random.seed(0)  # the same program scores the same
    exec(compile(source, _FILE_NAME, "exec"), module.__dict__)
    return module


# programs: standard input and output


def programs(channel: Channel, job: dict[str, Any]) -> None:
    """For every input that comes: run the program on it, answer what it printed and how it ended."""
    while True:
        given = channel.receive()
        channel.send(_run(job, given["stdin"], float(given["seconds"]), int(given["output"])))


def _run(job: dict[str, Any], stdin: str, seconds: float, most: int) -> dict[str, Any]:
    until = time.monotonic() + seconds
    theirs_in, ours_in = os.pipe()
    ours_out, theirs_out = os.pipe()
    ours_err, theirs_err = os.pipe()
    while True:
        try:
            child = os.fork()
            break
        except OSError:  # what the last input's processes held is not given back yet
            if time.monotonic() > until:
                raise
            time.sleep(0.005)
    if child == 0:
        _be_the_program(job, (theirs_in, theirs_out, theirs_err))
    for fd in (theirs_in, theirs_out, theirs_err):
        os.close(fd)
    ended = os.pidfd_open(child)
    waiting, printed, errors = memoryview(stdin.encode("utf-8", "replace")), bytearray(), b""
    for fd in (ours_in, ours_out, ours_err):
        os.set_blocking(fd, False)
    poll = select.poll()
    for fd in (ended, ours_out, ours_err):
        poll.register(fd, select.POLLIN)
    poll.register(ours_in, select.POLLOUT)
    how, reading, feeding, over = "", 2, True, False
    # after the end, what is still in the pipes is read, without waiting for what may hold them open
    while not how and not (over and reading == 0):
        left = until - time.monotonic()
        if left <= 0 and not over:
            how = "time"
            break
        events = poll.poll(0 if over else left * 1000)
        if over and not any(fd in (ours_out, ours_err) for fd, _ in events):
            break
        for fd, _ in events:
            if fd == ended:
                poll.unregister(fd)
                over = True
            elif fd == ours_in:
                try:
                    waiting = waiting[os.write(fd, waiting[:65536]) :]
                except BlockingIOError:
                    continue
                except OSError:
                    waiting = waiting[:0]
                if not waiting:
                    poll.unregister(fd)
                    os.close(fd)
                    feeding = False
            else:
                part = os.read(fd, 65536)
                if not part:
                    poll.unregister(fd)
                    reading -= 1
                elif fd == ours_out:
                    printed += part
                    if len(printed) > most:
                        how = "output"
                else:
                    errors = (errors + part)[-_TAIL:]
    with suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # all but this process and the first: daemons go, too
    _, status = os.waitpid(child, 0)
    for fd in (ended, ours_out, ours_err, *([ours_in] if feeding else [])):
        os.close(fd)
    return {
        "how": how or "exit",
        "code": os.waitstatus_to_exitcode(status),
        "stdout": bytes(printed[:most]).decode("utf-8", "replace"),
        "stderr": errors.decode("utf-8", "replace"),
    }


def _be_the_program(job: dict[str, Any], fds: tuple[int, int, int]) -> None:
    code = 1
    try:
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.closerange(3, _FDS)
        limit(job["limits"])
        sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, "r", closefd=False)), "utf-8")  # type: ignore[misc]
        sys.stdout = sys.__stdout__ = io.TextIOWrapper(  # type: ignore[misc]
            io.BufferedWriter(io.FileIO(1, "w", closefd=False)), "utf-8", "backslashreplace"
        )
        sys.stderr = sys.__stderr__ = io.TextIOWrapper(  # type: ignore[misc]
            io.FileIO(2, "w", closefd=False), "utf-8", "backslashreplace", write_through=True
        )
        try:
            _module("__main__", job["source"])
            code = 0
        except SystemExit as error:
            if isinstance(error.code, int):
                code = error.code & 255
            elif error.code is None:
                code = 0
            else:
                print(error.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(code)


# serve: calls


_METHODS: dict[str, Any] = {
    "__call__": lambda target, *args, **kwargs: target(*args, **kwargs),
    "__getattr__": getattr,
    "__setattr__": setattr,
    "__iter__": iter,
    "__next__": next,
    "__len__": len,
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "__delitem__": operator.delitem,
    "__str__": str,
    "__repr__": repr,
    "__enter__": lambda target: type(target).__enter__(target),
    "__exit__": lambda target, *error: type(target).__exit__(target, None, None, None),
}


class Server:
    """Answers calls to what a program defined; what is no plain value stays here and travels as a number."""

    def __init__(self) -> None:
        self.kept: list[Any] = []

    def keep(self, value: Any) -> dict[str, int]:
        self.kept.append(value)
        return {"object": len(self.kept) - 1}

    def answer(self, call: dict[str, Any]) -> dict[str, Any]:
        target = self.kept[call["object"]]
        args = decode(call["args"], self.kept.__getitem__)
        kwargs = decode(call["kwargs"], self.kept.__getitem__)
        value = _METHODS[call["method"]](target, *args, **kwargs)
        # arguments that the call may have changed in place go back with the value
        return {"value": encode(value, self.keep), "args": encode(args, self.keep)}


def serve(channel: Channel, job: dict[str, Any]) -> None:
    """Load the program, tell what it defined (of `only`, if that names something), answer calls until the host
    goes away.
    """
    limit(job["limits"])
    server = Server()
    try:
        module = _module("solution", job["source"])
        names: dict[str, Any] = {}
        modules: dict[str, str] = {}
        for name, value in list(vars(module).items()):
            if job["only"] and name not in job["only"]:
                continue
            if isinstance(value, types.ModuleType):
                modules[name] = value.__name__
            elif not name.startswith("__"):
                with suppress(ValueError):
                    names[name] = encode(value, server.keep)
        channel.send({"names": names, "modules": modules})
    except BaseException as error:
        channel.send({"raised": _told(error)})
        return
    while True:
        call = channel.receive()
        try:
            answer = frame(server.answer(call))
        except BaseException as error:
            answer = frame({"raised": _told(error)})
        channel.socket.sendall(answer)


def _told(error: BaseException) -> list[str]:
    # the nearest class that both sides know
    kind = next((c.__name__ for c in type(error).__mro__ if getattr(builtins, c.__name__, None) is c), "Exception")
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        text = type(error).__name__
    return [kind, text[:_TAIL]]


# tests: code of the problem's author, calling a program that is elsewhere


class NotPlain(BaseException):
    """A test passed the program something that cannot cross: nobody's mistake, and no verdict."""


class Remote:
    """Something of the program's that is no plain value. It may not judge itself: equality is identity, truth
    is True, and there is no arithmetic.
    """

    def __init__(self, tests: Tests, number: int):
        object.__setattr__(self, "_tests", tests)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._tests.call(self._number, "__getattr__", (name,), {})

    def __bool__(self) -> bool:
        return True


def _forward(method: str) -> Any:
    def forwarded(self: Remote, *args: Any, **kwargs: Any) -> Any:
        return self._tests.call(self._number, method, args, kwargs)

    return forwarded


# nothing that hands over what the test expects: no comparison, no arithmetic, no `in` (which iterates instead)
for _method in _METHODS.keys() - {"__getattr__"}:
    setattr(Remote, _method, _forward(_method))


class Tests:
    """The test code's namespace, and the calls that leave it."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.remotes: dict[int, Remote] = {}
        self.passed = self.failed = 0
        self.error = self.unsupported = ""

    def remote(self, number: int) -> Remote:
        return self.remotes.setdefault(number, Remote(self, number))

    def call(self, number: int, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            call = {"object": number, "method": method, "args": encode(list(args), _handle)}
            call["kwargs"] = encode(kwargs, _handle)
        except (TypeError, ValueError, RecursionError) as error:
            self.unsupported = str(error)  # whatever the test code makes of the exception
            raise NotPlain(self.unsupported) from None
        self.channel.send({"call": call})
        answer = self.channel.receive()
        if "raised" in answer:
            kind, text = answer["raised"]
            found = getattr(builtins, kind, None)
            if not (isinstance(found, type) and issubclass(found, Exception)):
                found = RuntimeError
            if found in (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError):
                found = UnicodeError  # those take five arguments
            raise found(text)
        for before, after in zip(args, decode(answer["args"], self.remote)):
            _update(before, after)
        return decode(answer["value"], self.remote)

    def mark(self, ok: Any, error: BaseException | None = None) -> None:
        if ok:
            self.passed += 1
        else:
            self.failed += 1
            self.error = self.error or (f"{type(error).__name__}: {error}" if error else "an assertion does not hold")


def _handle(value: Any) -> dict[str, int]:
    if isinstance(value, Remote):
        return {"object": value._number}
    raise TypeError(f"a test passes the program a {type(value).__name__}; only plain values can be passed")


def _update(before: Any, after: Any) -> None:
    if type(before) is not type(after):
        return
    if isinstance(before, list | bytearray):
        before[:] = after
    elif isinstance(before, dict | set):
        if before != after:
            before.clear()
            before.update(after)


class _Count(ast.NodeTransformer):
    """`assert x` counts instead of ending the test, for a share of the assertions."""

    def visit_Assert(self, node: ast.Assert) -> Any:
        made = ast.parse(
            "try:\n __flowrl_ok__ = bool(0)\n"
            "except Exception as __flowrl_e__:\n __flowrl_mark__(False, __flowrl_e__)\n"
            "else:\n __flowrl_mark__(__flowrl_ok__)"
        ).body[0]
        made.body[0].value.args[0] = node.test  # type: ignore[attr-defined]
        return ast.copy_location(made, node)


def tests(channel: Channel, job: dict[str, Any]) -> None:
    """Take what the program's sandbox said after loading it, run the test code on that, and send how many checks
    passed and failed.
    """
    limit(job["limits"])
    loaded = channel.receive()
    run = Tests(channel)
    if "names" not in loaded:
        reason = str(loaded.get("raised"))[:_TAIL]
        channel.send({"passed": 0, "failed": 1, "error": f"the program does not load: {reason}", "unsupported": ""})
        return
    unittest.main = lambda *args, **kwargs: None  # type: ignore[assignment]  # the cases are run below
    try:
        space = _module("tests", job["prelude"]).__dict__
        theirs = {name: decode(value, run.remote) for name, value in loaded["names"].items()}
        for name, module in loaded["modules"].items():  # never the program's own: it would judge itself
            if name not in space and module.partition(".")[0] in (*sys.stdlib_module_names, "numpy"):
                with suppress(ImportError):
                    theirs[name] = __import__(module, fromlist=["*"])
        entry = job["entry_point"]
        space.update({name: value for name, value in theirs.items() if name not in space or name == entry})
        for name in ("solution", job["module"]):
            if name:
                sys.modules[name] = types.ModuleType(name)
                sys.modules[name].__dict__.update(theirs)
        space["__flowrl_mark__"] = run.mark
        for part in job["tests"]:
            tree = ast.parse(part, "tests.py")
            checks = any(isinstance(node, ast.Assert | ast.Expr | ast.For) for node in tree.body)
            if job["partial"]:
                tree = ast.fix_missing_locations(_Count().visit(tree))
            code = compile(tree, "tests.py", "exec")
            _attempt(run, functools.partial(exec, code, space), checks)
            if run.failed and not job["partial"]:
                break
        _functions(run, space, theirs.get(entry) if entry else None, job["partial"])
    except NotPlain:  # its reason is in run.unsupported
        run.failed += 1
    verdict = {"passed": run.passed, "failed": run.failed, "error": run.error[:_TAIL]}
    channel.send({**verdict, "unsupported": run.unsupported})


def _attempt(run: Tests, body: Any, counts: bool = True) -> None:
    """One check: passes unless it raises; with assertions counted in it, those count instead. Code that only
    defines things (`counts` False) can fail but not pass.
    """
    before = run.passed + run.failed
    try:
        body()
    except NotPlain:
        raise
    except BaseException as error:
        run.mark(False, error)
    else:
        if counts and run.passed + run.failed == before:
            run.mark(True)


def _functions(run: Tests, space: dict[str, Any], candidate: Any, partial: bool) -> None:
    """check(candidate), test_*() and unittest's cases, where the test code defined them."""
    bodies: list[Any] = []
    if callable(space.get("check")) and not isinstance(space["check"], Remote) and candidate is not None:
        bodies.append(functools.partial(space["check"], candidate))
    for name, value in list(space.items()):
        if name.startswith("test") and isinstance(value, types.FunctionType):
            bodies.append(value)
        elif isinstance(value, type) and issubclass(value, unittest.TestCase) and value.__module__ == "tests":
            for case in unittest.defaultTestLoader.loadTestsFromTestCase(value):
                bodies.append(functools.partial(_case, case))
    for body in bodies:
        if run.failed and not partial:
            return
        _attempt(run, body)


def _case(case: Any) -> None:
    result = unittest.TestResult()
    result.failfast = True
    case.run(result)
    for _, text in result.failures + result.errors:
        raise AssertionError(text[-_TAIL:])
    if result.unexpectedSuccesses:
        raise AssertionError("unexpected success")
