"""A run from Python: a model, two rewards and rows of one's own, without a file of settings.

`python examples/from_python.py MODEL runs/python` trains a Hugging Face model (a name or a folder) on one-digit sums.
The rewards are found again by the processes that score, which run this file as a module: so what starts the run stands
behind the `if` at its end.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from flowrl_kernels.trainer import Trained, train


def right(prompt: str, response: str, answer: int) -> float:
    """1 where the first number of the response is the answer."""
    found = re.match(r"\s*(\d+)", response)
    return float(found is not None and int(found[1]) == answer)


def brief(prompt: str, response: str, answer: int) -> float:
    """From 1 for an empty response to 0 for one of 20 characters and more."""
    return max(0.0, 1.0 - len(response) / 20)


def main(model: str, folder: str, **tables: dict[str, Any]) -> Trained:
    """Trains `model` into `folder`; further tables are those of a TOML file: optim={"lr": 1e-5}."""
    rows = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(10) for b in range(10)]
    settings: dict[str, dict[str, Any]] = {
        "run": {"dir": folder, "steps": 50},
        "model": {"name": model},
        "rollout": {"prompts": 8, "samples": 8, "max_new_tokens": 8},
        "optim": {"lr": 1e-5},
        "task": {"chat_template": False},
    }
    settings = {name: {**settings.get(name, {}), **tables.get(name, {})} for name in {**settings, **tables}}
    return train(
        settings,
        rewards=[right, brief],
        weights=[1.0, 0.2],
        data={"train": rows[::2], "test": rows[1::2]},
    )


if __name__ == "__main__":
    done = main(*sys.argv[1:])
    first, last = done.metrics()[0], done.metrics()[-1]
    print(f"right {first['reward/right']:.2f} -> {last['reward/right']:.2f}, model in {done.model}")
