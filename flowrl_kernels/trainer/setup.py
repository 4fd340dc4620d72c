"""Everything between a configuration and the first step: folder, task, models, engine, optimiser; and the way out."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowrl_kernels import dispatch
from flowrl_kernels.trainer import (
    checkpoint,
    checks,
    config_file,
    fingerprint,
    losses,
    parallel,
    policy,
    run_folder,
    warm,
)
from flowrl_kernels.trainer.config import Config, check
from flowrl_kernels.trainer.metrics import Log, check_sinks
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.rollout import Engine, Sampling
from flowrl_kernels.trainer.tasks import Problem, Task, build_task, char_tokenizer

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
    inputs: dict[str, str]  # hashes of the data, the task's code and the model
    saved: dict[str, Any] | None  # what the checkpoint says that this run was resumed from

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return policy.named_weights(self.policy)


class Held:
    """Notes that wait until there is a log."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def prepare(config: Config, world: World) -> Run:
    """Builds a run, and takes its folder when all that can be known before step 1 is; every rank calls it.

    Raises:
        ValueError, FileNotFoundError, OSError: naming the field, file or folder that will not do; the run folder is
            then as it was.
    """
    check(config, world.size)
    checks.check_algorithm(config)
    checks.check_packages(config)
    folder = Path(config.run.dir)
    found = run_folder.look(folder, config, world)
    held = Held()

    def settle() -> tuple[Any, ...]:
        check_sinks(config.log)
        check_impl(config, world)
        task = build_task(config.task)
        checks.check_splits(config, task)
        context = checks.context_of(config)
        tokenizer = make_tokenizer(config, task)
        encode = make_encoder(config, task, tokenizer)
        problems = fitting(config, task, encode, held, checks.prompt_limit(config, context))
        checks.check_evaluated(config, task, encode, context)
        check_answer(config, task)
        checks.check_budgets(config, max(len(encode(problem)) for problem in problems))
        return task, tokenizer, encode, problems, Scorer(config.task, task), losses.make_loss(config)

    task, tokenizer, encode, problems, scorer, loss = parallel.agree(settle, world)
    torch.manual_seed(config.run.seed + world.rank)
    attention = parallel.attention_of(config.model, config.parallel, world.device)
    if attention == "flash_attention_2" and not config.parallel.row_tokens:
        one_row = dataclasses.replace(config.parallel, row_tokens=config.parallel.max_tokens)
        config = dataclasses.replace(config, parallel=one_row)
    needs = losses.needs(config)

    def models(source: str) -> tuple[Policy, Policy | None]:
        actor = policy.make_policy(
            config, world, open_model(source, config, world, attention), log_z=needs.log_z, value=needs.value
        )
        reference = None
        if needs.reference:
            frozen = open_model(source, config, world, attention)
            reference = policy.make_policy(config, world, frozen, reference=True, packing=actor.packing)
        return actor, reference

    start = warm.find(config, world, task, tokenizer, encode, attention, found.mode == "resume", held)
    actor, reference = models(start.source) if start.source else (start.seedling, None)
    assert actor is not None
    saved = None
    if found.checkpoint:
        if not start.source:
            raise ValueError(f"run.resume: {folder / 'start'}, the model that RL started from, is gone")
        optimizer = make_optimizer(config, actor)
        inputs = _inputs(config, world, task, start.source)
        parallel.first(lambda: _unchanged(found, inputs, config), world)
        saved = checkpoint.load(found.checkpoint, folder, actor, optimizer, world)
    log = None
    try:
        parallel.first(lambda: run_folder.begin(folder, config, found), world)
        log = Log(
            folder,
            config.log,
            main=world.main,
            total=config.run.steps,
            start=found.step,
            restart=found.mode == "restart",
            config=config_file.flat(config),
        )
        for text in (*held.texts, *found.notes()):
            log.note(text, found.step)
        source = warm.settle(start, config, world, task, tokenizer, encode, log)
        if not start.source:
            actor, reference = models(source)
        if actor.packing != "positions":
            kind, how = type(actor.model).__name__, "an explicit block mask" if actor.packing == "mask" else "one a row"
            log.note(f"{kind} does not keep packed sequences apart by their positions: {how}", found.step)
        if not found.checkpoint:
            optimizer = make_optimizer(config, actor)
            inputs = _inputs(config, world, task, source)
        stop = stop_tokens(actor, tokenizer)
        updates = config.rollout.prompts // (config.algorithm.minibatch_prompts or config.rollout.prompts)
        run = Run(
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
            parameters=[p for group in optimizer.param_groups for p in group["params"]],
            scorer=scorer,
            log=log,
            loss=loss,
            total_updates=config.run.steps * config.algorithm.epochs * updates,
            encode=encode,
            decode=make_decoder(tokenizer),
            inputs=inputs,
            saved=saved,
        )
        # before the first step, where a broken path should show
        run.engine.update_weights(run.weights(), saved["updates"] if saved else 0)
        parallel.first(lambda: run_folder.commit(folder), world)
    except BaseException:
        if log is not None:
            log.close()
        if world.main:
            run_folder.rollback(folder, found)
        raise
    return run


