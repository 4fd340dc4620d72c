"""Held-out Countdown by the trainer: each method trains a small transformer, and is judged on problems it never saw.

Every right answer to a problem is listed, so pass@k and the number of different solutions among k responses are exact
for the policy at hand: no responses are drawn for them. Each cell is a process of the trainer; what held_out.json holds
is not run again. Dials are chosen on the valid split with one seed; only then test seeds run, and the test split is
read. Validation cells train on a task that has no test split.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence import plan
from benchmarks.machine import describe
from flowrl_kernels.trainer import config_file, export, loop, objective, policy
from flowrl_kernels.trainer.batches import pack
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.log import read_lines
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.parts import make_text
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.records import Text
from flowrl_kernels.trainer.tasks import Problem, build_task
from flowrl_kernels.trainer.tasks.countdown import Countdown

HERE = Path(__file__).parent
OUT, SETTINGS = HERE / "held_out.json", HERE / "held_out.toml"
CLOSED = "benchmarks.evidence.held_out:without_test"
KS = (1, 2, 4, 8, 16, 32, 64, 128)

# [algorithm] of each method at a dial. Rewards are 0 and 1 as they come; one update a batch, sampled by the policy
# that it changes. rloo_kl_in_reward is trained by the preset "tba": at such a batch its gradient is that of RLOO on
# r - weight (log pi - log pi_ref), times 2 (G - 1) / (G weight) (tests/test_evidence_held_out.py).
ALGORITHM: dict[str, Callable[[float], dict[str, Any]]] = {
    "tb": lambda beta: {"name": "flowrl", "preset": "tb", "reward": "raw", "beta": beta},
    "paper": lambda beta: {"name": "flowrl", "preset": "paper", "reward": "raw", "beta": beta},
    "rloo_kl_in_reward": lambda weight: {"name": "flowrl", "preset": "tba", "reward": "raw", "beta": 1 / weight},
    "grpo": lambda weight: {"name": "grpo", "kl": weight},
    "dapo": lambda bonus: {"name": "dapo", "entropy": bonus},
}


def without_test(task: Any) -> Any:
    """The task of validation cells: `task.name = "benchmarks.evidence.held_out:without_test"`."""

    class Closed(Countdown):
        def problems(self, split: str) -> Sequence[Any]:
            return [] if split == "test" else super().problems(split)

    taken = {field.name for field in dataclasses.fields(Countdown)} - {"name", "alphabet", "trusted"}
    return Closed(**{name: getattr(task, name) for name in taken})


def settings(cell: plan.HeldOut, scratch: Path) -> Any:
    """The whole configuration of a cell's run, from the start that `warm_start` leaves."""
    name = cell.key().replace(": ", "-").replace(", ", "-").replace(" ", "-")
    changed: dict[str, Any] = {
        "run": {"seed": cell.seed, "dir": str(scratch / name), "cache": str(scratch / "cache"), "overwrite": True},
        "algorithm": ALGORITHM[cell.method](cell.dial),
        "model": {"name": str(scratch / "warm" / "start")},
        "warm": {"steps": 0},
    }
    if cell.split == "valid":
        changed["task"] = {"name": CLOSED}
    return config_file.merge(config_file.load(SETTINGS), changed)


def warm_start(scratch: Path) -> float | None:
    """Makes the model that every cell starts from: processor seconds, or None where it is there."""
    folder, began = scratch / "warm", time.process_time()
    if (folder / "start").exists():
        return None
    run = {"seed": plan.HELD_OUT_START, "steps": 1, "dir": str(folder), "cache": str(scratch / "cache")}
    changed = {"run": run | {"overwrite": True}, "task": {"name": CLOSED}, "algorithm": ALGORITHM["tb"](1.0)}
    with quietly(folder):
        loop.train(config_file.merge(config_file.load(SETTINGS), changed))
    return round(time.process_time() - began, 1)


