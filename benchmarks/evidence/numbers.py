"""From test cells to what the page says: means with intervals, fronts, tables."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.evidence import plan, sweep
from benchmarks.evidence.plan import Point
from benchmarks.evidence.rows import ROWS

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
# two-sided 95 % of Student's t by degrees of freedom
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NAMES = {
    "tb": "trajectory balance",
    "length_true": "length-true",
    "length_true_p": "length-true, its power p",
    "alpha": "trajectory balance, alpha",
    "tba": "TBA (log Z the group's mean)",
    "mara": "MARA on length-true",
    "paper": "FlowRL, raw rewards",
    "paper_normalised": "FlowRL as published",
    "paper_no_weight": "FlowRL, no weight",
    "paper_release": "FlowRL, weight at most 10",
    "paper_unclipped": "FlowRL, weight unbounded",
    "paper_group_log_z": "FlowRL, log Z the group's mean",
    "paper_slow_log_z": "FlowRL, slow log Z",
    "paper_no_log_z": "FlowRL, no log Z",
    "paper_sums": "FlowRL, sums for means",
    "paper_no_reference": "FlowRL, no reference",
    "rloo_kl_in_reward": "RLOO, KL in the reward",
    "rloo_k1_in_loss": "RLOO, k1 in the loss",
    "rloo_k2_in_loss": "RLOO, k2 in the loss",
    "rloo_k3_in_loss": "RLOO, k3 in the loss",
    "rloo_ratio_times_k3": "RLOO, ratio times k3",
    "rloo_entropy_in_reward": "RLOO, entropy in the reward",
    "vine": "VinePPO, KL in the reward",
    "ppo_kl_in_reward": "PPO, KL in the reward",
    "ppo_kl_in_loss": "PPO, k3 in the loss",
    "grpo": "GRPO, k3 in the loss",
    "grpo_kl_in_reward": "GRPO, KL in the reward",
    "grpo_entropy_bonus": "GRPO, entropy bonus",
    "dapo": "DAPO, entropy bonus",
    "top_entropy": "DAPO, top-entropy tokens",
    "sapo": "SAPO, k3 in the loss",
    "gmpo": "GMPO, k3 in the loss",
    "distinct_shapley": "distinct answers, shared credit",
    "distinct_alone": "distinct answers, lone credit",
}


class Estimate(NamedTuple):
    mean: float
    half: float  # of the 95 % interval over seeds, by Student's t

    def text(self) -> str:
        """`.905 ± .006`: as many digits as the interval has a use for."""
        digits = min(4, max(2, 1 - math.floor(math.log10(self.half)))) if self.half > 0 else 3
        return f"{_bare(self.mean, digits)} ± {_bare(self.half, digits)}"


def _bare(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def estimate(values: Sequence[float]) -> Estimate:
    n = len(values)
    mean = sum(values) / n
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, T95[n - 1] * deviation / math.sqrt(n))


def of(cells: list[dict], name: str) -> Estimate:
    return estimate([cell[name] for cell in cells])


def done(made: dict, **wanted: object) -> dict[Point, list[dict]]:
    """The points that have run and have these fields -> their test cells."""
    return {
        point: cells
        for point in plan.points()
        if all(getattr(point, name) == value for name, value in wanted.items())
        and (cells := sweep.cells_of(made, point))
    }


def front(points: dict[Point, list[dict]]) -> list[Point]:
    """Those whose mean accuracy and coverage no other's both exceed, by falling accuracy."""
    at = {point: (of(cells, "accuracy").mean, of(cells, "coverage").mean) for point, cells in points.items()}
    kept = [p for p, (a, c) in at.items() if not any(b >= a and d >= c and (b, d) != (a, c) for b, d in at.values())]
    return sorted(kept, key=lambda point: -at[point][0])


def best_of(made: dict, points: Iterable[Point], figure: str = "found_in_128") -> Point:
    """The point that finds most on the validation seeds, at the rate that they chose."""
    at = made["columns"].index(figure)

    def mean(point: Point) -> float:
        own = made["points"][point.key()]
        values = [row[at] for row in own["validation"] if row[0] == own["lr"]]
        return sum(values) / len(values)

    return max(points, key=mean)


def gap(cells: list[dict], others: list[dict], name: str) -> Estimate:
    """The difference over seeds, which are the same problems."""
    return estimate([a[name] - b[name] for a, b in zip(cells, others)])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def frontier_table(made: dict) -> str:
    """Each method at the dial that finds most on the validation seeds, best first."""
    every = done(made, part="frontier", task="sums")
    by_method: dict[str, list[Point]] = {}
    for point in every:
        by_method.setdefault(point.method, []).append(point)
    plain = every[best_of(made, by_method["tb"])]
    rows = []
    for method, own in by_method.items():
        best, row = best_of(made, own), ROWS[method]
        cells = every[best]
        rows.append((
            of(cells, "found_in_128").mean, NAMES[method], f"{row.dial} {best.dial:g}", f"{cells[0]['lr']:g}",
            *(of(cells, name).text() for name in ("found_in_128", "accuracy", "coverage")),
            "" if method == "tb" else gap(cells, plain, "found_in_128").text(), str(len(own)),
        ))  # fmt: skip
    rows.sort(reverse=True)
    head = ("method", "its dial", "rate", "found in 128", "accuracy", "coverage", "less trajectory balance",
            "dials tried")  # fmt: skip
    return table(head, [row[1:] for row in rows])


