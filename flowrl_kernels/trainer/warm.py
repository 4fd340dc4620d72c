"""The model RL starts from: a Hugging Face one, or one built here and warmed up on the task's own examples.

Whatever is built here is kept in the cache folder under the hash of everything that made it (settings, the task's
code, data and vocabulary, the model), sealed by the hash of every file, and copied into the run folder as `start`,
which is also what the frozen reference model is read from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowrl_kernels.trainer import fingerprint, parallel, policy, run_folder
from flowrl_kernels.trainer.batches import MicroBatch, pack, stand_in
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.log import Log
from flowrl_kernels.trainer.objective import score_head
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.records import Job
from flowrl_kernels.trainer.tasks import Problem, Task, check_characters

RECIPE = 2  # part of the hash: raise it when the supervised steps change


@dataclass
class Start:
    """Where the model RL starts from is read, or what it is to be made of."""

    source: str = ""  # name or folder; empty: `seedling` is to be warmed up
    cached: Path | None = None  # where the cache keeps it, if it does
    seedling: Policy | None = None


def find(job: Job, resumed: bool) -> tuple[Start, list[str]]:
    """The model RL starts from, or the model to make it of, and what the log should say; writes nothing.

    Every rank calls it. resumed: the run folder's own `start` is the one.
    """
    config, world, task, tokenizer = job.config, job.world, job.text.task, job.text.tokenizer
    notes: list[str] = []
    if config.model.name and not config.warm.steps:
        return Start(config.model.name), notes
    folder = Path(config.run.dir) / "start"
    if resumed and parallel.first(folder.exists, world):
        return Start(str(folder)), notes
    key = parallel.first(lambda: digest(job), world)
    cached = Path(config.run.cache).expanduser() / f"warm-{key}"
    state = parallel.first(lambda: fingerprint.damage(cached) if cached.exists() else "absent", world)
    if state is None:
        return Start(str(cached), cached), [f"warm start read from {cached}"]
    if state != "absent":
        notes.append(f"warm start in {cached} is damaged ({state}): made anew")
    if config.model.name:
        empty = world.mesh is not None and not world.main
        model = policy.load_model(config.model.name, config.model, job.attention, empty=empty)
    elif world.mesh is not None and not world.main:
        with torch.device("meta"):
            model = policy.build_model(config, tokenizer, job.attention)
    else:
        model = policy.build_model(config, tokenizer, job.attention)
    if config.warm.steps and parallel.agree(lambda: _pairs(config, task, 0, 1), world) is None:
        raise ValueError(f"warm.steps: task {task.name!r} has no examples to learn from; set it to 0")
    return Start("", cached, policy.make_policy(config, world, model)), notes


def settle(start: Start, job: Job, log: Log) -> str:
    """Name or folder of the model RL starts from, in the run folder where it was made here; trains it if need be."""
    if start.cached is None:
        return start.source
    config, world = job.config, job.world
    cached, folder = start.cached, Path(config.run.dir) / "start"
    if start.seedling is not None:
        began = time.perf_counter()
        train(job, start.seedling, log)
        if config.warm.steps:
            log.note(f"warm start took {time.perf_counter() - began:.1f} s")
        partial = cached.with_name(f"{cached.name}.{uuid.uuid4().hex[:12]}.incomplete")
        policy.save_folder(start.seedling, job.text.tokenizer, partial, world)
        parallel.first(lambda: move(partial, cached), world)
        start.seedling = None
    parallel.first(lambda: copy(cached, folder), world)
    return str(folder)


def _pairs(config: Config, task: Task, step: int, count: int) -> list[tuple[Problem, str]] | None:
    """The supervised examples of a step."""
    return task.warm_start(np.random.default_rng((config.run.seed, 2, step)), count)


def digest(job: Job) -> str:
    """Hash of everything the warm-started weights depend on: settings, the task's code, data and tokens, the model."""
    config, task = job.config, job.text.task
    settings = {k: v for k, v in dataclasses.asdict(config.task).items() if not k.startswith("reward")}
    first = (_pairs(config, task, 0, config.warm.batch) or []) if config.warm.steps else []
    parts = {
        "recipe": RECIPE,
        "seed": config.run.seed,
        "model": {k: v for k, v in dataclasses.asdict(config.model).items() if k not in ("attention", "liger")},
        "weights": fingerprint.of_model(config.model.name),
        "task": settings,
        "code": fingerprint.of_code(task, (config.task.name,), ours=True),
        "data": fingerprint.of([(p.id, p.prompt, p.answer) for p in task.problems("train")]),
        "vocabulary": fingerprint.of(job.text.tokenizer.get_vocab()),
        "examples": fingerprint.of([(job.text.encode(problem), text) for problem, text in first]),
        "warm": dataclasses.asdict(config.warm),
    }
    return fingerprint.of(parts)[:16]


