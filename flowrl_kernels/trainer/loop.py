"""The training loop: `train(config)` from prompts to an evaluated, exported model.

One step reads top to bottom in `_steps`; everything else here is what its lines stand for.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flowrl_kernels.trainer import (
    algorithms,
    checkpoint,
    config_file,
    dynamic,
    measure,
    mismatch,
    objective,
    overlap,
    parallel,
    run_folder,
    shaping,
    stop,
)
from flowrl_kernels.trainer.batches import MicroBatch, stand_in
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parts import frozen_start
from flowrl_kernels.trainer.plot import plot_runs
from flowrl_kernels.trainer.policy import Scored
from flowrl_kernels.trainer.prompts import prompt_numbers
from flowrl_kernels.trainer.records import Lap, Progress, Prompts, Result, Rollouts, Run, Shaped, Update
from flowrl_kernels.trainer.rollout import probe
from flowrl_kernels.trainer.rollout.faults import EngineError
from flowrl_kernels.trainer.run import export, prepare, resume

SHOWN = 32  # responses scored for the log alone


class NotFinite(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not finite."""


def train(config: Config) -> dict[str, float]:
    """Runs a whole configuration and returns the final evaluation's figures (on every rank).

    Raises:
        ValueError, FileNotFoundError, RuntimeError: settings or data that cannot work, before any step.
        NotFinite: `run.max_bad_updates` updates in a row were not finite.
        EngineError: the rollout engine is gone, or out of step; the last whole step is saved.
        stop.Interrupted: SIGINT or SIGTERM; a step that had begun was finished and saved.
    """
    config = config_file.expand(config)
    with stop.watch() as watch:
        world = parallel.start(config.run, config.parallel)
        try:
            run = prepare(config, world)
            progress = resume(run)
            overlap.restore(run, progress, share(config, world))
            try:
                with watch.waiting():
                    _steps(run, progress, watch)
                return _finish(run, progress)
            except EngineError:
                if progress.step:  # of the last whole step: its weights and optimiser are good
                    save(run, progress)
                raise
            except KeyboardInterrupt as signal:
                code = getattr(signal, "code", 130)
                left = f"stopped after step {progress.step}; {run_folder.what_is_left(run.folder)}"
                raise stop.Interrupted(left, code - 128) from None
            finally:
                run.engine.close()
                run.scorer.close()
                run.log.close()
        finally:
            parallel.stop()


def _steps(run: Run, progress: Progress, watch: stop.Watch) -> None:
    """The loop. An evaluation follows its step's checkpoint, and is made up for by a run resumed from there."""
    config, needs = run.config, objective.needs(run.config)
    every = config.checkpoint.every
    while True:
        if progress.evaluated < progress.step:
            if split := due(config, progress.step):
                split = split if split == "valid" else measure.last_split(run)
                overlap.in_step(run, progress)
                run.log.evaluation(progress.step, split, measure.evaluation(run, split))
            progress.evaluated = progress.step
        leave(run, progress, watch)
        if progress.step >= config.run.steps:
            return
        step, lap = progress.step + 1, Lap()
        rollouts = collect(run, progress)
        if not config.rollout.dynamic:
            run.engine.release()
        lap("rollout")
        ahead(run, progress, lap)
        rollouts.reward = score_rewards(run, rollouts, step)
        lap("reward")
        extra: dict[str, float] = {}
        if config.rollout.dynamic:
            rollouts, extra = dynamic.refill(run, rollouts, partial(again, run, progress))
            run.engine.release()
            lap("dynamic")
        if run.token_order is not None:
            run.token_order.add(rollouts.responses, run.world)
            rollouts.order = run.token_order.order().to(run.world.device)
        shaped = shaping.shape(config, rollouts, run.world)
        updates = pack_updates(run, rollouts, shaped)
        batches = [batch for update in updates for batch in update.batches]
        if run.reference is not None:
            score(run, run.reference, batches, "ref")
        behaviour = overlap.by_sampler(config)
        if behaviour:
            if needs.value or objective.log_z_kind(config) == "group":
                score(run, run.policy, batches, "now")
            overlap.as_old(batches)
        elif needs.old:
            score(run, run.policy, batches, "old")
            if mismatch.rejects(config):
                counts = mismatch.recount(config, [update.batches for update in updates], run.world)
                for update, (tokens, sequences) in zip(updates, counts):
                    update.tokens, update.sequences = tokens, sequences
        shown = batches
        if behaviour or (not needs.old and algorithms.of(config).residual):  # not known: of a few, for the log
            shown = a_few(run, rollouts, shaped)
            score(run, run.policy, shown, "now")
        towards = batches  # where the KL to the reference is read off
        if config.log.kl and run.reference is None:
            towards = shown if shown is not batches else a_few(run, rollouts, shaped)
            score(run, frozen_start(run), towards, "ref")
        shaping.finish(config, batches, run.world)
        lap("score")
        results = []
        for update in updates * config.algorithm.epochs:
            ahead(run, progress, lap)
            results.append(apply(run, progress, update))
        lap("update")
        progress.step = step
        try:
            if not config.rollout.overlap:
                probe.push(run, progress.updates)
        finally:  # what it learned is learned, whatever the engine says
            lap("push")
            figures = measure.of_step(run, rollouts, updates, results, progress, lap, shown, towards)
            run.log.step(step, figures | extra | run.engine_figures())
        if step == 1 or step % config.log.samples_every == 0:
            run.log.samples(step, measure.samples(run, rollouts, config.log.samples))
        if step < config.run.steps and every and step % every == 0:
            save(run, progress)
        leave(run, progress, watch)


