"""`python -m benchmarks.evidence [short] [--out FILE.json]`: cells that must reach what is claimed for them (CI).
`... sweep [--minutes N] [--only TEXT]`: the points of plan.py that frontier.json lacks, each written when it is done.
`... held-out [--minutes N] [--scratch FOLDER]`: the trainer's cells on held-out Countdown that held_out.json lacks.
`... transformer [--scratch FOLDER]`: trajectory balance on the transformer of configs/sums.toml (a quarter of an hour).
`... pictures`: the pictures and tables of docs/evidence.md from the JSON files.

`short` ends with 1 where a cell does not reach its claim, `sweep` and `held-out` where some are still missing,
`transformer` where its claim fails.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.evidence import sweep
from benchmarks.evidence.learn import Cell, run
from benchmarks.machine import describe

# (cell, the most that its figures may be)
REACHES = {"kl_stated": 0.01, "log_z_error": 0.05}
SHORT = [
    (Cell("sums", "tb", 5.0, 0.1, 0, 1200, 128), REACHES),
    (Cell("sums", "length_true", 5.0, 0.1, 0, 1200, 128), REACHES),
    (Cell("sums_of_any_length", "tb", 5.0, 0.05, 0, 2500, 256), REACHES),
    (Cell("sums_of_any_length", "length_true", 5.0, 0.05, 0, 2500, 256), REACHES),
    (Cell("sums", "rloo_kl_in_reward", 0.2, 0.1, 0, 1200, 128), {"kl_stated": 0.01}),
    (Cell("sums", "paper", 5.0, 0.1, 0, 1200, 128), {}),
    (Cell("sums", "grpo", 0.003, 0.05, 0, 1200, 128), {}),
]
FIGURES = ("accuracy", "coverage", "kl_stated", "kl_own", "log_z_error", "seconds")


def short(out: Path | None) -> int:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, torch.set_num_threads, (1,)) as pool:
        made = list(pool.map(run, [cell for cell, _ in SHORT]))
    print(f"{'task':20s} {'method':18s} {'dial':>6s} " + " ".join(f"{name:>11s}" for name in FIGURES))
    missed = []
    for (cell, most), result in zip(SHORT, made):
        figures = " ".join(f"{result[name]:11.4f}" if name in result else f"{'-':>11s}" for name in FIGURES)
        print(f"{cell.task:20s} {cell.method:18s} {cell.dial:6g} {figures}")
        missed += [
            f"{cell.task}, {cell.method}: {name} is {result[name]:.4f}, claimed at most {bound}"
            for name, bound in most.items()
            if not result[name] <= bound
        ]
    if out:
        out.write_text(json.dumps({"machine": describe("cpu"), "cells": made}, indent=1) + "\n")
    for line in missed:
        print(line, file=sys.stderr)
    return bool(missed)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=("short", "sweep", "held-out", "transformer", "pictures"), default="short"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the short cells' results")
    parser.add_argument("--minutes", type=float, default=240.0, help="of the sweep, after which no point is begun")
    parser.add_argument("--scratch", type=Path, default=Path("runs/evidence"), help="folder for the trainer's runs")
    parser.add_argument("--only", default="", help="points whose name has this in it")
    given = parser.parse_args(arguments)
    if given.what == "short":
        return short(given.out)
    if given.what == "pictures":
        from benchmarks.evidence import pictures

        pictures.make()
        return 0
    if given.what == "transformer":
        from benchmarks.evidence import transformer

        return transformer.make(given.scratch / "transformer")
    if given.what == "held-out":
        from benchmarks.evidence import held_out

        torch.set_num_threads(1)
        done, of = held_out.make(held_out.OUT, given.scratch / "held-out", given.minutes)
        print(f"{done} of {of} cells are in {held_out.OUT.name}")
        return int(done < of)
    done, of = sweep.sweep(sweep.FRONTIER, given.minutes, given.only)
    print(f"{done} of {of} points are in {sweep.FRONTIER.name}")
    return int(done < of)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
