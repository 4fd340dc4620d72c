"""FlowRL and the baselines one after the other on one configuration, then one table and one overlaid plot."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowrl_kernels.trainer.metrics import print_table, read_lines

# name -> what it changes in the configuration. The baselines' learning rates are each the best of those tried on
# Sums (docs/tasks.md); by 1200 steps GRPO and PPO have stopped gaining. An override on the command line wins.
ALGORITHMS: dict[str, tuple[str, ...]] = {
    "flowrl": (),
    "grpo": ("--algorithm.name", "grpo", "--optim.lr", "2.5e-4", "--run.steps", "1200"),
    "ppo": ("--algorithm.name", "ppo", "--optim.lr", "2e-4", "--run.steps", "1200"),
    "reinforce_pp": ("--algorithm.name", "reinforce_pp", "--optim.lr", "2e-4", "--run.steps", "1200"),
}
COLUMNS = {
    "accuracy": ("exact_accuracy", "accuracy"),
    "distinct": ("distinct",),
    "distinct share": ("distinct_share",),
    "effective modes": ("exact_modes", "effective_modes"),
    "modes share": ("exact_modes_share", "effective_modes_share"),
    "KL to optimum": ("exact_kl",),
}


def row_of(folder: Path, name: str) -> dict[str, Any]:
    """One line of the table from a finished run folder. Raises ValueError where the run wrote no final
    figures.
    """
    lines = read_lines(folder / "metrics.jsonl")
    final = [line for line in lines if line.get("kind") == "final"]
    if not final:
        raise ValueError(f"{folder} has no final figures: the run did not end")
    return {"run": name, **_figures(final[-1])}


def start_row(folder: Path) -> dict[str, Any] | None:
    """The same line for the warm start, from the test evaluation before the first update, where there is
    one.
    """
    lines = read_lines(folder / "metrics.jsonl", "eval")
    start = [line for line in lines if line["step"] == 0 and line.get("split") == "test"]
    return {"run": "warm start", **_figures(start[-1])} if start else None


def _figures(line: dict[str, Any]) -> dict[str, Any]:
    figures = {}
    for title, keys in COLUMNS.items():
        figures[title] = next((line[key] for key in keys if line.get(key) is not None), None)
        if title == "accuracy":
            largest = max((int(key[5:]) for key in line if key.startswith("pass@")), default=0)
            figures |= {f"pass@{k}": line.get(f"pass@{k}") for k in (8, largest) if f"pass@{k}" in line}
    return {title: value for title, value in figures.items() if value is not None}


def main(argv: Sequence[str]) -> int:
    """`compare FILE.toml [--out FOLDER] [--only NAME ...] [--section.field value ...]`.

    Every algorithm is a run of its own process in OUT/NAME, with the same configuration but for its own
    settings and the overrides, which apply to all. Prints the table, writes it to OUT/compare.json and
    overlays the runs' plots in OUT/plots. Returns 1 if a run failed (the others are still shown).
    """
    parser = argparse.ArgumentParser(prog="flowrl compare", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("config", help="TOML file of the runs")
    parser.add_argument("--out", default="runs/compare", help="folder of the runs (default: runs/compare)")
    parser.add_argument("--only", nargs="+", choices=list(ALGORITHMS), default=list(ALGORITHMS))
    args, overrides = parser.parse_known_args(argv)
    out = Path(args.out)
    rows: list[dict[str, Any]] = []
    runs: list[Path] = []
    failed = False
    for name in args.only:
        folder = out / name
        command = [sys.executable, "-m", "flowrl_kernels.trainer", "train", args.config]
        command += ["--run.dir", str(folder), "--run.overwrite", "True", *ALGORITHMS[name], *overrides]
        print(f"--- {name}: {' '.join(command[1:])}", flush=True)
        begin = time.monotonic()
        code = subprocess.run(command, check=False).returncode
        if code:
            print(f"--- {name} failed with exit code {code}", file=sys.stderr)
            failed = True
            continue
        if not runs and (start := start_row(folder)):
            rows.append(start)
        runs.append(folder)
        rows.append({**row_of(folder, name), "minutes": (time.monotonic() - begin) / 60})
    if rows:
        print_table(f"{args.config}: the test split", rows)
        (out / "compare.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        from flowrl_kernels.trainer.plot import plot_runs

        print(plot_runs(runs, out / "plots")[-1])
    return int(failed)