def due(config: Config, step: int) -> str:
    """The split to evaluate after `step` steps: "valid" on the way, "last" before the first; empty: none."""
    if step == 0:
        return "last" if config.eval.start else ""
    on_the_way = config.eval.every and step % config.eval.every == 0 and step < config.run.steps
    return "valid" if on_the_way else ""


def leave(run: Run, progress: Progress, watch: stop.Watch) -> None:
    """Ends a run that a signal reached, on any rank, behind a checkpoint; every rank calls it."""
    number = watch.number
    if run.world.size > 1:
        number = int(parallel.total(torch.tensor([number], device=run.world.device), run.world, "max"))
    if number:
        if progress.step:
            save(run, progress)
        raise stop.Interrupted("", number)


# ------------------------------------------------------------------------------------------------ pieces of a step


def share(config: Config, world: parallel.World) -> list[int]:
    """This rank's prompts of a step, as numbers into it: an even slice of every update's."""
    size = config.algorithm.minibatch_prompts or config.rollout.prompts
    mine = size // world.size
    starts = range(world.rank * mine, config.rollout.prompts, size)
    return [i for start in starts for i in range(start, start + mine)]


def prompts_of(run: Run, step: int, slots: list[int] | None = None, extra: int = 0) -> Prompts:
    """This rank's prompts of a step, and the seed of their responses.

    slots, extra: only these of its prompts, those of an extra round of dynamic sampling.
    """
    config, train = run.config, run.problems
    asked = prompt_numbers(config.run.seed, step, config.rollout.prompts, len(train), run.mixture, extra)
    numbers = share(config, run.world) if slots is None else slots
    problems = [train[asked[i]] for i in numbers]
    tokens = [run.text.encode(problem) for problem in problems]
    return Prompts(step, problems, numbers, tokens, config.run.seed * 2_000_003 + step + extra * 10**12)


def ahead(run: Run, progress: Progress, lap: Lap) -> None:
    """Has the next step's responses sampled in the background, where these are the weights to sample them from."""
    if overlap.is_time(run, progress):
        lap("update")
        overlap.ask(run, progress, prompts_of(run, progress.step + 2))
        lap("push")


def collect(run: Run, progress: Progress, slots: list[int] | None = None, extra: int = 0) -> Rollouts:
    """`rollout.samples` responses to each of this rank's prompts of the next step, or of an extra round of it."""
    prompts = prompts_of(run, progress.step + 1, slots, extra)
    out = overlap.take(run, progress, prompts) if slots is None else overlap.now(run, prompts)
    if run.sampling.truncated and out.kept is None:
        engine = run.config.rollout.engine
        raise RuntimeError(f"rollout.engine: {engine!r} did not return the tokens that its draws were left with")
    n, tokens = run.config.rollout.samples, out.tokens.numpy()
    lengths = out.length.tolist()
    return Rollouts(
        problems=[problem for problem in prompts.problems for _ in range(n)],
        numbers=[i * n + j for i in prompts.numbers for j in range(n)],
        prompts=[array for array in map(np.asarray, prompts.tokens) for _ in range(n)],
        responses=[tokens[b, :length] for b, length in enumerate(lengths)],
        logp=out.logp,
        finished=out.finished,
        texts=run.text.decode([tokens[b, :length].tolist() for b, length in enumerate(lengths)]),
        kept=out.kept,
    )


