"""The model RL starts from: a Hugging Face one, or one built here and warmed up on the task's own examples.

Whatever is built here is kept in the cache folder under the hash of everything that made it, and copied into the
run folder as `start`, which is also what the frozen reference model is read from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl_kernels.trainer import parallel, policy
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.metrics import Log
from flowrl_kernels.trainer.packing import MicroBatch, pack, stand_in
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.tasks import Problem, Task

RECIPE = 1  # part of the hash: raise it when the supervised steps change


def start(
    config: Config,
    world: World,
    task: Task,
    tokenizer: Any,
    encode: Callable[[Problem], list[int]],
    attention: str | None,
    log: Log,
) -> str:
    """Name or folder of the model RL starts from; trains and caches it where that is asked for."""
    if config.model.name and not config.warm.steps:
        return config.model.name
    folder = Path(config.run.dir) / "start"
    if parallel.first(folder.exists, world):
        return str(folder)
    cached = Path(config.run.cache).expanduser() / f"warm-{digest(config)}"
    if not parallel.first(cached.exists, world):
        if config.model.name:
            empty = world.mesh is not None and not world.main
            model = policy.load_model(config.model.name, config.model, attention, empty=empty)
        elif world.mesh is not None and not world.main:
            with torch.device("meta"):
                model = policy.build_model(config, tokenizer, attention)
        else:
            model = policy.build_model(config, tokenizer, attention)
        actor = policy.make_policy(config, world, model)
        began = time.perf_counter()
        train(config, world, task, tokenizer, encode, actor, log)
        if config.warm.steps:
            log.note(f"warm start took {time.perf_counter() - began:.1f} s")
        partial = cached.with_name(f"{cached.name}.{os.getpid()}.incomplete")
        policy.save_folder(actor, tokenizer, partial, world)
        parallel.first(lambda: move(partial, cached), world)
    else:
        log.note(f"warm start read from {cached}")
    parallel.first(lambda: copy(cached, folder), world)
    return str(folder)


def digest(config: Config) -> str:
    """Hash of everything the warm-started weights depend on."""
    task = {k: v for k, v in dataclasses.asdict(config.task).items() if not k.startswith("reward")}
    parts = {
        "recipe": RECIPE,
        "seed": config.run.seed,
        "model": {k: v for k, v in dataclasses.asdict(config.model).items() if k not in ("attention", "liger")},
        "task": task,
        "warm": dataclasses.asdict(config.warm),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def move(source: Path, target: Path) -> None:
    """Renames into place; another process that was first wins."""
    try:
        os.rename(source, target)
    except OSError:
        shutil.rmtree(source, ignore_errors=True)
        if not target.exists():
            raise


def copy(source: Path, target: Path) -> None:
    partial = target.with_name(target.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    os.rename(partial, target)


def train(
    config: Config,
    world: World,
    task: Task,
    tokenizer: Any,
    encode: Callable[[Problem], list[int]],
    actor: Policy,
    log: Log,
) -> None:
    """`warm.steps` supervised steps of cross-entropy on the task's example answers.

    Raises:
        ValueError: the task has no examples.
    """
    w, p = config.warm, config.parallel
    optimizer = torch.optim.AdamW(actor.parameters(), lr=w.lr, weight_decay=0.0, fused=True)
    falling = max(1, round(w.steps * w.decay))
    end = [tokenizer.eos_token_id]
    for step in range(w.steps):
        pairs = task.warm_start(np.random.default_rng((config.run.seed, 2, step)), w.batch)
        if pairs is None:
            raise ValueError(f"warm.steps: task {task.name!r} has no examples to learn from; set it to 0")
        prompts = [np.asarray(encode(problem)) for problem, _ in pairs]
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
    from flowrl_kernels.trainer.losses import score_head

    score = score_head(config, batch, temperature=1.0)
    return lambda actor, hidden: -score(actor, hidden).logp.sum()
