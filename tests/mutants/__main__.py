"""`python -m tests.mutants`: break the source in one place, run the tests named for it, and see them fail.

Torch and what is slow to import beside it is loaded once; every mutant is a fork of this process on a copy of the
tree, which itself is never touched. Exit 1 where a change went unseen, a row no longer fits its file, or a named test
fails without any change.
"""

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 240  # seconds for the tests of one mutant
PARTS = (
    "flowrl_kernels",
    "tests",
    "configs",
    "examples",
    "pyproject.toml",
    "README.md",
    "docs",
    "benchmarks",
    "Makefile",
)
OUTCOMES = {0: "survived", 1: "killed"}
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONDONTWRITEBYTECODE="1")
sys.dont_write_bytecode = True  # two mutants of one file may have the same size and second


def preload():
    import importlib

    for name in (
        "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "numpy", "hypothesis",
        "pytest", "transformers", "transformers.models.qwen2.modeling_qwen2", "tomli_w", "rich.console", "rich.table",
    ):  # fmt: skip
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert "flowrl_kernels" not in sys.modules


def copy_tree(to):
    to.mkdir()
    skip = shutil.ignore_patterns("__pycache__", "*.so", ".*_cache", "results")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=skip)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, to / name)


def start(tree, tests, log):
    """Fork a process that runs `tests` on the copy `tree`; its id."""
    if pid := os.fork():
        return pid
    code = 70
    try:
        os.setsid()
        os.chdir(tree)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        sys.path[:] = [str(tree), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        os.environ["PYTHONPATH"] = str(tree)
        import pytest

        import flowrl_kernels

        assert Path(flowrl_kernels.__file__).is_relative_to(tree), flowrl_kernels.__file__
        ids = [str(tree / "tests" / test) for test in tests]
        code = pytest.main(["-x", "-q", "-n", "0", "-m", "", "-p", "no:cacheprovider", "--rootdir", str(tree), *ids])
        sys.stdout.flush()
    finally:
        os._exit(int(code))


def gone(pid, since):
    """Exit code of a finished process, "too long" of one that was stopped, None of one that still runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        return os.waitstatus_to_exitcode(status)
    if time.monotonic() - since < LIMIT:
        return None
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "too long"


class Refused(Exception):
    pass


def apply(tree, mutant):
    """Changes the copy; returns how to undo it."""
    path = tree / "flowrl_kernels" / mutant.file
    if not path.is_file():
        raise Refused(f"there is no {mutant.file}")
    text = path.read_text()
    if (found := text.count(mutant.old)) != 1:
        raise Refused(f"the old text occurs {found} times in {mutant.file}")
    path.write_text(text.replace(mutant.old, mutant.new))
    return lambda: path.write_text(text)


def run(jobs, trees, folder, report):
    """jobs: (label, tests, mutant or None). Calls report(label, outcome, seconds, log)."""
    waiting, free, live = list(jobs)[::-1], list(trees), {}
    numbers = itertools.count()
    while waiting or live:
        while waiting and free:
            label, tests, mutant = waiting.pop()
            undo = None
            if mutant is not None:
                try:
                    undo = apply(free[-1], mutant)
                except Refused as why:
                    report(label, str(why), 0.0, None)
                    continue
            tree, log = free.pop(), folder / f"log_{next(numbers)}.txt"
            live[start(tree, tests, log)] = (label, tree, undo, log, time.monotonic())
        for pid, (label, tree, undo, log, since) in list(live.items()):
            code = gone(pid, since)
            if code is None:
                continue
            del live[pid]
            if undo is not None:
                undo()
            free.append(tree)
            report(label, OUTCOMES.get(code, f"no result ({code})"), time.monotonic() - since, log)
        time.sleep(0.02)


def tail(log, lines=12):
    return "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-lines:]) if log else ""


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="names, or parts of them or of their file; all if left out")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    from tests.mutants.table import MUTANTS

    chosen = [m for m in MUTANTS if not options.only or any(o in f"{m.name} {m.file}" for o in options.only)]
    began = time.monotonic()
    preload()
    bad = []
    with tempfile.TemporaryDirectory(prefix="mutants_") as name:
        folder = Path(name).resolve()
        trees = [folder / f"tree_{i}" for i in range(options.workers)]
        for tree in trees:
            copy_tree(tree)
        files = {}
        for mutant in chosen:
            for test in mutant.tests:
                files.setdefault(test.split("::")[0], {})[test] = None
        failing = []

        def unchanged(label, outcome, seconds, log):
            if outcome != "survived":
                failing.append(label)
                print(
                    f"without any change: {label}: {'failed' if outcome == 'killed' else outcome}\n{tail(log)}",
                    flush=True,
                )

        run([(file, list(tests), None) for file, tests in files.items()], trees, folder, unchanged)
        width = max(len(m.name) for m in chosen)
        killed = 0

        def changed(label, outcome, seconds, log):
            nonlocal killed
            killed += outcome == "killed"
            print(f"{label.name:<{width}}  {label.file:<32} {outcome:<10} {seconds:5.1f} s", flush=True)
            if outcome != "killed":
                bad.append(label.name)
                if log and outcome != "survived":
                    print(tail(log), flush=True)

        jobs = [(m, m.tests, m) for m in chosen if not any(t.split("::")[0] in failing for t in m.tests)]
        for m in chosen:
            if any(t.split("::")[0] in failing for t in m.tests):
                changed(m, "unproved: its tests fail as they are", 0.0, None)
        run(jobs, trees, folder, changed)
    print(f"{killed} killed, {len(chosen) - killed} survived or unproved, {time.monotonic() - began:.0f} s")
    if bad:
        print("not killed: " + "; ".join(bad))
    return 1 if bad or failing else 0


if __name__ == "__main__":
    sys.exit(main())
