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
    forms = [line for name, part in suites.items() for line in diversity_rows(name, part)]
    if forms:
        terminal.table("different solutions (95 % interval over problems)", forms)
    for name, part in suites.items():
        for line in (rating_line(name, part.get("rating")), judge_line(name, part.get("judge"))):
            if line:
                terminal.say(line)


def diversity_rows(name: str, part: dict[str, Any]) -> list[dict[str, Cell]]:
    """One line for each form of a suite; effective numbers, and distinct@k at the largest k."""
    lines = []
    for form, found in (part.get("diversity") or {}).items():
        line: dict[str, Cell] = {"suite": name, "form": form, "responses": found["members"]["value"]}
        if "threshold" in found:
            line["form"] = f"{form} (cosine {found['threshold']:g})"
        line["exp(entropy)"] = with_interval(found["entropy"])
        line["inverse Simpson"] = with_interval(found["simpson"])
        for kind in ("distinct", "covered"):
            largest = max((int(key.partition("@")[2]) for key in found if key.startswith(f"{kind}@")), default=0)
            if largest:
                line[f"{kind}@{largest}"] = with_interval(found[f"{kind}@{largest}"])
        lines.append(line)
    return lines


def with_interval(found: dict[str, Any]) -> str:
    """ "1.50 (1.20 to 1.90)"; what has no value, as no two alike have no Simpson number, is a dash."""
    value, low, high = ("–" if found[key] is None else f"{found[key]:.2f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})" if found["problems"] else "–"


def rating_line(name: str, found: dict[str, Any] | None) -> str:
    """A suite's rating in words; "" without one."""
    if found is None:
        return ""
    what = f"{name}: rating "
    if found["rating"] is not None:
        se = found["se"]
        what += f"{found['rating']:.0f}" + (f" ± {se:.0f}" if se is not None and math.isfinite(se) else "")
    elif found["at_least"] is not None:
        what += f"at least {found['at_least']:.0f} (everything was solved: no maximum of the likelihood)"
    else:
        what += f"at most {found['at_most']:.0f} (nothing was solved: no maximum of the likelihood)"
    what += f", of {found['problems']} problems with a rating"
    if found["unrated"]:
        what += f" ({found['unrated']} have none)"
    if "percentile" in found:
        what += f"; above {found['percentile']:.1f} % of the users in {found['percentile_source']}"
    return what


def judge_line(name: str, found: dict[str, Any] | None) -> str:
    """A judge's grade in words; "" without one."""
    if found is None or found["grade"] is None or not math.isfinite(found["grade"]):
        return "" if found is None else f"{name}: no answer of {found['model']} was a grade"
    grade, se = found["grade"], found["grade_se"]
    text = f"{grade:.2f}" + (f" ± {se:.2f}" if se is not None and math.isfinite(se) else "")
    unread = f"; {found['unread']} answers were no grade" if found["unread"] else ""
    return f"{name}: diversity graded {text} of 5 by {found['model']} on {found['problems']} problems{unread}"
