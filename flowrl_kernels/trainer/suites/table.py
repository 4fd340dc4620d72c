"""Results as tables in the terminal."""

from __future__ import annotations

import math
from typing import Any

from flowrl_kernels.trainer.terminal import Cell, Terminal


def with_error(value: float | None, error: float | None) -> Cell:
    """ "0.123 ± 0.045"; the value alone where there is no error."""
    if value is None or error is None or not math.isfinite(error):
        return value
    return f"{value:.3f} ± {error:.3f}"


def row(name: str, found: dict[str, float]) -> dict[str, Cell]:
    """One suite's line."""
    average = next(key for key in found if key.startswith("avg@") and not key.endswith("_se"))
    line: dict[str, Cell] = {"suite": name, "problems": int(found["problems"]), "k": int(average[4:])}
    line["avg@k"] = with_error(found[average], found[f"{average}_se"])
    for key in found:
        if key.startswith("pass@") and not key.endswith("_se") and key != "pass@1":  # which is avg@k
            line[key] = with_error(found[key], found[f"{key}_se"])
    return line | {"truncated": found["truncated"], "length": found["length"]}


def show(terminal: Terminal, title: str, suites: dict[str, dict[str, Any]]) -> None:
    """One line a suite, and the mean of avg@k over suites where there are several."""
    lines = [row(name, part["figures"]) for name, part in suites.items()]
    if len(lines) > 1:
        keys = {name: f"avg@{line['k']}" for name, line in zip(suites, lines)}
        mean = sum(suites[name]["figures"][key] for name, key in keys.items()) / len(lines)
        errors = [suites[name]["figures"][f"{key}_se"] for name, key in keys.items()]
        whole = all(error is not None for error in errors)
        error = math.sqrt(sum(error**2 for error in errors)) / len(lines) if whole else None
        lines.append({"suite": "mean of the suites", "avg@k": with_error(mean, error)})
    terminal.table(f"{title} (mean ± standard error over problems)", lines)
