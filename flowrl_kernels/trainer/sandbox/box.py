"""A sandbox as the host sees it: a warm interpreter behind a socket, used once, watched, and killed.

Everything that comes out of it is data of a stranger: frames of bounded size, JSON, waited for until a deadline.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl_kernels.trainer.sandbox import launch
from flowrl_kernels.trainer.sandbox.launch import SandboxUnavailable
from flowrl_kernels.trainer.sandbox.plain import MAX_FRAME, frame

START_SECONDS = 60.0  # for a sandbox to get warm
WATCH_SECONDS = 0.02  # between two looks at the memory
END_SECONDS = 10.0  # for the kernel to take away what was killed


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    seconds: wall clock, all of its inputs or calls together. memory: bytes, of one process's address space and
    of all its processes' resident memory together. disk: bytes in /tmp. files: inodes there. processes: with
    threads. output: bytes printed for one input.
    """

    seconds: float = 10.0
    memory: int = 1 << 30
    disk: int = 32 << 20
    files: int = 10_000
    processes: int = 16
    output: int = 1 << 20

    def resources(self) -> dict[str, int]:
        """setrlimit's values, for every process of the program."""
        return {
            "AS": self.memory,
            "CPU": int(self.seconds) + 2,
            "FSIZE": self.disk,
            "NOFILE": 64,
            "NPROC": self.processes,
            "CORE": 0,
            "MEMLOCK": 0,
            "MSGQUEUE": 0,
        }


class Ended(Exception):
    """The program is over: `why` is "time", "memory", "disk", "died" or "garbage"."""

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why


class Sandbox:
    """One warm interpreter in a sandbox of its own. `ask` sends and receives; `close` leaves nothing behind.

    Raises SandboxUnavailable where it does not start. Must be made by a thread that lives as long as it: the
    kernel kills a sandbox with the thread that started it.
    """

    def __init__(self, disk: int, slot: int = 0):
        ours, theirs = socket.socketpair()
        info, theirs_info = os.pipe()
        self.socket, self._info = ours, info
        self._init: tuple[int, int] | None = None  # pid, pidfd
        self._ready = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        with tempfile.TemporaryFile() as rules:
            rules.write(launch.filter_bytes())
            rules.seek(0)
            fds = [theirs.fileno(), theirs_info, rules.fileno()]
            try:
                argv = launch.arguments((fds[0], fds[1], fds[2]), disk, slot)
                self._process = subprocess.Popen(
                    argv, env={}, pass_fds=fds, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self._errors
                )
            except BaseException as error:
                ours.close()
                os.close(info)
                self._errors.close()
                if isinstance(error, OSError):
                    raise SandboxUnavailable(f"the sandbox does not start: {error}") from error
                raise
            finally:
                theirs.close()
                os.close(theirs_info)
        ours.setblocking(False)

    def wait_until_warm(self) -> None:
        """Returns at once where it is. Raises SandboxUnavailable with what bubblewrap said."""
        if self._ready:
            return
        try:
            ready = self.receive(time.monotonic() + START_SECONDS, [])
            pid = int(json.loads(os.read(self._info, 4096))["child-pid"])
            self._init = (pid, os.pidfd_open(pid))
        except (Ended, ValueError, OSError) as error:
            self.close()
            said = self._said.decode(errors="replace").strip()
            raise SandboxUnavailable(f"the sandbox does not start: {said or error}") from error
        if ready != {"ready": True}:
            self.close()
            raise SandboxUnavailable(f"the sandbox does not start: it said {ready!r:.80}")
        self._ready = True

    def send(self, message: Any, until: float, watched: Sequence[Watch]) -> None:
        """Send one message. Raises Ended."""
        self.send_bytes(frame(message)[4:], until, watched)

    def send_bytes(self, body: bytes, until: float, watched: Sequence[Watch]) -> None:
        """Send one message as it came from another sandbox. Raises Ended."""
        data = memoryview(len(body).to_bytes(4, "big") + body)
        while data:
            self._wait(select.POLLOUT, until, watched)
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                continue
            except OSError:
                raise Ended("died") from None

    def receive(self, until: float, watched: Sequence[Watch], most: int = MAX_FRAME) -> Any:
        """The next message. Raises Ended."""
        try:
            return json.loads(self.receive_bytes(until, watched, most))
        except (ValueError, RecursionError):
            raise Ended("garbage") from None

    def receive_bytes(self, until: float, watched: Sequence[Watch], most: int = MAX_FRAME) -> bytes:
        """The next message, unread. Raises Ended."""
        size = int.from_bytes(self._exactly(4, until, watched), "big")
        if size > most:
            raise Ended("garbage")
        return self._exactly(size, until, watched)

    def _exactly(self, size: int, until: float, watched: Sequence[Watch]) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            self._wait(select.POLLIN, until, watched)
            try:
                part = self.socket.recv(min(size - len(parts), 1 << 20))
            except BlockingIOError:
                continue
            except OSError:
                part = b""
            if not part:
                raise Ended("died")
            parts += part
        return bytes(parts)

    def _wait(self, events: int, until: float, watched: Sequence[Watch]) -> None:
        poll = select.poll()
        poll.register(self.socket, events)
        while True:
            left = until - time.monotonic()
            if left <= 0:
                raise Ended("time")
            for watch in watched:
                watch.look()
            if poll.poll(1000 * min(left, WATCH_SECONDS) + 1):
                return

    @property
    def pid(self) -> int:
        """The sandbox's first process, as the host numbers it."""
        assert self._init is not None
        return self._init[0]

    def close(self) -> None:
        """Kill every process of the sandbox and wait until they are gone."""
        if self._process.returncode is None:
            # the first process inside, then the one that started it and reaps it: no zombie is left to others
            if self._init is not None:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(self._init[1], signal.SIGKILL)
            until = time.monotonic() + END_SECONDS
            while self._process.returncode is None:
                if self._init is None:  # still starting: its first process may be there by now
                    for pid in _children(self._process.pid):
                        with suppress(OSError):
                            os.kill(pid, signal.SIGKILL)
                if time.monotonic() > until:
                    self._process.kill()
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(0.02 if self._init is None else END_SECONDS)
        if self._init is not None:
            os.close(self._init[1])
            self._init = None
        if self._info >= 0:
            self._errors.seek(0)
            self._said = self._errors.read(2000)
            self._errors.close()
            self.socket.close()
            os.close(self._info)
            self._info = -1


