"""What is measured on a suite's finished outcomes: diversity by form, a judge's grade, a rating. Nothing is sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from flowrl_kernels.trainer import fingerprint
from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.evaluate import powers_of_two
from flowrl_kernels.trainer.suites import diversity, forms, rating
from flowrl_kernels.trainer.suites.figures import Outcome
from flowrl_kernels.trainer.suites.file import Suite, SuiteFile
from flowrl_kernels.trainer.suites.forms import Labels, Tools
from flowrl_kernels.trainer.suites.judge import Asked, told
from flowrl_kernels.trainer.suites.paths import Embed, embedder, folder_of
from flowrl_kernels.trainer.tasks import Problem, Task
from flowrl_kernels.trainer.tasks.rows import files_of


class Measure(NamedTuple):
    """One suite's measures, ready before anything is sampled."""

    forms: tuple[str, ...]
    named: bool  # by the user: then a form that finds nothing is told as such
    ratings: list[float | None] | None
    people: rating.Population | None
    settings: dict[str, Any]  # everything the measures depend on beside the outcomes


def ready(suite: Suite, suites: SuiteFile, cfg: TaskConfig, count: int) -> Measure:
    """Reads what the measures of a suite need. Raises ValueError naming what is missing or does not fit."""
    chosen = forms.by_default(cfg) if suite.diversity is None else suite.diversity
    for form in chosen:
        forms.check_form(form, cfg)
    settings: dict[str, Any] = {"diversity": list(chosen), "rating": suite.rating}
    if "paths" in chosen:
        folder = folder_of(suites.paths)
        settings["paths"] = {"threshold": suites.paths.threshold, "weights": fingerprint.of_model(str(folder))}
    if "judge" in chosen:
        settings["judge"] = dataclasses.asdict(suites.judge)
        Asked(suites.judge)  # its key is there
    ratings = people = None
    if suite.rating:
        source = getattr(cfg, suite.split) if cfg.name in ("file", "maths") else ""
        if not source:
            raise ValueError(f"rating: wanted a task whose rows have a column {suite.rating!r}; got {cfg.name!r}")
        ratings = rating.of_problems(source, suite.rating, count)
        if suite.percentile.file:
            people = rating.population(suite.percentile)
            hashes = {str(path): fingerprint.of_file(path) for path in files_of(suite.percentile.file)}
            settings["percentile"] = {**dataclasses.asdict(suite.percentile), "files": hashes}
    return Measure(tuple(chosen), suite.diversity is not None, ratings, people, settings)


class Cache:
    """The embedding model, read once for all suites."""

    def __init__(self, suites: SuiteFile):
        self.suites = suites
        self._embed: Embed | None = None

    def embed(self) -> Embed:
        if self._embed is None:
            self._embed = embedder(folder_of(self.suites.paths))
        return self._embed


def take(
    measure: Measure, suite: Suite, task: Task, problems: Sequence[Problem], outcomes: Sequence[Outcome], cache: Cache
) -> tuple[dict[str, Any], dict[str, list[Labels]]]:
    """What results.json says of a suite's measures, and each response's label by form."""
    kept = [(p, o) for p, o in zip(problems, outcomes) if o.scored]
    samples = max((len(outcome.correct) for outcome in outcomes), default=0)
    found: dict[str, Any] = {}
    labelled: dict[str, list[Labels]] = {}
    tools = Tools(task, cache.embed() if "paths" in measure.forms else None, cache.suites.paths.threshold)
    for form in measure.forms:
        if form == "judge":
            continue
        rows = [forms.labels(form, tools, problem, outcome) for problem, outcome in kept]
        if not measure.named and not any(label is not None for row in rows for label in row):
            continue  # the task has no such form
        labelled[form] = rows
        solutions = None
        if form == "canonical":
            known = [task.solutions(problem) for problem, _ in kept]
            solutions = [len(row) for row in known if row] if all(known) else None
        spreads = [diversity.Spread.of(row) for row in rows]
        figures = diversity.figures(spreads, powers_of_two(samples), solutions) if spreads else {}
        found[form] = {name: value._asdict() for name, value in figures.items()}
        if form == "paths":
            found[form]["threshold"] = cache.suites.paths.threshold
    out: dict[str, Any] = {"diversity": found} if found else {}
    if "judge" in measure.forms:
        asked = Asked(cache.suites.judge)
        out["judge"] = told(asked.grades([(_text(p.prompt), o.responses) for p, o in kept]), cache.suites.judge)
    if measure.ratings is not None:
        rated = [(r, o.rate) for r, o in zip(measure.ratings, outcomes) if r is not None and o.scored]
        if rated:
            best = rating.fit(*map(list, zip(*rated)))
            out["rating"] = rating.told(best, measure.people, suite.percentile.source)
            out["rating"]["unrated"] = sum(r is None for r in measure.ratings)
    return out, labelled


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)
