"""Runs the points of plan.py one after another, chooses rates on validation seeds, and keeps all of it in one JSON.

Each point is written when it is done; what is there already is not run again. A row is [lr, seed, figures...] in the
order of `columns`; `seconds` are a cell's share of its processor time.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.evidence import plan
from benchmarks.evidence.learn import run_together
from benchmarks.evidence.plan import AIMS, Point
from benchmarks.evidence.rows import ROWS
from benchmarks.machine import describe

FRONTIER = Path(__file__).parent / "frontier.json"
COLUMNS = (
    "lr", "seed", "accuracy", "coverage", "found_in_128", "kl_stated", "tv_stated", "kl_own", "log_z_error", "length",
    "seconds",
)  # fmt: skip


def made_so_far(path: Path) -> dict:
    if path.exists():
        return json.loads(path.read_text())
    return {"columns": COLUMNS, "validation": plan.VALIDATION, "test": plan.TEST, "rates": plan.RATES, "points": {}}


def row_of(result: dict) -> list[float | None]:
    return [_short(result.get(name)) for name in COLUMNS]


def _short(value: float | None) -> float | None:
    """Five digits, or None for what is not there or not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def best_rate(rows: list[list], aim: str) -> float:
    """The rate whose mean of `aim` over the validation seeds is best; a run that is not finite rules its rate out."""
    at, sign = COLUMNS.index(aim), 1.0 if AIMS[aim] else -1.0
    means = {}
    for lr in {row[0] for row in rows}:
        values = [row[at] for row in rows if row[0] == lr]
        means[lr] = -math.inf if None in values else sign * sum(values) / len(values)
    return max(sorted(means), key=lambda lr: means[lr])


def run_points(points: Sequence[Point]) -> list[dict]:
    """Points that differ in their dial alone."""
    validation = _run(points, [plan.RATES] * len(points), plan.VALIDATION)
    best = [best_rate(rows, point.aim) for point, rows in zip(points, validation)]
    test = _run(points, [(lr,) for lr in best], plan.TEST)
    return [{"lr": lr, "validation": v, "cells": t} for lr, v, t in zip(best, validation, test)]


def _run(points: Sequence[Point], rates: Sequence[tuple[float, ...]], seeds: tuple[int, ...]) -> list[list]:
    cells = [point.cells(own, seeds) for point, own in zip(points, rates)]
    made = iter(run_together([cell for own in cells for cell in own]))
    return [[row_of(next(made)) for _ in own] for own in cells]


def together(points: Iterable[Point]) -> list[list[Point]]:
    """Points that may run side by side, in order."""
    made: dict[Point, list[Point]] = {}
    for point in points:
        made.setdefault(replace(point, dial=0.0) if ROWS[point.method].mixes else point, []).append(point)
    return list(made.values())


def sweep(path: Path, minutes: float, only: str = "") -> tuple[int, int]:
    """Runs what is missing, in the plan's order, until `minutes` have gone; (points done, points of the plan)."""
    torch.set_num_threads(1)
    made, ends = made_so_far(path), time.monotonic() + 60 * minutes
    wanted = [point for point in plan.points() if only in point.key()]
    for points in together(point for point in wanted if point.key() not in made["points"]):
        if time.monotonic() > ends:
            break
        for point, result in zip(points, run_points(points)):
            made["points"][point.key()] = result
            print(f"{point.key()}: lr {result['lr']}", flush=True)
        made["machine"] = describe("cpu")
        write(path, made)
    return sum(point.key() in made["points"] for point in wanted), len(wanted)


def write(path: Path, made: dict) -> None:
    """Whole or not at all; a row of figures a line."""
    head = {name: value for name, value in made.items() if name != "points"}
    lines = []
    for key, point in made["points"].items():
        rows = {name: ",\n   ".join(map(json.dumps, point[name])) for name in ("validation", "cells")}
        lines.append(
            f'  {json.dumps(key)}: {{"lr": {point["lr"]}, "validation": [\n   {rows["validation"]}],\n'
            f'   "cells": [\n   {rows["cells"]}]}}'
        )
    text = json.dumps(head, indent=1).removesuffix("\n}") + ',\n "points": {\n' + ",\n".join(lines) + "\n }\n}\n"
    json.loads(text)
    beside = path.with_suffix(".part")
    beside.write_text(text)
    os.replace(beside, path)


def cells_of(made: dict, point: Point) -> list[dict[str, float]]:
    """A point's test cells as dictionaries; none where it has not run."""
    rows = made["points"].get(point.key(), {}).get("cells", [])
    return [dict(zip(made["columns"], row)) for row in rows]


def seconds(made: dict) -> float:
    at = made["columns"].index("seconds")
    return sum(row[at] for point in made["points"].values() for name in ("validation", "cells") for row in point[name])