class Watch:
    """Looks at what a running sandbox uses, no more often than every WATCH_SECONDS."""

    def __init__(self, box: Sandbox, limits: Limits):
        self._box, self._limits, self._next = box, limits, 0.0

    def look(self) -> None:
        """Raises Ended("memory") or Ended("disk") above the limits."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + WATCH_SECONDS
        if resident(self._box.pid) > self._limits.memory:
            raise Ended("memory")
        with suppress(OSError):
            tmp = os.statvfs(f"/proc/{self._box.pid}/root/tmp")
            if tmp.f_files - tmp.f_ffree > self._limits.files:
                raise Ended("disk")


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with suppress(OSError):
                found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found


def resident(pid: int) -> int:
    """Bytes of anonymous and shared memory that a process and its descendants hold."""
    total, waiting = 0, [pid]
    while waiting:
        pid = waiting.pop()
        waiting += _children(pid)
        with suppress(OSError, ValueError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) * 1024
    return total


class Pool:
    """Warm sandboxes, `spare` of them ahead: each is used for one program, and a new one warms up meanwhile."""

    def __init__(self, disk: int = Limits.disk, spare: int = 1):
        self._disk, self.spare, self._slot = disk, spare, 0
        self._waiting: deque[Sandbox] = deque()

    def fill(self) -> None:
        """Start what is missing; returns before it is warm."""
        while len(self._waiting) < self.spare:
            self._waiting.append(Sandbox(self._disk, self._slot))
            self._slot += 1

    def take(self) -> Sandbox:
        """A warm sandbox; the caller closes it. Raises SandboxUnavailable."""
        if not self._waiting:
            self._waiting.append(Sandbox(self._disk, self._slot))
            self._slot += 1
        box = self._waiting.popleft()
        box.wait_until_warm()
        return box

    def close(self) -> None:
        """Kill the sandboxes that wait."""
        while self._waiting:
            self._waiting.popleft().close()
