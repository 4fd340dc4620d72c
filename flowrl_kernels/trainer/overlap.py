"""The next batch is sampled while this one trains: `rollout.overlap` updates behind, by rule and not by luck.

A step makes U updates. Batch s begins to train at the weights of update (s - 1) U and is sampled from those of update
max(0, (s - 1) U - overlap), which do not depend on how long anything took. So one batch at most is under way, the
weights are pushed when the engine is idle, and a checkpoint holds the batch that came after it: nothing is sampled
twice or lost when a run is killed.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flowrl_kernels.trainer import checkpoint, objective
from flowrl_kernels.trainer.batches import MicroBatch
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.records import Ahead, Progress, Prompts, Run
from flowrl_kernels.trainer.rollout import Generated, probe
from flowrl_kernels.trainer.rollout.faults import EngineError

# ------------------------------------------------------------------------------------------------ the batch ahead


def ask(run: Run, progress: Progress, prompts: Prompts) -> None:
    """Pushes the weights and has `prompts` sampled from them in the background; every rank calls it.

    What fails is kept for `take`: it may be the middle of a step, which no checkpoint can hold.
    """
    ahead = run.ahead = Ahead(prompts.step, progress.updates, prompts.numbers)
    try:
        push(run, progress)
        engine: Any = run.engine  # `checks.check_overlap` lets no other through
        n = run.config.rollout.samples
        ahead.wait = engine.ask(prompts.tokens, n, run.sampling, prompts.seed, prompts.numbers)
    except EngineError as error:
        ahead.error = error


def is_time(run: Run, progress: Progress) -> bool:
    """Whether the weights of this moment are those that the next step's batch is sampled from."""
    bound, step = run.config.rollout.overlap, progress.step + 1
    if not bound or step >= run.config.run.steps or (run.ahead is not None and run.ahead.step > step):
        return False
    return progress.updates == step * run.config.updates_a_step - bound


def hold(run: Run) -> None:
    """Waits for the batch under way, where there is one; every rank calls it."""
    ahead = run.ahead
    if ahead is None or ahead.wait is None:
        return
    wait, ahead.wait = ahead.wait, None
    try:
        ahead.out = wait()
    except EngineError as error:
        ahead.error = error


def take(run: Run, progress: Progress, prompts: Prompts) -> Generated:
    """The responses to a step's prompts: those sampled ahead, or else by the weights of now.

    Raises:
        EngineError: the engine failed, now or in the background, or the responses are not of the weights they
            should be.
    """
    hold(run)
    ahead, run.ahead = run.ahead, None
    if ahead is not None and ahead.error is not None:
        raise ahead.error
    if ahead is not None and ahead.out is not None and ahead.step == prompts.step:
        out = ahead.out
        probe.check_version(out, ahead.version)
    else:
        push(run, progress)
        out = now(run, prompts)
    run.staleness = progress.updates - out.version
    if not 0 <= run.staleness <= run.config.rollout.overlap:
        raise EngineError(
            f"rollout.overlap: responses of weights {out.version} came to be trained on at {progress.updates} updates; "
            f"they may be {run.config.rollout.overlap} behind"
        )
    return out


def now(run: Run, prompts: Prompts) -> Generated:
    """The responses to `prompts` by the weights that the engine has. Raises EngineError: it failed, or has others."""
    n = run.config.rollout.samples
    out = run.engine.generate(prompts.tokens, n, run.sampling, prompts.seed, prompts.numbers)
    probe.check_version(out, run.pushed)
    return out


def push(run: Run, progress: Progress) -> None:
    """Gives the engine, which is idle, the weights of now, where it has others."""
    if run.pushed != progress.updates:
        probe.push(run, progress.updates)


def in_step(run: Run, progress: Progress) -> None:
    """Before an evaluation: what is under way is waited for, and the engine gets the weights of now."""
    hold(run)
    push(run, progress)


# ------------------------------------------------------------------------------------------------ what a ratio is to


def by_sampler(config: Config) -> bool:
    """Whether the old log-probs are the sampler's own.

    The ratio is to the policy that sampled. Its weights are gone when its batch trains, so what it said then is taken,
    with the engine's rounding in it. With a correction (or a row that has one) they are computed by the weights that
    the step starts from, and the correction weighs the way from the sampler to those (docs/maths.md, eq. 39, 40).
    """
    a = config.algorithm
    return config.rollout.overlap > 0 and not (a.correction or a.tis_cap > 0 or objective.weighs_sampler(config))


def as_old(batches: list[MicroBatch]) -> None:
    """The sampler's log-probs as the old ones."""
    for batch in batches:
        batch.per_token["old"] = batch.per_token["sampler"]


# ------------------------------------------------------------------------------------------------ checkpoints


def tensors(run: Run) -> dict[str, Tensor]:
    """This rank's part of the batch ahead, for a checkpoint; none where there is none. Every rank calls it."""
    hold(run)
    ahead = run.ahead
    if ahead is None or ahead.out is None:
        return {}
    out = ahead.out
    at, numbers = torch.tensor([ahead.step, ahead.version]), torch.tensor(ahead.numbers)
    parts = {"tokens": out.tokens, "logp": out.logp, "length": out.length, "finished": out.finished}
    return {"at": at, "numbers": numbers, **parts}


def restore(run: Run, progress: Progress, numbers: list[int]) -> None:
    """Puts back the batch ahead of the checkpoint that the run was resumed from, whatever ranks wrote it.

    numbers: of this rank's prompts among all of the step's.
    """
    if run.saved is None or not run.config.rollout.overlap:
        return
    folder = checkpoint.folder(run.folder) / f"step_{progress.step}"
    found = [load_file(file) for file in sorted(folder.glob("ahead_*.safetensors"))]
    if not found:
        return
    n, width = run.config.rollout.samples, max(part["tokens"].shape[1] for part in found)
    rows: dict[int, int] = {}
    for part in found:
        for number in part["numbers"].tolist():
            rows[number] = len(rows)
    which = torch.tensor([rows[number] * n + j for number in numbers for j in range(n)])

    def joined(name: str) -> Tensor:
        parts = [part[name] for part in found]
        if parts[0].dim() == 2:
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        return torch.cat(parts)[which]

    step, version = found[0]["at"].tolist()
    length = joined("length")
    used = int(length.max())
    out = Generated(joined("tokens")[:, :used], joined("logp")[:, :used], length, joined("finished"), None, version)
    run.ahead = Ahead(step, version, numbers, out=out)