def again(run: Run, progress: Progress, slots: list[int], extra: int) -> Rollouts:
    """Responses to an extra round's prompts for these slots, scored."""
    rollouts = collect(run, progress, slots, extra)
    rollouts.reward = score_rewards(run, rollouts, progress.step + 1)
    return rollouts


def score_rewards(run: Run, rollouts: Rollouts, step: int) -> list[float | None]:
    """Rewards of this rank's responses; None for one that could not be scored, which is named in the log."""
    rewards = run.scorer.score(rollouts.problems, rollouts.texts)
    rollouts.parts = run.scorer.parts
    broken = ~rollouts.logp.isfinite().all(-1)
    if broken.any():  # an engine that overflowed: its tokens cannot be weighed
        run.log.note(f"{int(broken.sum())} responses came with log-probabilities that are not finite", step)
        rewards = [None if bad else reward for reward, bad in zip(rewards, broken.tolist())]
        rollouts.logp = rollouts.logp.nan_to_num(0.0, 0.0, 0.0)
    if missing := rewards.count(None):
        why = run.scorer.last_error or "the reward gave None"
        run.log.note(f"{missing} of {len(rewards)} responses could not be scored: {why}", step)
    if step == 1:  # a verifier that works scores something of the first batch
        found = parallel.gather((len(rewards) - missing, run.scorer.last_error), run.world)
        if not sum(count for count, _ in found):
            why = next((error for _, error in found if error), "the reward gave None")
            raise ValueError(f"task.reward: none of the first step's responses could be scored: {why}")
    return rewards


def pack_updates(run: Run, rollouts: Rollouts, shaped: Shaped) -> list[Update]:
    """Packs each update's sequences; every rank ends up with the same number of micro-batches."""
    config, world = run.config, run.world
    a = config.algorithm
    count = config.rollout.prompts // (a.minibatch_prompts or config.rollout.prompts)
    size = len(rollouts.problems) // count
    packed = []
    for first in range(0, len(rollouts.problems), size):
        part = slice(first, first + size)
        keep = [i for i in range(size) if shaped.keep[first + i]]
        together = config.rollout.samples if objective.whole_groups(config) else 1
        batches = run.packed(keep, rollouts.prompts[part], rollouts.responses[part], run.policy, together)
        for batch in batches:
            fill(batch, rollouts, shaped, batch.which.cpu() + first)
        packed.append(batches)
    live = [[batch for batch in batches if batch.live] for batches in packed]
    sums = torch.tensor([[sum(b.tokens for b in bs), sum(b.sequences for b in bs)] for bs in live])
    sums = parallel.total(sums.to(world.device), world)
    most = parallel.total(torch.tensor([len(bs) for bs in packed], device=world.device), world, "max")
    for i, batches in enumerate(packed):
        part = slice(i * size, (i + 1) * size)
        while len(batches) < most[i]:
            batches.append(stand_in(rollouts.prompts[part], rollouts.responses[part], world.device))
            fill(batches[-1], rollouts, shaped, batches[-1].which.cpu() + i * size)
    return [Update(batches, int(t), int(s)) for batches, (t, s) in zip(packed, sums.tolist())]


def a_few(run: Run, rollouts: Rollouts, shaped: Shaped) -> list[MicroBatch]:
    """One micro-batch of the first responses that take part, on every rank."""
    keep = [i for i, kept in enumerate(shaped.keep) if kept][:SHOWN]
    batches = run.packed(keep, rollouts.prompts, rollouts.responses, run.policy)[:1]
    for batch in batches:
        fill(batch, rollouts, shaped, batch.which.cpu())
    return batches


def fill(batch: MicroBatch, rollouts: Rollouts, shaped: Shaped, rows: Tensor) -> None:
    """Adds what is known per sequence (`shaped`) and per sampled token to a micro-batch."""
    device = batch.ids.device
    # a stand-in may be of a sequence without a reward; 0 * NaN would not be 0
    batch.per_sequence = {name: values[rows].nan_to_num().to(device) for name, values in shaped.values.items()}
    lengths = batch.cu_seqlens.diff().tolist()
    sampled = [rollouts.logp[row, :n] for row, n in zip(rows.tolist(), lengths)]
    batch.per_token["sampler"] = torch.cat(sampled).to(device)
    names = [(rollouts.numbers[row] << 32) + torch.arange(n) for row, n in zip(rows.tolist(), lengths)]
    batch.rows, batch.order = torch.cat(names).to(device), rollouts.order
    if rollouts.kept is not None:
        first = np.cumsum([0, *map(len, rollouts.responses)])
        own = [torch.arange(n) + int(first[row]) for row, n in zip(rows.tolist(), lengths)]
        batch.kept = rollouts.kept.rows(torch.cat(own))  # on the CPU, where what is in them is known without a wait


