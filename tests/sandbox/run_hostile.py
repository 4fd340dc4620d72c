"""Runs hostile programs and reports: escapes, wrong verdicts, time over the deadline, what was left behind.

python -m tests.sandbox.run_hostile --programs 2000 --workers 4 --deadline 1
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from flowrl_kernels.trainer.sandbox.box import Sandbox
from flowrl_kernels.trainer.tasks import code
from flowrl_kernels.trainer.tasks.code_rows import CodeTests
from tests.sandbox.hostile import Canary, Program, programs


class Trap:
    """A canary in place: files, an environment, sockets; says afterwards whether it was touched."""

    def __init__(self) -> None:
        self.secret = "CANARY-" + secrets.token_hex(16)
        self.folders = [
            Path(tempfile.mkdtemp(prefix="canary-")),
            Path(tempfile.mkdtemp(prefix="canary-", dir=Path.home())),
        ]
        for folder in self.folders:
            folder.chmod(0o777)
            (folder / "secret").write_text(self.secret)
            (folder / "secret").chmod(0o666)
            (folder / "open").mkdir(mode=0o777)
            (folder / "open").chmod(0o777)
        self.before = self._state()
        self.touched: list[str] = []
        tcp = socket.create_server(("127.0.0.1", 0))
        name = "flowrl-" + secrets.token_hex(4)
        unix = socket.socket(socket.AF_UNIX)
        unix.bind("\0" + name)
        unix.listen()
        self.sockets = [tcp, unix]
        for server in self.sockets:
            threading.Thread(target=self._serve, args=(server,), daemon=True).start()
        # a process that has the secret in its environment, of a user that anyone may be
        self.process = subprocess.Popen(["sleep", "100000"], env={"CANARY": self.secret})
        os.environ["CANARY"] = self.secret
        files = tuple(str(folder / "secret") for folder in self.folders)
        port = tcp.getsockname()[1]
        self.canary = Canary(self.secret, files, str(self.folders[0] / "open"), self.process.pid, port, name)

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            self.touched.append(f"a connection to {server.getsockname()}")
            connection.sendall(self.secret.encode())
            connection.close()

    def _state(self) -> list[tuple[str, int, str]]:
        paths = sorted(p for folder in self.folders for p in folder.rglob("*"))
        return [(str(p), p.stat().st_mode, p.read_text() if p.is_file() else "") for p in paths]

    def close(self) -> list[str]:
        """What was touched; takes the canary down."""
        if self._state() != self.before:
            self.touched.append("the files changed")
        if self.process.poll() is not None:
            self.touched.append("the process with the secret was ended")
        self.process.kill()
        self.process.wait()
        for server in self.sockets:
            server.close()
        for folder in self.folders:
            shutil.rmtree(folder)
        os.environ.pop("CANARY", None)
        return self.touched


def tests_of(program: Program, secret: str, deadline: float) -> CodeTests:
    """What rewards a program for getting at the secret."""
    if program.role == "programs":
        given, wanted = (secret[20:] + "\n", secret) if program.honest else ("", secret)
        return CodeTests("programs", (given,), (wanted,), deadline=deadline)
    test = f"def check(candidate):\n    assert candidate(3) == {secret!r}\n"
    return CodeTests("asserts", entry_point="f", tests=(test,), deadline=deadline)


def judge(program: Program, secret: str, deadline: float) -> dict[str, object]:
    """One program's reward, how long it had its sandbox, and why it failed."""
    tests = tests_of(program, secret, deadline)
    judged = code.Judged(tests, program.source)
    reward = judged.reward()
    return {
        "kind": program.kind,
        "honest": program.honest,
        "reward": float(reward),
        "seconds": judged.seconds,
        "why": getattr(reward, "why", ""),
        "reason": getattr(reward, "reason", ""),
    }


def run(batch: list[Program], secret: str, deadline: float) -> tuple[list[dict[str, object]], list[int]]:
    """Judge one after the other; then which processes of the sandboxes are still there."""
    started: list[int] = []
    wait = Sandbox.wait_until_warm

    def waited(self: Sandbox) -> None:
        wait(self)
        started.append(self.pid)
        started.append(self._process.pid)

    Sandbox.wait_until_warm = waited  # type: ignore[method-assign]
    try:
        results = [judge(program, secret, deadline) for program in batch]
    finally:
        Sandbox.wait_until_warm = wait  # type: ignore[method-assign]
        code.close_pool()
    return results, [pid for pid in set(started) if _left(pid)]


def _left(pid: int) -> bool:
    """Is this still a process of a sandbox, running or a zombie?"""
    try:
        name = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")[0]
    except OSError:
        return False
    return name in ("bwrap", "python3", "python3.11") and os.getpid() in _ancestors(pid)


def _ancestors(pid: int) -> set[int]:
    found = {1}
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        found.add(pid)
    return found


def summary(results: list[dict], left: list[int], touched: list[str], deadline: float) -> dict:
    """The figures of a run."""
    over = sorted(float(r["seconds"]) - deadline for r in results)
    hostile, honest = ([r for r in results if r["honest"] is h] for h in (False, True))
    return {
        "programs": len(results),
        "kinds": len({r["kind"] for r in hostile}),
        "escapes": [r for r in hostile if r["reward"] > 0] + touched,
        "honest": len(honest),
        "honest_failed": [r for r in honest if r["reward"] != 1],
        "left_behind": len(left),
        "over_the_deadline_seconds": {
            "p50": over[len(over) // 2],
            "p99": over[int(len(over) * 0.99)],
            "p99.9": over[int(len(over) * 0.999)],
            "most": over[-1],
        },
        "latest": sorted(results, key=lambda r: -float(r["seconds"]))[:5],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--deadline", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        index, canary = json.loads(args.worker)
        canary["files"] = tuple(canary["files"])
        batch = programs(Canary(**canary), args.programs, args.seed)[index :: args.workers]
        results, left = run(batch, canary["secret"], args.deadline)
        print(json.dumps([results, left]))
        return
    trap, start = Trap(), time.monotonic()
    command = [sys.executable, "-m", "tests.sandbox.run_hostile"]
    command += ["--programs", str(args.programs), "--workers", str(args.workers)]
    command += ["--deadline", str(args.deadline), "--seed", str(args.seed), "--worker"]
    workers = [
        subprocess.Popen([*command, json.dumps([i, vars(trap.canary)])], stdout=subprocess.PIPE, text=True)
        for i in range(args.workers)
    ]
    answers = [json.loads(worker.communicate()[0]) for worker in workers]
    results = [r for found, _ in answers for r in found]
    report = summary(results, [pid for _, left in answers for pid in left], trap.close(), args.deadline)
    report |= {"uid": os.geteuid(), "load": os.getloadavg(), "cores": os.cpu_count(), "seed": args.seed}
    report["minutes"] = round((time.monotonic() - start) / 60, 2)
    print(json.dumps(report, indent=1))
    over = report["over_the_deadline_seconds"]
    good = not (report["escapes"] or report["honest_failed"] or report["left_behind"])
    sys.exit(0 if good and over["p99.9"] <= 0.5 and over["most"] <= 2 else 1)


if __name__ == "__main__":
    main()