@contextlib.contextmanager
def quietly(folder: Path) -> Iterator[None]:
    """What a run prints goes into a file beside its folder."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(open(folder.with_name(folder.name + ".log"), "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        yield


def run(cell: plan.HeldOut, scratch: Path) -> dict[str, Any]:
    """Trains one cell in a process of its own, which judges it on its split too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    made = forked(trained, cell, scratch)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return made | {"seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)}


def forked(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` in a process of its own, which knows the solutions that this one has listed (12 s)."""
    build_task(config_file.load(SETTINGS).task).problems("train")
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def trained(cell: plan.HeldOut, scratch: Path) -> dict[str, Any]:
    config = settings(cell, scratch)
    folder = Path(config.run.dir)
    with quietly(folder):
        final = loop.train(config)
    steps = read_lines(folder / "metrics.jsonl", "train")
    return (
        {
            "rollouts": len(steps) * config.rollout.prompts * config.rollout.samples,
            "sampled_accuracy": _short(final["accuracy"]),  # the trainer's own, of a few responses a problem
            "training_accuracy": [_short(line["accuracy"]) for line in steps[9::10]],
        }
        | judged(folder, cell.split)
    )


def judged(folder: Path, split: str) -> dict[str, Any]:
    """Exact figures of a run's policy on every problem of a split."""
    config, newest = export.open_run(folder)
    config = export.single(config)
    world = export.start(config)
    actor = export.restore(config, newest, world)
    return figures(config, world, actor, split)


def judged_start(cell: plan.HeldOut, scratch: Path) -> dict[str, Any]:
    """The same of the model that every cell starts from, on the cell's split."""
    config = export.single(settings(cell, scratch))
    world = export.start(config)
    actor, _ = export.open_policy(config, None, world)
    return figures(config, world, actor, cell.split)


def figures(config: Config, world: World, actor: Policy, split: str) -> dict[str, Any]:
    """pass@k, different solutions among k responses, and the share of a problem's solutions among 128."""
    task = build_task(config.task)
    text = make_text(config, task, policy.load_tokenizer(export.source_of(config), config.model))
    problems = [(problem, task.correct_texts(problem)) for problem in task.problems(split)]
    found = iter(masses(config, world, actor, text, [(problem, answer) for problem, right in problems
                                                     for answer, _ in right]))  # fmt: skip
    accuracy, distinct = [], {k: [] for k in KS}
    for _, right in problems:
        mass: dict[str, float] = {}
        for _, key in right:
            mass[key] = mass.get(key, 0.0) + next(found)
        accuracy.append(sum(mass.values()))
        for k in KS:
            distinct[k].append(sum(at_least_one(p, k) for p in mass.values()))
    solutions = [len({key for _, key in right}) for _, right in problems]
    return {
        "pass": {str(k): _short(mean([at_least_one(p, k) for p in accuracy])) for k in KS},
        "distinct": {str(k): _short(mean(distinct[k])) for k in KS},
        "found_in_128": _short(mean([d / n for d, n in zip(distinct[128], solutions)])),
        "accuracy_of": [_short(p) for p in accuracy],
        "distinct_at_128_of": [_short(d) for d in distinct[128]],
        "solutions_of": solutions,
    }


def masses(
    config: Config, world: World, actor: Policy, text: Text, pairs: Sequence[tuple[Problem, str]]
) -> list[float]:
    """The probability of each (problem, response) with its end, at temperature 1."""

    end = [text.tokenizer.eos_token_id]
    tokens = text.tokenizer([answer for _, answer in pairs], add_special_tokens=False)["input_ids"]
    prompts = [np.asarray(text.encode(problem)) for problem, _ in pairs]
    answers = [np.asarray(ids + end) for ids in tokens]
    p, total = config.parallel, torch.zeros(len(pairs), dtype=torch.float64)
    with torch.no_grad():
        for batch in pack(list(range(len(pairs))), prompts, answers, max_tokens=p.max_tokens, row_tokens=p.row_tokens,
                          device=world.device, alone=actor.packing == "alone"):  # fmt: skip
            scored = actor(objective.score_head(config, batch, temperature=1.0), batch.ids, batch.positions)
            summed = torch.zeros(batch.sequences, dtype=torch.float64)
            total[batch.which] = summed.index_add_(0, batch.segment(), scored.logp.double())
    return total.exp().tolist()


def at_least_one(p: float, k: int) -> float:
    """The chance that one of k independent responses is what has probability p."""
    return -math.expm1(k * math.log1p(-min(p, 1.0 - 1e-12)))


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def made_so_far(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    return {
        "validation": plan.HELD_OUT_VALIDATION,
        "test": plan.HELD_OUT_TEST,
        "chosen": None,
        "starts": {},
        "cells": {},
    }


def chosen(made: dict[str, Any]) -> dict[str, dict[str, float]] | None:
    """aim -> each method's dial that is best by it on the valid split; None while a validation cell is missing."""
    found = {cell: made["cells"].get(cell.key()) for cell in plan.held_out_validation()}
    if None in found.values():
        return None
    best: dict[str, dict[str, float]] = {}
    for aim in plan.HELD_OUT_AIMS:
        of = {method: [cell for cell in found if cell.method == method] for method in plan.HELD_OUT}
        best[aim] = {method: max(own, key=lambda cell: figure(found[cell], aim)).dial for method, own in of.items()}
    return best


def figure(result: dict[str, Any], aim: str) -> float:
    return result["pass"]["1"] if aim == "pass_1" else result[aim]


def cells_of(made: dict[str, Any]) -> list[plan.HeldOut]:
    """The cells that are known to be wanted, in the order in which they run: the test seeds' when dials are chosen."""
    tested = [plan.held_out_test(dials) for dials in (made["chosen"] or {}).values()]
    return list(dict.fromkeys([*plan.held_out_validation(), *(cell for cells in tested for cell in cells)]))


def fill(path: Path, scratch: Path, minutes: float, one: Callable[..., dict[str, Any]] = run) -> tuple[int, int]:
    """Runs what is missing, one cell after another, until `minutes` have gone; (cells done, cells wanted so far)."""
    made, ends = made_so_far(path), time.monotonic() + 60 * minutes
    while True:
        made["chosen"] = chosen(made)
        missing = [cell for cell in cells_of(made) if cell.key() not in made["cells"]]
        if not missing or time.monotonic() > ends:
            return len(cells_of(made)) - len(missing), len(cells_of(made))
        cell = missing[0]
        made["cells"][cell.key()] = result = one(cell, scratch)
        made["machine"] = describe("cpu")
        made["chosen"] = chosen(made)
        write(path, made)
        print(f"{cell.key()}: found in 128 {result['found_in_128']:.3f}, {result['seconds']:.0f} s", flush=True)


def make(path: Path, scratch: Path, minutes: float) -> tuple[int, int]:
    """The start, the cells that `path` lacks, and the start's own figures; (cells done, cells wanted)."""
    made = made_so_far(path)
    lacking = [cell for cell in cells_of(made) if cell.key() not in made["cells"] or cell.split not in made["starts"]]
    if made["chosen"] and not lacking:
        return (len(cells_of(made)),) * 2
    spent = forked(warm_start, scratch)
    done, of = fill(path, scratch, minutes)
    made = made_so_far(path)
    if spent is not None:
        made["warm_seconds"] = spent
    if done == of:
        for cell in (cells_of(made)[0], cells_of(made)[-1]):
            if cell.split not in made.setdefault("starts", {}):
                made["starts"][cell.split] = forked(judged_start, cell, scratch)
    write(path, made)
    return done, of


def write(path: Path, made: dict[str, Any]) -> None:
    """Whole or not at all; a cell's lists a line each."""
    head = json.dumps({name: value for name, value in made.items() if name != "cells"}, indent=1)
    cells = []
    for key, cell in made["cells"].items():
        lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(value)}" for name, value in cell.items())
        cells.append(f"  {json.dumps(key)}: {{\n{lines}\n  }}")
    text = head.removesuffix("\n}") + ',\n "cells": {\n' + ",\n".join(cells) + "\n }\n}\n"
    json.loads(text)
    beside = path.with_suffix(".part")
    beside.write_text(text)
    os.replace(beside, path)
