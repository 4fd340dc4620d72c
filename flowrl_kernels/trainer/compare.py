"""FlowRL and the baselines one after the other on one configuration, then one table and one overlaid plot."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from flowrl_kernels.trainer import config_file, parallel, run_folder
from flowrl_kernels.trainer.config import AlgorithmName, Config, check
from flowrl_kernels.trainer.log import read_lines
from flowrl_kernels.trainer.terminal import Terminal

METHODS = ("flowrl", "grpo", "ppo", "reinforce_pp")  # of a file that names none in [compare.NAME] tables
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


def configs(file: str, only: Sequence[str] | None, args: list[str], out: Path) -> dict[str, Config]:
    """{name: the whole configuration of its run}: the file's settings, changed by its [compare.NAME], then by `args`.

    A table may be called as an algorithm, and then stands for it; a method without a table changes nothing but
    `algorithm.name`.

    Raises:
        ValueError, FileNotFoundError: naming the method, the key, or a folder that holds a run.
    """
    base, tables = config_file.load(file), config_file.methods(file)
    algorithms = get_args(AlgorithmName)
    made = {}
    for name in only or list(tables) or METHODS:
        if name not in tables and name not in algorithms:
            known = ", ".join(dict.fromkeys((*tables, *algorithms)))
            raise ValueError(f"--only: wanted one of {known}; got {name!r}")
        config = config_file.merge(base, {"algorithm": {"name": name}}) if name in algorithms else base
        config = config_file.merge(config, tables.get(name, {}))
        config = config_file.override(config, args, "flowrl compare FILE.toml")
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(out / name)))
        try:
            check(config)
            if not (config.run.resume and not (out / name).exists()):
                run_folder.look(out / name, config, parallel.ALONE)
        except (ValueError, OSError) as error:
            raise ValueError(f"{name}: {error}") from None
        made[name] = config
    return made


def main(argv: Sequence[str]) -> int:
    """Trains one method after the other on one configuration, then prints one table and draws one overlaid plot.

    Every method is a run of its own process in OUT/NAME. Prints the table, writes it to OUT/compare.json and
    overlays the runs' plots in OUT/plots. Returns 1 if a run failed (the others are still shown).
    """
    parser = config_file.Parser(
        prog="flowrl compare",
        description="Trains several methods one after the other: those of the file's [compare.NAME] tables, each of "
        "which changes the file's own settings for its method; without any: " + ", ".join(METHODS),
        epilog="--section.field value, as in training, applies to all; --resume goes on with runs that were stopped.",
    )
    parser.add_argument("config", help="TOML file of the runs")
    parser.add_argument("--out", default="runs/compare", help="folder of the runs (default: runs/compare)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the methods, or any algorithm's name")
    parser.add_argument("--resume", action="store_true", help="go on with runs that were stopped")
    args, overrides = parser.parse_known_args(argv)
    if args.resume:
        overrides += ["--run.resume", "True"]
    out = Path(args.out).expanduser()
    rows: list[dict[str, Any]] = []
    runs: list[Path] = []
    failed = False
    for name, config in configs(args.config, args.only, overrides, out).items():
        folder = out / name
        if config.run.resume and not folder.exists():
            config = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / f"{name}.toml"
            file.write_text(config_file.dumps(config), encoding="utf-8")
            print(f"--- {name}: {folder}", flush=True)
            code = subprocess.run(
                [sys.executable, "-m", "flowrl_kernels.trainer", "train", str(file)], check=False
            ).returncode
        if code:
            print(f"--- {name} failed with exit code {code}", file=sys.stderr)
            failed = True
            if code in (130, 143):
                break
            continue
        if not runs and (start := start_row(folder)):
            rows.append(start)
        runs.append(folder)
        rows.append({**row_of(folder, name), "minutes": (time.monotonic() - began) / 60})
    if rows:
        Terminal().table(f"{args.config}: the test split", rows)
        (out / "compare.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        from flowrl_kernels.trainer.plot import plot_runs

        print(plot_runs(runs, out / "plots")[-1])
    return int(failed)
