"""Two results of `flowrl eval --suite` on the same problems: the paired difference, with an interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowrl_kernels.trainer import fingerprint, report
from flowrl_kernels.trainer.evaluate import powers_of_two
from flowrl_kernels.trainer.suites import run
from flowrl_kernels.trainer.suites.figures import Difference, Outcome, paired, passes
from flowrl_kernels.trainer.terminal import Cell, Terminal


def outcomes_of(folder: Path, part: dict[str, Any]) -> dict[str, Outcome]:
    """{problem's hash: its outcome} of a suite's JSONL file. Raises ValueError where it is not what was written."""
    path = folder / part["outcomes"]
    if not path.is_file() or fingerprint.of_file(path) != part["sha256"]:
        raise ValueError(f"{path}: missing, or not what {folder / run.RESULTS} was made of")
    rows = [Outcome.read(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    found: dict[str, Outcome] = {}
    for row in rows:  # a problem that stands in the data twice is two problems
        copy = row.problem
        while copy in found:
            copy += "'"
        found[copy] = row
    return found


def differences(first: Path, second: Path) -> dict[str, dict[str, Difference]]:
    """{suite: {"avg" or "pass@k": second - first}} of the suites that both folders hold.

    Raises ValueError where they share no suite, or a suite's problems differ by their hashes.
    """
    results = [run.read(folder) for folder in (first, second)]
    names = [name for name in results[0]["suites"] if name in results[1]["suites"]]
    if not names:
        raise ValueError(f"--compare: {first} and {second} have no suite in common")
    found = {}
    for name in names:
        a, b = (outcomes_of(path, result["suites"][name]) for path, result in zip((first, second), results))
        if a.keys() != b.keys():
            only = len(a.keys() - b.keys()), len(b.keys() - a.keys())
            raise ValueError(
                f"--compare: suite {name!r} was asked other problems: by their hashes {only[0]} of {len(a)} are only "
                f"in {first}, {only[1]} of {len(b)} only in {second}"
            )
        both = [problem for problem in a if a[problem].scored and b[problem].scored]
        rows = [[side[problem] for problem in both] for side in (a, b)]
        if not both:
            raise ValueError(f"--compare: suite {name!r} has no problem that could be scored on both sides")
        found[name] = {"avg": paired(*([row.rate for row in side] for side in rows))}
        for k in powers_of_two(min(len(row.correct) for side in rows for row in side))[1:]:
            values = [passes(side, k) for side in rows]
            if values[0] is not None and values[1] is not None:
                found[name][f"pass@{k}"] = paired(values[0], values[1])
    return found


def contrast(first: str, second: str, out: str | None = None) -> dict[str, dict[str, Difference]]:
    """Prints `differences`, and writes them to a JSON file where one is named."""
    folders = [Path(name).expanduser() for name in (first, second)]
    found = differences(*folders)
    lines: list[dict[str, Cell]] = []
    for name, figures in found.items():
        for figure, d in figures.items():
            line: dict[str, Cell] = {"suite": name, "figure": figure, "difference": f"{d.mean:+.3f}", "se": d.se}
            line |= {"95 % interval": f"{d.low:+.3f} to {d.high:+.3f}"}
            lines.append(line | {"better": d.better, "worse": d.worse, "problems": d.problems})
    Terminal().table(f"{second} minus {first}, paired by problem", lines)
    keys = [run.read(folder)["suites"] for folder in folders]
    for name in found:
        before, after = (dict(part[name]["key"], weights="", tokenizer="") for part in keys)
        if before != after:
            print(f"{name}: the two were evaluated with {run.differs(before, after)}")
    if out is not None:
        written = {name: {k: d._asdict() for k, d in figures.items()} for name, figures in found.items()}
        print(report.save(Path(out).expanduser(), {"first": first, "second": second, "suites": written}))
    return found
