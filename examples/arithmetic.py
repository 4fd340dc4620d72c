"""Data and reward of your own, in one file: one-digit sums, differences and products behind three solved ones.

`python -m examples.arithmetic FOLDER` writes train.jsonl, valid.jsonl and test.jsonl, which `task.name = "file"` reads;
`task.reward = "examples.arithmetic:reward"` finds the function below. No problem stands in two of the files, and every
solved one that a prompt shows is of the train split.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from pathlib import Path

HELD_OUT = 50  # problems in each of valid and test, of 255


def reward(prompt: str, response: str, answer: str) -> float:
    """1.0 where the response is the number and nothing after it: knowing where to stop is half of it."""
    return float(re.fullmatch(r"\s*(-?\d+)\s*", response) is not None and response.strip() == answer)


def problems() -> list[tuple[str, str]]:
    """Each (question, answer) there is: "7 + 2 =", "9"; differences that are not negative."""
    pairs = [*itertools.product(range(10), repeat=2)]
    asked = [(f"{a} + {b} =", a + b) for a, b in pairs] + [(f"{a} * {b} =", a * b) for a, b in pairs]
    asked += [(f"{a} - {b} =", a - b) for a, b in pairs if a >= b]
    return [(question, str(answer)) for question, answer in asked]


def rows(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """{"train", "valid", "test"}: rows of a prompt with three solved problems of the train split, and its answer."""
    rng = random.Random(seed)
    every = problems()
    rng.shuffle(every)
    parts = {"test": every[:HELD_OUT], "valid": every[HELD_OUT : 2 * HELD_OUT], "train": every[2 * HELD_OUT :]}
    made = {}
    for split, part in parts.items():
        made[split] = []
        for question, answer in part:
            shots = rng.sample([shot for shot in parts["train"] if shot[0] != question], 3)
            lines = [f"{asked} {told}" for asked, told in shots] + [question]
            made[split].append({"prompt": "\n".join(lines), "answer": answer})
    return made


def write(folder: Path, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in rows(seed).items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
