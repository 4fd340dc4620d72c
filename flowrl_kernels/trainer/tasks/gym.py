"""task.name = "gym:NAME": any generator of reasoning-gym with its own scorer, held out by seed and by question.

Some of its scorers hand the response to Python's eval, or to sympy's parser, which is eval too. Here neither ever sees
model text: `tasks/plain_reading.py` reads it instead. A scorer that calls them and is not known is refused by name.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from types import ModuleType, SimpleNamespace
from typing import Any

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.tasks.base import OpenTask, Problem, check_split
from flowrl_kernels.trainer.tasks.notation import last_boxed
from flowrl_kernels.trainer.tasks.plain_reading import literal, sympy_expression

PACKAGE = "reasoning_gym"
TRIES = 4  # entries drawn for each different question that is wanted
STRIDE = 1_000_000  # entry i of a generator with seed s is made from s + i: seeds of splits stand this far apart
MOST_SEEDS = 1_000  # so that 3 * seed * STRIDE stays below 2**32
_RUNS = {"eval", "exec", "compile", "__import__", "parse_expr", "sympify", "system", "popen", "Popen", "loads"}
# what the package's own modules call on text that they made themselves (0.1.25): settings, problems, its data files
_OWN_TEXT = {
    "code.bf": {"compile"},  # a Brainfuck compiler's method
    "code.contrib.bfit.Compiler.Compiler": {"compile"},
    "code.codeio": {"exec"},
    "arithmetic.bitwise_arithmetic": {"eval"},
    "arithmetic.basic_arithmetic": {"eval"},
    "arithmetic.gsm_symbolic.generators_00_49": {"eval"},
    "arithmetic.gsm_symbolic.generators_50_99": {"eval"},
    "logic.propositional_logic": {"parse_expr"},  # a function of its own, by regular expressions
}
# what they call on a response, and what stands in its place
_MENDED: dict[str, dict[str, Any]] = {
    "algorithmic.string_insertion": {"eval": literal},
    "algorithmic.spiral_matrix": {"eval": literal},
    "algorithmic.number_sorting": {"eval": literal},
    "algorithmic.binary_matrix": {"eval": literal},
    "games.n_queens": {"eval": literal},
    "games.puzzle24": {"parse_expr": sympy_expression},
    "games.countdown": {"parse_expr": sympy_expression},
    "algebra.simple_integration": {"parse_expr": sympy_expression},
    "algebra.intermediate_integration": {"parse_expr": sympy_expression},
    "algebra.polynomial_multiplication": {"parse_expr": sympy_expression},
}


class _Sympy(SimpleNamespace):
    """sympy with another parser."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("sympy"), name)


