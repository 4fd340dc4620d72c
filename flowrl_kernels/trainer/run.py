"""From a configuration to a run that can take its first step, and the way out: checks, folder, models, resume, export.

Everything that can be known is settled before the run folder is taken; what fails then leaves it as it was.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from flowrl_kernels.core import dispatch
from flowrl_kernels.trainer import (
    budget,
    checkpoint,
    checks,
    config_file,
    fingerprint,
    objective,
    parallel,
    policy,
    run_folder,
    warm,
)
from flowrl_kernels.trainer.config import Config, check, listed
from flowrl_kernels.trainer.log import Log
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.parts import make_engine, make_optimizer, make_stops, make_text, open_model, stop_tokens
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.prompts import Mixture, mixture_of
from flowrl_kernels.trainer.records import Job, Progress, Run, Text
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.rollout import Sampling, probe
from flowrl_kernels.trainer.rollout.stops import Stops
from flowrl_kernels.trainer.tasks import Problem, build_task
from flowrl_kernels.trainer.token_order import TokenOrder


@dataclasses.dataclass(frozen=True)
class Settled:
    """What is known, and found to fit together, before anything is written."""

    text: Text
    problems: list[Problem]
    scorer: Scorer
    loss: objective.Loss
    notes: list[str]  # for the log, when there is one
    stops: Stops | None
    mixture: Mixture | None


def settle(config: Config, world: World) -> Settled:
    """Raises ValueError, FileNotFoundError: naming the field or file that will not do."""
    checks.check_packages(config)
    checks.check_lora(config)
    check_impl(config, world)
    task = build_task(config.task)
    checks.check_splits(config, task)
    checks.check_stop(config, task)
    context = checks.context_of(config)
    text = make_text(config, task)
    problems, notes = checks.fitting(config, task, text.encode, checks.prompt_limit(config, context))
    checks.check_evaluated(config, task, text.encode, context)
    checks.check_answer(config, task)
    checks.check_budgets(config, max(len(text.encode(problem)) for problem in problems))
    return Settled(
        text=text,
        problems=problems,
        scorer=Scorer(config.task, task),
        loss=objective.make_loss(config),
        notes=notes,
        stops=make_stops(config, text),
        mixture=mixture_of(config.task, task, problems),
    )


def prepare(config: Config, world: World) -> Run:
    """Builds a run, and takes its folder when all that can be known before step 1 is; every rank calls it.

    Raises:
        ValueError, FileNotFoundError, OSError: naming the field, file or folder that will not do; the run folder is
            then as it was.
    """
    check(config, world.size)
    checks.check_algorithm(config)
    checks.check_engine(config, world.size)
    folder = Path(config.run.dir)
    found = run_folder.look(folder, config, world)
    settled = parallel.agree(lambda: settle(config, world), world)
    torch.manual_seed(config.run.seed + world.rank)
    attention = parallel.attention_of(config.model, config.parallel, world.device)
    if attention == "flash_attention_2":  # transformers reads boundaries off positions in a batch of one row only
        if config.parallel.row_tokens not in (0, config.parallel.max_tokens):
            raise ValueError(
                "parallel.row_tokens: wanted 0 with flash-attention, which keeps packed sequences apart in one row a "
                f"micro-batch; got {config.parallel.row_tokens}"
            )
        one_row = dataclasses.replace(config.parallel, row_tokens=config.parallel.max_tokens)
        config = dataclasses.replace(config, parallel=one_row)
    job = Job(config, world, settled.text, attention)
    start, notes = warm.find(job, found.mode == "resume")
    actor, reference = make_models(job, start.source) if start.source else (start.seedling, None)
    assert actor is not None
    saved = None
    if found.checkpoint:
        if not start.source:
            raise ValueError(f"run.resume: {folder / 'start'}, the model that RL started from, is gone")
        optimizer = make_optimizer(config, actor)
        inputs = _inputs(job, start.source)
        parallel.first(lambda: _unchanged(found, inputs, config), world)
        saved = checkpoint.load(found.checkpoint, folder, actor, optimizer, world)
    log = run = None
    try:
        parallel.first(lambda: run_folder.begin(folder, config, found), world)
        log = Log(
            folder,
            config.log,
            main=world.main,
            total=config.run.steps,
            restart=found.mode == "restart",
            config=config_file.flat(config),
        )
        for note in (*settled.notes, *notes, *found.notes()):
            log.note(note, found.step)
        source = warm.settle(start, job, log)
        if not start.source:
            actor, reference = make_models(job, source)
        if actor.packing != "positions":
            kind, how = type(actor.model).__name__, "an explicit block mask" if actor.packing == "mask" else "one a row"
            log.note(f"{kind} does not keep packed sequences apart by their positions: {how}", found.step)
        config, fits = budget.fitted(config, actor, world)
        if fits:
            checks.check_budgets(config, max(len(settled.text.encode(problem)) for problem in settled.problems))
            log.note(fits[0], found.step)
        if not found.checkpoint:
            optimizer = make_optimizer(config, actor)
            inputs = _inputs(job, source)
        stop = stop_tokens(actor, settled.text.tokenizer)
        run = Run(
            config=config,
            world=world,
            folder=folder,
            text=settled.text,
            problems=settled.problems,
            policy=actor,
            reference=reference,
            engine=make_engine(config, actor, world),
            sampling=training_sampling(config, stop, settled.stops),
            optimizer=optimizer,
            scorer=settled.scorer,
            log=log,
            loss=settled.loss,
            mixture=settled.mixture,
            inputs=inputs,
            saved=saved,
            token_order=token_order(config, actor, found.checkpoint),
        )
        if found.checkpoint and run.token_order is not None and not run.token_order.counts.any():
            log.note(f"{found.checkpoint.name} has no counts of sampled tokens: their order starts anew", found.step)
        # before the first step, where a broken path should show
        probe.push(run, saved["updates"] if saved else 0)
        parallel.first(lambda: run_folder.commit(folder), world)
    except BaseException:
        if run is not None:
            run.engine.close()
        if log is not None:
            log.close()
        if world.main:
            run_folder.rollback(folder, found)
        raise
    return run


def training_sampling(config: Config, stop: tuple[int, ...], stops: Stops | None) -> Sampling:
    """How a step draws its responses."""
    r = config.rollout
    return Sampling(r.max_new_tokens, r.temperature, stop, r.top_p, r.top_k, r.min_p, stops)


def token_order(config: Config, actor: Policy, saved: Path | None) -> TokenOrder | None:
    """The order that a sampled backward cuts the vocabulary in, as a checkpoint left it; None without such a backward.

    Raises:
        ValueError: the checkpoint's is of another head.
    """
    if config.parallel.share == 0:
        return None
    return TokenOrder(actor.head.weight.shape[0], checkpoint.counts(saved))


def make_models(job: Job, source: str) -> tuple[Policy, policy.Scored | None]:
    """The policy with what the algorithm hangs on it, and the frozen reference where it needs one."""
    config, world, needs = job.config, job.world, objective.needs(job.config)
    model = open_model(source, config, world, job.attention)
    adapters = config.lora.rank > 0
    actor = policy.make_policy(config, world, model, log_z=needs.log_z, value=needs.value, adapters=adapters)
    if not needs.reference or adapters:
        return actor, policy.Frozen(actor) if needs.reference else None
    frozen = open_model(source, config, world, job.attention)
    return actor, policy.make_policy(config, world, frozen, reference=True, packing=actor.packing)


def check_impl(config: Config, world: World) -> None:
    """Refuses an implementation that this device has not got."""
    try:
        dispatch.resolve("linear_logprob", config.parallel.impl, torch.empty(0, device=world.device))
    except RuntimeError as error:
        raise ValueError(f"parallel.impl: {error}") from None


def _inputs(job: Job, source: str) -> dict[str, str]:
    """Hashes of what the run is made from, on every rank; rank 0 reads."""
    task, names = job.text.task, (job.config.task.name, *listed(job.config.task.reward))
    return parallel.first(
        lambda: {
            "the data": fingerprint.of_data(task),
            "the task's code": fingerprint.of_code(task, names),
            "the model": fingerprint.of_model(source),
        },
        job.world,
    )


def _unchanged(found: run_folder.Found, inputs: dict[str, str], config: Config) -> None:
    assert found.checkpoint is not None
    before = checkpoint.facts(found.checkpoint).get("inputs", {})
    other = [name for name, digest in inputs.items() if before.get(name, digest) != digest]
    if other and not config.run.allow_changed:
        raise ValueError(f"run.resume: {' and '.join(other)} changed since {found.checkpoint.name} was written; "
                         "--run.allow_changed True resumes all the same")  # fmt: skip


def resume(run: Run) -> Progress:
    """The loop's progress from the checkpoint that `prepare` restored; fresh without one."""
    if run.saved is None:
        return Progress()
    return Progress(**{f.name: run.saved[f.name] for f in dataclasses.fields(Progress)})


def export(run: Run, folder: Path) -> None:
    """Writes the policy as a Hugging Face folder, log Z beside it in its own file; every rank calls it."""
    partial = folder.with_name(folder.name + ".incomplete")
    if run.world.main:
        shutil.rmtree(partial, ignore_errors=True)
    policy.save_folder(
        run.policy, run.text.tokenizer, partial, run.world, stop=run.sampling.stop, dtype=run.config.checkpoint.dtype
    )
    parallel.first(lambda: run_folder.swap(partial, folder), run.world)