def match_table(made: dict) -> str:
    rows = []
    for task, name in (("sums", "Sums"), ("sums_of_any_length", "2 to 5 terms")):
        for point, cells in done(made, part="match", task=task).items():
            known = cells[0]["kl_own"] is not None
            error = of(cells, "log_z_error").text() if cells[0]["log_z_error"] is not None else ""
            rows.append((
                name, NAMES[point.method], of(cells, "kl_stated").text(),
                of(cells, "kl_own").text() if known else "", of(cells, "tv_stated").text(), error,
                of(cells, "accuracy").text(), of(cells, "coverage").text(),
            ))  # fmt: skip
    head = ("task", "method", "KL to the stated", "KL to its own", "total variation", "log Z off by", "accuracy",
            "coverage")  # fmt: skip
    return table(head, rows)


def aged_table(made: dict) -> str:
    every = done(made, part="old batches")
    ages = [(1, 0), (4, 0), (16, 0), (1, 1), (1, 4), (1, 16)]
    rows = []
    for method in dict.fromkeys(point.method for point in every):
        row = [NAMES[method]]
        for age in ages:
            cells = next((c for p, c in every.items() if p.method == method and (p.reuse, p.stale) == age), None)
            row.append(of(cells, "found_in_128").text() if cells else "")
        rows.append(row)
    return table(("method", "fresh", "4 a batch", "16 a batch", "1 stale", "4 stale", "16 stale"), rows)


def ablation_table(made: dict) -> str:
    """The paper's row at beta 1 and without its parts, one at a time."""
    rows = []
    plain = done(made, part="frontier", method="paper", dial=1.0)
    for point, cells in {**plain, **done(made, part="ablation")}.items():
        own = of(cells, "kl_own").text() if cells[0]["kl_own"] is not None else ""
        rows.append((
            f"{NAMES[point.method]}, beta {point.dial:g}",
            *(of(cells, name).text() for name in ("found_in_128", "accuracy", "coverage")), own,
        ))  # fmt: skip
    return table(("method", "found in 128", "accuracy", "coverage", "KL to its own"), rows)


def beta_table(made: dict) -> str:
    rows = [
        (f"{point.dial:g}", *(of(cells, name).text() for name in ("accuracy", "coverage", "found_in_128", "kl_stated")))
        for point, cells in done(made, part="frontier", method="paper_normalised").items()
    ]
    return table(("beta", "accuracy", "coverage", "found in 128", "KL to the stated"), rows)


def completions_table(made: dict) -> str:
    rows = []
    for samples, name in ((6, "60 rollouts a prompt and update, as the others"), (64, "64 responses, 640 rollouts")):
        for point, cells in done(made, part="completions", samples=samples).items():
            found = (of(cells, figure).text() for figure in ("found_in_128", "accuracy", "coverage"))
            rows.append((name, f"{point.dial:g}", *found))
    return table(("VinePPO", "weight", "found in 128", "accuracy", "coverage"), rows)


def norms_table(made: dict) -> str:
    """Synthetic: medians over batches, and how far the largest lies above, at a drift of .03 nats a token."""
    from benchmarks.evidence.gradient_norms import LENGTHS, OUT

    known = {(r["length"], r["case"]): r for r in json.loads(OUT.read_text())["rows"] if r["drift"] == 0.03}
    rows = []
    for length in LENGTHS:
        row = [str(length)]
        for weight in ("none", "paper", "release", "unclipped"):
            own = known[length, f"{weight}, log Z at its start"]
            row.append(f"{own['policy_median']:.2g} ({own['policy_max'] / own['policy_median']:.2g}x)")
        at = known[length, "none, log Z at its optimum"]
        rows.append((*row, f"{at['policy_median']:.2g}", f"{at['log_z_median']:.2g}"))
    head = ("tokens", "no weight", "paper's", "release's", "unclipped", "no weight, log Z at its optimum",
            "log Z's own gradient there")  # fmt: skip
    return table(head, rows)


def held_out_tables(which: str) -> Callable[[dict], str]:
    """Of held_out.json."""

    def made(_: dict) -> str:
        from benchmarks.evidence import held_out_numbers

        return held_out_numbers.test_table() if which == "test" else held_out_numbers.dials_table()

    return made


def transformer_table(made: dict) -> str:
    """Of transformer.json: before the first update, and after the last."""
    from benchmarks.evidence.transformer import FIGURES, OUT

    run = json.loads(OUT.read_text())
    head = ("", "KL to the target", "accuracy", "coverage", "log Z", "log Z off by")
    return table(head, [(at, *(f"{run[at][name]:.3f}" for name in FIGURES)) for at in ("start", "end")])


TABLES: dict[str, Callable[[dict], str]] = {
    "frontier": frontier_table, "match": match_table, "aged": aged_table, "ablation": ablation_table,
    "beta": beta_table, "completions": completions_table, "norms": norms_table,
    "transformer": transformer_table, "held out": held_out_tables("test"), "held out dials": held_out_tables("dials"),
}  # fmt: skip


def with_tables(page: str, made: dict) -> str:
    """The page with what stands between `<!-- table NAME -->` and `<!-- end -->` made anew."""
    for name, make in TABLES.items():
        before, mark, rest = page.partition(f"<!-- table {name} -->")
        if not mark:
            raise ValueError(f"page: wanted a mark <!-- table {name} -->; got none")
        _, end, after = rest.partition("<!-- end -->")
        page = f"{before}{mark}\n{make(made)}\n{end}{after}"
    return page