def _calls(module: ModuleType) -> set[str]:
    """Names in `_RUNS` that a module's source calls, `json.loads` aside."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call):
            function = node.func
            name = getattr(function, "attr", getattr(function, "id", ""))
            base = getattr(getattr(function, "value", None), "id", "")
            if name in _RUNS and base not in ("json", "re"):
                found.add(name)
    return found


def _modules(kind: type) -> list[ModuleType]:
    """The package's modules that a generator's class is made from, with those that they take something from."""
    waiting = [k.__module__ for k in kind.__mro__]
    found: dict[str, ModuleType] = {}
    while waiting:
        name = waiting.pop()
        if name in found or not name.startswith(f"{PACKAGE}.") or name not in sys.modules:
            continue
        module = found[name] = sys.modules[name]
        for value in list(vars(module).values()):
            waiting.append(value.__name__ if isinstance(value, ModuleType) else str(getattr(value, "__module__", "")))
    return [found[name] for name in sorted(found)]


def safe_class(name: str) -> tuple[type, type]:
    """The class of generator `name` and of its settings, its scorer kept from running a response.

    Raises ValueError for an unknown name (with the nearest known one), a package that is not installed, or a scorer
    that calls what runs text and is not known here.
    """
    try:
        importlib.import_module(PACKAGE)
        registry = importlib.import_module(f"{PACKAGE}.factory").DATASETS
    except ImportError as error:
        raise ValueError(f"task.name: 'gym:{name}' needs reasoning-gym ({error}): pip install reasoning-gym") from None
    if name not in registry or name == "composite":
        near = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)
        what = "mixes others; name one generator" if name == "composite" else f"is none; did you mean {near[0]!r}?"
        raise ValueError(f"task.name: wanted gym:NAME with a generator of reasoning-gym; {name!r} {what}")
    kind, settings = registry[name]
    for module in _modules(kind):
        short = module.__name__.removeprefix(f"{PACKAGE}.")
        mended = _MENDED.get(short, {})
        if unknown := _calls(module) - _OWN_TEXT.get(short, set()) - mended.keys():
            raise ValueError(
                f"task.name: 'gym:{name}' is refused: {module.__name__} calls {', '.join(sorted(unknown))}, which may "
                "run a response in this process, and this version of it has not been looked at"
            )
        for call, ours in mended.items():
            if call in vars(module) or call == "eval":
                setattr(module, call, ours)  # a module's own name comes before the built-in one
            for alias in ("sympy", "sp"):
                if isinstance(vars(module).get(alias), ModuleType):
                    setattr(module, alias, _Sympy(**{call: ours}))
    return kind, settings


def final_answer(response: str) -> str:
    """What the scorer reads: the last <answer>...</answer>, else the last \\boxed{}, else the whole text; without
    what stands before the last </think>.
    """
    text = response.rpartition("</think>")[2]
    _, tag, rest = text.rpartition("<answer>")
    if tag:
        return rest.partition("</answer>")[0].strip()
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip()


@dataclass(frozen=True)
class Gym(OpenTask):
    """Problems of one generator; no question stands in two splits.

    Split s of seed n is made from seeds (3 n + s) * 10**6 onward, and questions that an earlier one of test, valid,
    train has are left out. A small generator may have fewer training problems than `size`.
    """

    generator: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    size: int = 1000
    held_out: int = 200
    partial: bool = True
    suffix: str = ""
    trusted: bool = False  # a scorer may be slow: scored where it can be killed

    @classmethod
    def load(cls, cfg: TaskConfig) -> Gym:
        """Raises ValueError for settings that make no problems, naming them."""
        if not 0 <= cfg.seed < MOST_SEEDS:
            raise ValueError(f"task.seed: wanted 0 to {MOST_SEEDS - 1} for gym:NAME, got {cfg.seed}")
        most = STRIDE // TRIES
        for key in ("size", "held_out"):
            if not 1 <= getattr(cfg, key) <= most:
                raise ValueError(f"task.{key}: wanted 1 to {most} for gym:NAME, got {getattr(cfg, key)}")
        name = cfg.name.partition(":")[2]
        task = cls(name, cfg.gym, cfg.seed, cfg.size, cfg.held_out, cfg.gym_partial, cfg.suffix)
        task._splits  # noqa: B018  the settings are tried now
        return task

    @property
    def name(self) -> str:
        return f"gym:{self.generator}"

    def _made(self, seed: int, size: int) -> Any:
        kind, settings = safe_class(self.generator)
        known = [f.name for f in fields(settings)]
        for key in self.settings:
            if key in ("seed", "size"):
                raise ValueError(f"task.gym.{key}: set task.{key} instead")
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
                raise ValueError(f"task.gym: {self.generator} has no {key!r}; did you mean {near[0]!r}?")
        try:
            return kind(config=settings(**self.settings, seed=seed, size=size))
        except (AssertionError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"task.gym: {dict(self.settings)} will not do for {self.generator}: {error}") from None

    @cached_property
    def _splits(self) -> dict[str, list[Problem]]:
        seen: set[str] = set()
        found: dict[str, list[Problem]] = {}
        for split, offset, wanted in (("test", 2, self.held_out), ("valid", 1, self.held_out), ("train", 0, self.size)):
            tries = TRIES * wanted
            made = self._made((3 * self.seed + offset) * STRIDE, tries)
            problems: list[Problem] = []
            for index in range(min(tries, len(made))):
                entry = made[index]
                if entry["question"] not in seen:
                    seen.add(entry["question"])
                    problems.append(Problem(len(problems), entry["question"] + self.suffix, entry))
                if len(problems) == wanted:
                    break
            if len(problems) < wanted and (split != "train" or not problems):
                raise ValueError(
                    f"task.held_out: {self.name} with {dict(self.settings)} gave only {len(problems)} questions for "
                    f"{split} that no other split has in {tries} tries; wanted {wanted}"
                )
            found[split] = problems
        return found

    @cached_property
    def _scorer(self) -> Any:
        return self._made(0, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}  # a reward worker makes no problems

    def __setstate__(self, state: dict[str, Any]) -> None:
        for key, value in state.items():
            object.__setattr__(self, key, value)
        self._scorer  # noqa: B018  imported before the first deadline runs

    def problems(self, split: str) -> Sequence[Problem]:
        return self._splits[check_split(split)]

    def verify(self, problem: Problem, response: str) -> float:
        score = float(self._scorer.score_answer(final_answer(response), problem.answer))
        return score if self.partial else float(self.correct(score))

    def correct(self, reward: float) -> bool:
        """The scorer's full mark."""
        return reward > 1 - 1e-9
