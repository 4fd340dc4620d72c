"""Trajectory balance on the transformer of configs/sums.toml: what is left of the exact KL that it starts from?

One run of the trainer, a quarter of an hour of one core: the preset "tb" at beta 5 on rewards as they come, 2,600
steps, everything else as the file has it. KL and log Z are over all 20 prompts, every response listed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from flowrl_kernels.trainer import config_file, loop
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.log import read_lines

OUT = Path(__file__).parent / "transformer.json"
SUMS = Path(__file__).parents[2] / "configs" / "sums.toml"
STEPS, BETA = 2600, 5.0
MOST = 0.15  # of the starting KL that the end may have
FIGURES = ("exact_kl", "exact_accuracy", "exact_modes_share", "log_z_exact", "log_z_error")


def settings(folder: Path, steps: int = STEPS) -> Config:
    """The run's configuration, with its cache beside its folder."""
    return config_file.merge(
        config_file.load(SUMS),
        {
            "run": {"dir": str(folder / "run"), "cache": str(folder / "cache"), "steps": steps},
            "algorithm": {"preset": "tb", "beta": BETA},
            "eval": {"every": 0, "samples": 8, "kl_problems": 20},
            "checkpoint": {"export": False},
            "log": {"progress": False, "plots": False},
        },
    )


def train(folder: Path, steps: int = STEPS) -> dict[str, Any]:
    """Trains in `folder`, going on with what was begun there; the figures."""
    config = settings(folder, steps)
    resumed = config_file.merge(config, {"run": {"resume": (folder / "run").exists()}})
    loop.train(resumed)
    return measured(folder / "run")


def measured(run: Path) -> dict[str, Any]:
    """The exact figures of a finished run, before its first update and after its last, and their share."""
    start = next(line for line in read_lines(run / "metrics.jsonl", "eval") if line["step"] == 0)
    end = read_lines(run / "metrics.jsonl", "final")[-1]
    steps = read_lines(run / "metrics.jsonl", "train")
    return {
        "steps": len(steps),
        "seed": config_file.load(run / "config.toml").run.seed,
        "minutes": round(sum(line["time/step"] for line in steps) / 60, 1),
        "start": {name: round(start[name], 4) for name in FIGURES},
        "end": {name: round(end[name], 4) for name in FIGURES},
        "kl_left": round(end["exact_kl"] / start["exact_kl"], 4),
    }


def make(folder: Path) -> int:
    """Trains unless transformer.json is there; 1 where its claim fails."""
    if not OUT.exists():
        OUT.write_text(json.dumps({"machine": describe("cpu"), "beta": BETA, **train(folder)}, indent=1) + "\n")
    made = json.loads(OUT.read_text())
    print(f"KL {made['start']['exact_kl']} to {made['end']['exact_kl']}: {made['kl_left']} of it (claimed: {MOST})")
    return int(not made["kl_left"] <= MOST)
