"""What `make smol` has learned: python -m benchmarks.smol RUN [RUN ...] [--out FILE.json] [--plot FILE.png].

Prints for each run the held-out accuracy before and after with the standard error of its gain (over problems, both from
the run's own log), and some responses; `--out` keeps it, `--plot` draws the accuracy of each step's own samples.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from flowrl_kernels.trainer import config_file


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def of_run(folder: Path) -> dict[str, Any]:
    """The figures of one run folder."""
    config = config_file.load(folder / "config.toml")
    log = lines(folder / "metrics.jsonl")
    steps = [line for line in log if line["kind"] == "train"]
    tests = [line for line in log if line["kind"] == "eval" and line["split"] == "test"]
    before, after = tests[0], tests[-1]
    error = math.hypot(before["accuracy_se"], after["accuracy_se"])
    return {
        "task": config.task.name,
        "algorithm": config.algorithm.name,
        "seed": config.run.seed,
        "steps": len(steps),
        "responses_a_step": config.rollout.prompts * config.rollout.samples,
        "problems": int(after["problems"]),
        "samples_a_problem": config.eval.samples,
        "before": round(before["accuracy"], 3),
        "after": round(after["accuracy"], 3),
        "gain": round(after["accuracy"] - before["accuracy"], 3),
        "gain_se": round(error, 3),
        "truncated": [round(before["truncated"], 3), round(after["truncated"], 3)],
        "seconds_of_steps": round(sum(line["time/step"] for line in steps)),
        "accuracy_of_each_step": [round(line["accuracy"], 3) for line in steps],
        "valid": [[line["step"], round(line["accuracy"], 3)] for line in log if line.get("split") == "valid"],
        "samples": [
            {name: line[name] for name in ("step", "prompt", "response", "reward")}
            for line in lines(folder / "samples.jsonl")
        ],
    }


def plot(runs: list[dict[str, Any]], file: Path) -> None:
    """Accuracy of each step's own samples, a mean of three steps, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for run in runs:
        seen = run["accuracy_of_each_step"]
        means = [sum(seen[max(0, i - 2) : i + 1]) / len(seen[max(0, i - 2) : i + 1]) for i in range(len(seen))]
        axes.plot(range(1, len(seen) + 1), means, label=f"{run['task']}, {run['algorithm']}, seed {run['seed']}")
    axes.set(xlabel="step", ylabel="right answers among a step's samples", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    given = parser.parse_args()
    runs = [of_run(folder) for folder in given.runs]
    for run in runs:
        print(f"{run['task']}, {run['algorithm']}, seed {run['seed']}: {run['before']} -> {run['after']} on "
              f"{run['problems']} held-out problems, gain {run['gain']} +- {run['gain_se']}, "
              f"{run['steps']} steps in {run['seconds_of_steps']} s")  # fmt: skip
        for sample in run["samples"][:2] + run["samples"][-2:]:
            print(f"  step {sample['step']}: {sample['prompt'][-40:]!r} -> {sample['response']!r} {sample['reward']}")
    if given.out:
        given.out.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(runs, given.plot)


if __name__ == "__main__":
    main()