def move(source: Path, target: Path) -> None:
    """Seals a folder and renames it into place; another process that was first, and left it whole, wins."""
    fingerprint.write_manifest(source, fingerprint.seal(path for path in source.iterdir() if path.is_file()))
    for _ in range(3):
        try:
            os.rename(source, target)
            return
        except OSError:
            if not target.exists():
                raise
            if fingerprint.damage(target) is None:
                break
            aside = target.with_name(f"{target.name}.{uuid.uuid4().hex[:12]}.incomplete")
            with contextlib.suppress(OSError):  # somebody else may mend it too
                os.rename(target, aside)
                shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(source, ignore_errors=True)


def copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    run_folder.swap(partial, target)


def train(job: Job, actor: Policy, log: Log) -> None:
    """`warm.steps` supervised steps of cross-entropy on the task's example answers.

    Raises:
        ValueError: the task has no examples.
    """
    config, world, task, tokenizer = job.config, job.world, job.text.task, job.text.tokenizer
    w, p = config.warm, config.parallel
    optimizer = torch.optim.AdamW(actor.parameters(), lr=w.lr, weight_decay=0.0, fused=True)
    falling = max(1, round(w.steps * w.decay))
    end = [tokenizer.eos_token_id]
    for step in range(w.steps):
        pairs = _pairs(config, task, step, w.batch)
        if pairs is None:
            raise ValueError(f"warm.steps: task {task.name!r} has no examples to learn from; set it to 0")
        prompts = [np.asarray(job.text.encode(problem)) for problem, _ in pairs]
        if task.alphabet is not None and not config.model.name:
            check_characters([text for _, text in pairs], task.alphabet, "warm start's answer")
        texts = tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"]
        answers = [np.asarray(ids + end) for ids in texts]
        tokens = sum(map(len, answers))
        mine = list(range(world.rank, len(pairs), world.size))
        batches = pack(mine, prompts, answers, max_tokens=p.max_tokens, row_tokens=p.row_tokens, device=world.device,
                       alone=actor.packing == "alone")  # fmt: skip
        most = int(parallel.total(torch.tensor([len(batches)], device=world.device), world, "max"))
        batches += [stand_in(prompts, answers, world.device) for _ in range(most - len(batches))]
        optimizer.zero_grad(set_to_none=True)
        value = torch.zeros((), device=world.device)
        for batch in batches:
            loss = actor(cross_entropy(config, batch), batch.ids, batch.positions) / tokens
            (loss * (world.size if batch.live else 0.0)).backward()
            value += loss.detach() * batch.live
        parallel.clip(list(actor.parameters()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = w.lr * min(1.0, (step + 1) / 10, (w.steps - step) / falling)
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == w.steps:
            log.warm(step + 1, w.steps, float(parallel.total(value, world)))
    optimizer.zero_grad(set_to_none=True)


def cross_entropy(config: Config, batch: MicroBatch) -> Callable[[Policy, Tensor], Tensor]:
    """Head: minus the summed log-probability of the batch's response tokens."""
    score = score_head(config, batch, temperature=1.0)
    return lambda actor, hidden: -score(actor, hidden).logp.sum()
