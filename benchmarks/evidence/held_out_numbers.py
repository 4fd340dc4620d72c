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


def tests_of(made: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """A method's test cells, by seed; none while one is missing."""
    if made["chosen"] is None:
        return []
    cells = [cell for cell in plan.held_out_test(made["chosen"]) if cell.method == method]
    return [made["cells"][cell.key()] for cell in cells] if all(c.key() in made["cells"] for c in cells) else []


def of(results: list[dict[str, Any]], figure: Figure) -> Estimate:
    return over_both([figure(result) for result in results])


def gap(results: list[dict[str, Any]], others: list[dict[str, Any]], figure: Figure) -> Estimate:
    """The difference, each problem and seed beside itself."""
    pairs = zip(results, others)
    return over_both([[x - y for x, y in zip(figure(a), figure(b))] for a, b in pairs])


def test_table() -> str:
    """The chosen dials on the test seeds and the test split, most found first; the start above them."""
    made = held_out.made_so_far(held_out.OUT)
    plain = tests_of(made, "tb")
    rows = []
    for method in plan.HELD_OUT:
        results = tests_of(made, method)
        if not results or not plain:
            continue
        rows.append((
            of(results, found).mean, f"{NAMES[method]}, {made['chosen'][method]:g}",
            *(of(results, figure).text() for figure in (passed(1), passed(8), passed(128), distinct, found)),
            *("" if method == "tb" else gap(results, plain, figure).text() for figure in (passed(1), found)),
        ))  # fmt: skip
    rows.sort(reverse=True)
    lines = [row[1:] for row in rows]
    if "start" in made:
        start = made["start"]
        shares = (held_out.mean(figure(start)) for figure in (passed(1), passed(8), passed(128), distinct, found))
        lines.insert(0, ("the start", *(f"{share:.3f}".replace("0.", ".", 1) for share in shares), "", ""))
    head = ("method, its dial", "pass@1", "pass@8", "pass@128", "different solutions in 128", "found in 128",
            "pass@1 less tb", "found in 128 less tb")  # fmt: skip
    return table(head, lines)


def dials_table() -> str:
    """The valid split and one seed: what the dials were chosen by."""
    made = held_out.made_so_far(held_out.OUT)
    rows = []
    for method, dials in plan.HELD_OUT.items():
        row = [NAMES[method]]
        for dial in dials:
            cell = plan.HeldOut(method, dial, plan.HELD_OUT_VALIDATION, "valid")
            result = made["cells"].get(cell.key())
            if result is None:
                row.append("")
                continue
            text = f"{dial:g}: {result['pass']['1']:.3f}, {result['found_in_128']:.3f}".replace("0.", ".")
            row.append(f"**{text}**" if made["chosen"] and made["chosen"][method] == dial else text)
        rows.append(row)
    return table(("method", "one dial: pass@1, found in 128", "another", "the third"), rows)
