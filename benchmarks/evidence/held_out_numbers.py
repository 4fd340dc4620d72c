"""From held_out.json to what the page says: paired intervals over problems and seeds, tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.evidence import held_out, plan
from benchmarks.evidence.numbers import NAMES, Estimate, table
from flowrl_kernels.trainer.suites.figures import t_quantile

Figure = Callable[[dict[str, Any]], list[float]]  # a cell's result -> one number a problem


def passed(k: int) -> Figure:
    return lambda result: [held_out.at_least_one(p, k) for p in result["accuracy_of"]]


def distinct(result: dict[str, Any]) -> list[float]:
    return result["distinct_at_128_of"]


def found(result: dict[str, Any]) -> list[float]:
    return [d / n for d, n in zip(result["distinct_at_128_of"], result["solutions_of"])]


def over_both(rows: Sequence[Sequence[float]]) -> Estimate:
    """The mean of rows [seeds][problems] with a 95 % interval for other seeds and other problems.

    The variance of the seeds' means over their number, plus that of the problems' means over theirs: each holds the
    noise of single runs on single problems, so that is counted twice and the interval is a little wide. Student's t at
    the degrees of freedom of Satterthwaite (1946), rounded down.
    """
    seeds, problems = len(rows), len(rows[0])
    of_seed = [held_out.mean(row) for row in rows]
    of_problem = [held_out.mean(column) for column in list(zip(*rows))]
    mean = held_out.mean(of_seed)
    a = sum((x - mean) ** 2 for x in of_seed) / (seeds - 1) / seeds
    b = sum((x - mean) ** 2 for x in of_problem) / (problems - 1) / problems
    if a + b == 0:
        return Estimate(mean, 0.0)
    freedom = (a + b) ** 2 / (a**2 / (seeds - 1) + b**2 / (problems - 1))
    return Estimate(mean, t_quantile(0.975, max(1, int(freedom))) * math.sqrt(a + b))


AIMS = {"found_in_128": "found in 128", "pass_1": "pass@1"}


def tests_of(made: dict[str, Any], aim: str, method: str) -> list[dict[str, Any]]:
    """A method's test cells at the dial that an aim chose, by seed; none while one is missing."""
    if made["chosen"] is None:
        return []
    cells = [cell for cell in plan.held_out_test(made["chosen"][aim]) if cell.method == method]
    return [made["cells"][cell.key()] for cell in cells] if all(c.key() in made["cells"] for c in cells) else []


def of(results: list[dict[str, Any]], figure: Figure) -> Estimate:
    return over_both([figure(result) for result in results])


def gap(results: list[dict[str, Any]], others: list[dict[str, Any]], figure: Figure) -> Estimate:
    """The difference, each problem and seed beside itself."""
    pairs = zip(results, others)
    return over_both([[x - y for x, y in zip(figure(a), figure(b))] for a, b in pairs])


def gained(results: list[dict[str, Any]], start: dict[str, Any], figure: Figure) -> Estimate:
    """What training changed, each problem beside itself at the start."""
    return gap(results, [start] * len(results), figure)


FIGURES: tuple[Figure, ...] = (passed(1), passed(8), passed(128), distinct, found)


def test_table() -> str:
    """The chosen dials on the test seeds and the test split, by aim and as the plan has them; the start above them."""
    made = held_out.made_so_far(held_out.OUT)
    start = (f"{held_out.mean(figure(made['starts']['test'])):.3f}".removeprefix("0") for figure in FIGURES)
    rows = [("", "the start", *start, "", "")]
    for aim, name in AIMS.items():
        plain = tests_of(made, aim, "tb")
        for method in plan.HELD_OUT:
            results = tests_of(made, aim, method)
            if not results or not plain:
                continue
            gaps = ("" if method == "tb" else gap(results, plain, figure).text() for figure in (passed(1), found))
            label = f"{NAMES[method]}, {made['chosen'][aim][method]:g}"
            rows.append((name, label, *(of(results, figure).text() for figure in FIGURES), *gaps))
    head = ("dial chosen by", "method, its dial", "pass@1", "pass@8", "pass@128", "different in 128", "found in 128",
            "pass@1 less tb's", "found in 128 less tb's")  # fmt: skip
    return table(head, rows)


def dials_table() -> str:
    """The valid split and one seed: what the dials were chosen by."""
    made = held_out.made_so_far(held_out.OUT)
    start = made["starts"]["valid"]
    aims = ("pass_1", "found_in_128")
    at_start = ", ".join(f"{held_out.figure(start, aim):.3f}".removeprefix("0") for aim in aims)
    rows = [["the start", at_start, "", ""]]
    for method, dials in plan.HELD_OUT.items():
        row = [NAMES[method]]
        for dial in dials:
            cell = plan.HeldOut(method, dial, plan.HELD_OUT_VALIDATION, "valid")
            result = made["cells"].get(cell.key())
            if result is None:
                row.append("")
                continue
            texts = [f"{held_out.figure(result, aim):.3f}".removeprefix("0") for aim in aims]
            for i, aim in enumerate(aims):
                texts[i] = f"**{texts[i]}**" if made["chosen"] and made["chosen"][aim][method] == dial else texts[i]
            row.append(f"{dial:g}: {', '.join(texts)}")
        rows.append(row)
    return table(("method", "one dial: pass@1, found in 128", "another", "the third"), rows)