@torch.no_grad()
def score(run: Run, policy: Scored, batches: list[MicroBatch], which: str) -> None:
    """Log-probabilities under `policy` on the very micro-batches that training will see."""
    for batch in batches:
        out = policy(objective.score_head(run.config, batch), batch.ids, batch.positions, branch=batch.branch)
        batch.per_token[which] = out.logp
        if out.value is not None:
            batch.per_token["value"] = out.value


def apply(run: Run, progress: Progress, update: Update) -> Result:
    """Gradient of one update over its micro-batches, clipped and applied; skipped where it is not finite.

    The learning rate follows the updates that were planned: one that is skipped, or has nothing to learn from, counts.
    """
    config, world = run.config, run.world
    factor = learning_rate(config, progress.updates, run.total_updates)
    progress.updates += 1
    if update.sequences == 0:
        run.log.note("no response of this update has anything to learn from", progress.step + 1)
        return Result([], 0.0, 0.0, config.optim.lr * factor, False)
    run.optimizer.zero_grad(set_to_none=True)
    outputs = []
    value = torch.zeros((), device=world.device)
    for batch in update.batches:
        head = run.loss(batch, tokens=update.tokens, sequences=update.sequences, update=progress.updates)
        out = run.policy(head, batch.ids, batch.positions, branch=batch.branch)
        # FSDP averages gradients over ranks; the normalisers already count all of them
        (out.loss * (world.size if batch.live else 0.0)).backward()
        if batch.live:
            value += out.loss.detach()
            outputs.append((out, batch))
    norm = parallel.clip(run.parameters, config.optim.max_grad_norm)
    loss, grad_norm = parallel.total(torch.stack([value, norm.to(value.device) / world.size]), world).tolist()
    for group in run.optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    bad = not (math.isfinite(loss) and math.isfinite(grad_norm))
    if bad:
        progress.skipped += 1
        progress.bad_in_a_row += 1
        message = f"update {progress.updates} skipped: loss {loss}, gradient norm {grad_norm}"
        run.log.note(message, progress.step + 1)
        if progress.bad_in_a_row >= config.run.max_bad_updates:
            raise NotFinite(f"{message}; that is {progress.bad_in_a_row} in a row (run.max_bad_updates)")
    else:
        progress.bad_in_a_row = 0
        run.optimizer.step()
    return Result(outputs, loss, grad_norm, config.optim.lr * factor, bad)


def learning_rate(config: Config, update: int, total: int) -> float:
    """Share of the learning rate at update `update` (from 0)."""
    o = config.optim
    rise = min(1.0, (update + 1) / (o.warmup + 1))
    if o.schedule == "constant":
        return rise
    left = 1.0 - min(1.0, max(0, update - o.warmup) / max(1, total - o.warmup))
    if o.schedule == "wsd":
        return rise * min(1.0, 5.0 * left)
    return rise * (left if o.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left)))


def save(run: Run, progress: Progress) -> None:
    """A checkpoint; a disk that is full costs this checkpoint and a note, not the run."""
    try:
        checkpoint.save(
            run.folder, progress.step, run.policy, run.optimizer, vars(progress), run.world,
            run.config.checkpoint.keep, run.inputs, overlap.tensors(run),
            None if run.token_order is None else run.token_order.counts,
        )  # fmt: skip
    except checkpoint.CheckpointError as error:
        run.log.note(str(error), progress.step)


def _finish(run: Run, progress: Progress) -> dict[str, float]:
    """Last checkpoint, final evaluation, exported model, plots; resuming a whole run does this again."""
    save(run, progress)
    step, split = progress.step, measure.last_split(run)
    overlap.in_step(run, progress)
    figures = measure.evaluation(run, split, last=True)
    run.log.evaluation(step, split, figures)
    run.log.final(step, figures)
    run.log.ending(f"{run.config.algorithm.name} after {step} steps, {split} split", figures)
    if run.config.checkpoint.export:
        export(run, run.folder / "final")
    if run.config.log.plots and run.world.main:
        pictures = plot_runs([run.folder])
        run.log.note(f"{len(pictures)} plots in {run.folder / 'plots'}", step)
    return figures
