"""`python -m benchmarks.evidence [--only TASK:METHOD] [--out FILE.json]`: the short cells, each in under a minute.

Exit 1 where a cell does not reach what is claimed for it. The list is fixed before it runs; seeds, rates and wall times
are in the JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.evidence.learn import Cell, run
from benchmarks.machine import describe

# (cell, the most that its figures may be)
REACHES = {"kl_stated": 0.01, "log_z_error": 0.05}
SHORT = [
    (Cell("sums", "tb", 5.0, 0.05, 0, 1500, 128), REACHES),
    (Cell("sums", "length_true", 5.0, 0.05, 0, 1500, 128), REACHES),
    (Cell("sums_of_any_length", "tb", 5.0, 0.05, 0, 2500, 256), REACHES),
    (Cell("sums_of_any_length", "length_true", 5.0, 0.05, 0, 2500, 256), REACHES),
    (Cell("sums", "rloo_kl_in_reward", 0.2, 0.05, 0, 1500, 128), {"kl_stated": 0.01}),
    (Cell("sums", "paper", 5.0, 0.1, 0, 1500, 128), {}),
    (Cell("sums", "grpo", 0.001, 0.05, 0, 1500, 128), {}),
]
COLUMNS = ("accuracy", "coverage", "kl_stated", "kl_own", "log_z_error", "seconds")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--only", default="", help="TASK:METHOD of one cell")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    given = parser.parse_args(arguments)
    cells = [(c, most) for c, most in SHORT if given.only in ("", f"{c.task}:{c.method}")]
    if not cells:
        parser.error(f"--only: wanted one of {', '.join(f'{c.task}:{c.method}' for c, _ in SHORT)}; got {given.only!r}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(2, len(cells)), context, torch.set_num_threads, (1,)) as pool:
        made = list(pool.map(run, [cell for cell, _ in cells]))
    print(f"{'task':20s} {'method':18s} {'dial':>6s} " + " ".join(f"{name:>11s}" for name in COLUMNS))
    missed = []
    for (cell, most), result in zip(cells, made):
        figures = " ".join(f"{result[name]:11.4f}" if name in result else f"{'-':>11s}" for name in COLUMNS)
        print(f"{cell.task:20s} {cell.method:18s} {cell.dial:6g} {figures}")
        missed += [
            f"{cell.task}, {cell.method}: {name} is {result[name]:.4f}, claimed at most {bound}"
            for name, bound in most.items()
            if not result[name] <= bound
        ]
    if given.out:
        given.out.write_text(json.dumps({"machine": describe("cpu"), "cells": made}, indent=1) + "\n")
    for line in missed:
        print(line, file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
