"""Everything between a configuration and the first step: folder, task, models, engine, optimiser; and the way out."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowrl_kernels.trainer import checkpoint, checks, config_file, losses, parallel, policy, warm
from flowrl_kernels.trainer.config import Config, check
from flowrl_kernels.trainer.metrics import Log
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.rollout import Engine, Sampling
from flowrl_kernels.trainer.tasks import Problem, Task, build_task, char_tokenizer

LOGS = ("metrics.jsonl", "samples.jsonl")
P = TypeVar("P")


@dataclass
class Run:
    """What a step needs; plain data, made once by `prepare`."""

    config: Config
    world: World
    folder: Path
    task: Task
    tokenizer: Any
    problems: list[Problem]  # the train split, without prompts that are too long
    policy: Policy
    reference: Policy | None
    engine: Engine
    sampling: Sampling
    optimizer: torch.optim.Optimizer
    parameters: list[torch.nn.Parameter]
    scorer: Scorer
    log: Log
    loss: Callable[..., Any]
    total_updates: int
    encode: Callable[[Problem], list[int]]
    decode: Callable[[list[list[int]]], list[str]]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return policy.named_weights(self.policy)


def prepare(config: Config, world: World) -> Run:
    """Builds a run; every rank calls it.

    Raises:
        ValueError, FileNotFoundError, OSError: naming the field, file or folder that will not do.
    """
    check(config, world.size)
    checks.check_algorithm(config)
    checks.check_packages(config)
    folder = Path(config.run.dir)
    parallel.first(lambda: open_folder(folder, config), world)
    task = build_task(config.task)
    checks.check_splits(config, task)
    context = checks.context_of(config)
    tokenizer = make_tokenizer(config, task)
    encode = make_encoder(config, task, tokenizer)
    log = Log(
        folder,
        config.log,
        main=world.main,
        total=config.run.steps,
        start=resumed_step(folder),
        config=config_file.flat(config),
    )
    problems = fitting(config, task, encode, log, checks.prompt_limit(config, context))
    checks.check_evaluated(config, task, encode, context)
    check_answer(config, task)
    checks.check_budgets(config, max(len(encode(problem)) for problem in problems))
    torch.manual_seed(config.run.seed + world.rank)
    attention = parallel.attention_of(config.model, config.parallel, world.device)
    if attention == "flash_attention_2" and not config.parallel.row_tokens:
        one_row = dataclasses.replace(config.parallel, row_tokens=config.parallel.max_tokens)
        config = dataclasses.replace(config, parallel=one_row)
    source = warm.start(config, world, task, tokenizer, encode, attention, log)
    needs = losses.needs(config)
    actor = policy.make_policy(
        config, world, open_model(source, config, world, attention), log_z=needs.log_z, value=needs.value
    )
    reference = None
    if needs.reference:
        frozen = open_model(source, config, world, attention)
        reference = policy.make_policy(config, world, frozen, reference=True, packing=actor.packing)
    if actor.packing != "positions":
        kind, how = type(actor.model).__name__, "an explicit block mask" if actor.packing == "mask" else "one a row"
        log.note(f"{kind} does not keep packed sequences apart by their positions: {how}")
    groups = [{**group, "base_lr": group["lr"]} for group in actor.groups(config)]
    o = config.optim
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)
    stop = stop_tokens(actor, tokenizer)
    updates = config.rollout.prompts // (config.algorithm.minibatch_prompts or config.rollout.prompts)
    return Run(
        config=config,
        world=world,
        folder=folder,
        task=task,
        tokenizer=tokenizer,
        problems=problems,
        policy=actor,
        reference=reference,
        engine=make_engine(config, actor, world),
        sampling=Sampling(config.rollout.max_new_tokens, config.rollout.temperature, stop),
        optimizer=optimizer,
        parameters=[p for group in groups for p in group["params"]],
        scorer=Scorer(config.task, task),
        log=log,
        loss=losses.make_loss(config),
        total_updates=config.run.steps * config.algorithm.epochs * updates,
        encode=encode,
        decode=make_decoder(tokenizer),
    )


def frozen_start(run: Run) -> Policy:
    """The model RL started from, for an evaluation of a run that keeps no reference; every rank calls it."""
    folder = run.folder / "start"
    source = str(folder) if parallel.first(folder.exists, run.world) else run.config.model.name
    attention = parallel.attention_of(run.config.model, run.config.parallel, run.world.device)
    model = open_model(source, run.config, run.world, attention)
    return policy.make_policy(run.config, run.world, model, reference=True, packing=run.policy.packing)


# ------------------------------------------------------------------------------------------------ the run folder


def open_folder(folder: Path, config: Config) -> None:
    """Makes the run folder and writes the resolved config; on rank 0.

    Raises:
        OSError: it cannot be written to.
        ValueError: it holds another run, or resuming would change what a step computes.
        FileNotFoundError: nothing to resume.
    """
    saved = folder / "config.toml"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable_{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise OSError(f"run.dir: cannot write to {folder}: {error}") from None
    if config.run.resume:
        if not saved.exists():
            raise FileNotFoundError(f"run.resume: {folder} holds no run (no config.toml in it)")
        if changes := config_file.changed(config_file.load(saved), config):
            raise ValueError(f"run.resume: these fields change what a step computes: {'; '.join(changes)}")
        newest = checkpoint.latest(folder)
        for name in LOGS:
            checkpoint.truncate(folder / name, checkpoint.log_size(newest, name))
    elif any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints")):
        if not config.run.overwrite:
            raise ValueError(f"run.dir: {folder} holds a run; use --resume, --run.overwrite True or another folder")
        for name in (*LOGS, "checkpoints", "start", "final", "plots", "tensorboard"):
            path = folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    partial = saved.with_suffix(".incomplete")
    partial.write_text(config_file.dumps(dataclasses.replace(config, run=dataclasses.replace(
        config.run, resume=False, overwrite=False))))  # fmt: skip
    os.replace(partial, saved)


def resumed_step(folder: Path) -> int:
    newest = checkpoint.latest(folder)
    return int(newest.name.removeprefix("step_")) if newest else 0


def resume(run: Run, kind: type[P]) -> P:
    """The loop's progress from the last checkpoint, with the models and optimiser restored; fresh without one."""
    newest = checkpoint.latest(run.folder) if run.config.run.resume else None
    if newest is None:
        run.engine.update_weights(run.weights(), 0)  # before the first step, where a broken path should show
        return kind()
    saved = checkpoint.load(newest, run.folder, run.policy, run.optimizer, run.world)
    run.engine.update_weights(run.weights(), saved["updates"])
    run.log.note(f"resumed from step {saved['step']}", saved["step"])
    return kind(**{f.name: saved[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def export(run: Run, folder: Path) -> None:
    """Writes the policy as a Hugging Face folder, log Z beside it in its own file; every rank calls it."""
    partial = folder.with_name(folder.name + ".incomplete")
    if run.world.main:
        shutil.rmtree(partial, ignore_errors=True)
    policy.save_folder(run.policy, run.tokenizer, partial, run.world)
    if run.world.main:
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(partial, folder)
    parallel.barrier(run.world)


# ------------------------------------------------------------------------------------------------ model and text


def open_model(source: str, config: Config, world: World, attention: str | None) -> torch.nn.Module:
    """The model, with weights where this rank needs them (rank 0, or every rank that does not shard)."""
    return policy.load_model(source, config.model, attention, empty=world.mesh is not None and not world.main)


def make_tokenizer(config: Config, task: Task) -> Any:
    """The model's own tokenizer, or the task's characters for a model that is built here."""
    if config.model.name:
        return policy.load_tokenizer(config.model.name, config.model)
    if task.alphabet is None:
        raise ValueError(f"model.name: task {task.name!r} has no alphabet of its own; name a Hugging Face model")
    return char_tokenizer(task.alphabet)


def make_encoder(config: Config, task: Task, tokenizer: Any) -> Callable[[Problem], list[int]]:
    """Problem -> prompt tokens; each problem is tokenized once.

    Raises:
        ValueError: chat messages, or `task.chat_template`, and a tokenizer without a chat template.
    """
    cache: dict[Any, list[int]] = {}
    wrap = task.alphabet is None and config.task.chat_template

    def tokens(prompt: str | list[dict[str, str]]) -> list[int]:
        if isinstance(prompt, str) and not wrap:
            return tokenizer(prompt, add_special_tokens=task.alphabet is None)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if config.task.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": config.task.system})
        if not tokenizer.chat_template:
            raise ValueError(
                f"task.chat_template: the tokenizer of {config.model.name!r} has no chat template; set it to false"
            )
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's, raised by the template itself
            raise checks.refusal(error, config) from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(problem: Problem) -> list[int]:
        key = problem.prompt if isinstance(problem.prompt, str) else repr(problem.prompt)
        if key not in cache:
            cache[key] = tokens(problem.prompt)
            if not cache[key]:
                raise ValueError(f"task: the prompt of problem {problem.id} has no tokens")
        return cache[key]

    return encode


def make_decoder(tokenizer: Any) -> Callable[[list[list[int]]], list[str]]:
    """Token ids -> texts without special tokens; ids past the tokenizer's (a padded vocabulary) become U+FFFD."""
    known = len(tokenizer)
    if getattr(tokenizer, "is_fast", False):
        fast = tokenizer.backend_tokenizer
        plain = partial(fast.decode_batch, skip_special_tokens=True)
    else:
        plain = partial(tokenizer.batch_decode, skip_special_tokens=True)

    def decode(rows: list[list[int]]) -> list[str]:
        texts = plain([[token for token in row if token < known] for row in rows])
        for i, row in enumerate(rows):
            if row and max(row) >= known:
                parts = [list(part) for _, part in itertools.groupby(row, lambda token: token >= known)]
                texts[i] = "".join("\ufffd" * len(part) if part[0] >= known else plain([part])[0] for part in parts)
        return texts

    return decode


def stop_tokens(actor: Policy, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end and those the model names."""
    generation = getattr(actor.model, "generation_config", None)
    named = getattr(generation, "eos_token_id", None) or []
    return tuple(sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}))


def fitting(
    config: Config, task: Task, encode: Callable[[Problem], list[int]], log: Log, limit: int | None
) -> list[Problem]:
    """The training problems whose prompts fit; those that do not are left out by name of their count.

    Raises:
        ValueError: there are none.
    """
    problems = list(task.problems("train"))
    kept = [p for p in problems if limit is None or len(encode(p)) <= limit]
    if not kept:
        r = config.rollout
        why = (
            ""
            if r.max_prompt_tokens
            else f"; with a response of {r.max_new_tokens} they exceed the model's context of "
        )
        why += f"{limit + r.max_new_tokens}" if why and limit is not None else ""
        raise ValueError(f"task: no training problem (of {len(problems)}) with a prompt of at most {limit} tokens{why}")
    if len(kept) < len(problems):
        log.note(f"{len(problems) - len(kept)} of {len(problems)} prompts are longer than {limit} tokens: left out")
    return kept


def check_answer(config: Config, task: Task) -> None:
    """Refuses responses that cannot hold the task's longest answer."""
    budget = config.rollout.max_new_tokens
    answer = task.max_response_tokens if not config.model.name else None
    if answer is not None and answer > budget:
        raise ValueError(f"rollout.max_new_tokens: {task.name}'s longest answer has {answer} tokens; got {budget}")


def make_engine(config: Config, actor: Policy, world: World) -> Engine:
    """The rollout engine named in the config."""
    from flowrl_kernels.trainer.rollout.hf import HFEngine

    return HFEngine(actor, batch=config.rollout.batch, device=world.device)