def check_impl(config: Config, world: World) -> None:
    """Refuses an implementation that this device has not got."""
    try:
        dispatch.resolve("linear_logprob", config.parallel.impl, torch.empty(0, device=world.device))
    except RuntimeError as error:
        raise ValueError(f"parallel.impl: {error}") from None


def make_optimizer(config: Config, actor: Policy) -> torch.optim.Optimizer:
    groups = [{**group, "base_lr": group["lr"]} for group in actor.groups(config)]
    o = config.optim
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)


def _inputs(config: Config, world: World, task: Task, source: str) -> dict[str, str]:
    """Hashes of what the run is made from, on every rank; rank 0 reads."""
    names = (config.task.name, config.task.reward)
    return parallel.first(
        lambda: {
            "the data": fingerprint.of_data(task),
            "the task's code": fingerprint.of_code(task, names),
            "the model": fingerprint.of_model(source),
        },
        world,
    )


def _unchanged(found: run_folder.Found, inputs: dict[str, str], config: Config) -> None:
    assert found.checkpoint is not None
    before = checkpoint.facts(found.checkpoint).get("inputs", {})
    other = [name for name, digest in inputs.items() if before.get(name, digest) != digest]
    if other and not config.run.allow_changed:
        raise ValueError(f"run.resume: {' and '.join(other)} changed since {found.checkpoint.name} was written; "
                         "--run.allow_changed True resumes all the same")  # fmt: skip


def frozen_start(run: Run) -> Policy:
    """The model RL started from, for an evaluation of a run that keeps no reference; every rank calls it."""
    folder = run.folder / "start"
    source = str(folder) if parallel.first(folder.exists, run.world) else run.config.model.name
    attention = parallel.attention_of(run.config.model, run.config.parallel, run.world.device)
    model = open_model(source, run.config, run.world, attention)
    return policy.make_policy(run.config, run.world, model, reference=True, packing=run.policy.packing)


def resume(run: Run, kind: type[P]) -> P:
    """The loop's progress from the checkpoint that `prepare` restored; fresh without one."""
    if run.saved is None:
        return kind()
    return kind(**{f.name: run.saved[f.name] for f in dataclasses.fields(kind)})  # type: ignore[arg-type]


def export(run: Run, folder: Path) -> None:
    """Writes the policy as a Hugging Face folder, log Z beside it in its own file; every rank calls it."""
    partial = folder.with_name(folder.name + ".incomplete")
    if run.world.main:
        shutil.rmtree(partial, ignore_errors=True)
    policy.save_folder(
        run.policy, run.tokenizer, partial, run.world, stop=run.sampling.stop, dtype=run.config.checkpoint.dtype
    )
    parallel.first(lambda: run_folder.swap(partial, folder), run.world)


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
    config: Config, task: Task, encode: Callable[[Problem], list[int]], log: Log | Held, limit: int | None
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
