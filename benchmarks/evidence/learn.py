"""One cell: a method at one value of its dial trains a table on a listed task, and is measured exactly.

Cells that differ in seed, learning rate and dial alone train side by side: their tables are one tensor, their responses
one batch in which every cell has as many, and no row of ROWS mixes them. A cell's numbers are those it has alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.evidence import tasks
from benchmarks.evidence.batch import Batch
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.tasks import Task

LOG_Z = 4.0  # log Z is one number a prompt, off by nats at the start, and every residual waits for it


@dataclass(frozen=True)
class Cell:
    """What a run is made of; a row of the results is these and what came out."""

    task: str
    method: str
    dial: float
    lr: float  # of Adam for the table, falling to a hundredth along a cosine; log Z has LOG_Z times as much
    seed: int  # of the reference and of the draws
    updates: int = 1500
    samples: int = 64  # responses per prompt and update
    reuse: int = 1  # updates from each batch, each from a part of its own: rollouts are updates * samples either way
    stale: int = 0  # updates that a batch is old when its first part is used


class Drawn(NamedTuple):
    """Sampled strings: B = C * P * samples of them, a cell's together, then a prompt's."""

    which: Tensor  # [B] int64: the string
    old: Tensor  # [B, T] log-probs of its tokens under the policy that sampled


class Setting(NamedTuple):
    """What C cells on one task stand on, at some number of responses per prompt."""

    task: Task
    log_ref: Tensor  # [C, R] float64 of each cell's reference
    reference: Tensor  # [C, P, S, A] its log-probabilities
    draws: Sequence[torch.Generator]
    cell: Tensor  # [B] int64 of the responses in order
    prompt: Tensor  # [B] int64

    @property
    def group(self) -> Tensor:
        return self.cell * len(self.task.reward) + self.prompt

    def with_samples(self, samples: int) -> Setting:
        cells, prompts = len(self.log_ref), len(self.task.reward)
        cell = torch.arange(cells).repeat_interleave(prompts * samples)
        return self._replace(cell=cell, prompt=torch.arange(prompts).repeat_interleave(samples).repeat(cells))


def setting_of(task: Task, seeds: Sequence[int], samples: int) -> Setting:
    logits = torch.stack([task.reference(seed) for seed in seeds])
    steps = tasks.log_table(task.tree, logits)[:, None].expand(-1, len(task.reward), -1, -1).contiguous()
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    empty = torch.zeros(0, dtype=torch.int64)
    return Setting(task, tasks.log_probs(task.tree, logits), steps, draws, empty, empty).with_samples(samples)


def run(cell: Cell) -> dict:
    """The cell with its figures, the last ones and the way there at eight places."""
    return run_together([cell])[0]


def run_together(cells: Sequence[Cell]) -> list[dict]:
    """The same for cells that differ in seed, rate and (where the row mixes them) dial alone."""
    cell, row = cells[0], ROWS[cells[0].method]
    same = {"lr": cell.lr, "seed": cell.seed, **({"dial": cell.dial} if row.mixes else {})}
    if any(replace(other, **same) != cell for other in cells):
        raise ValueError(f"cells: wanted such that differ in {', '.join(same)} alone; got {list(cells)}")
    task = tasks.TASKS[cell.task]()
    here = setting_of(task, [c.seed for c in cells], cell.samples)
    whole = here.with_samples(cell.reuse * cell.samples)
    start = torch.stack([task.reference(c.seed) for c in cells])[:, None]  # [C, 1, S, A]
    learnt = _Learnt(start, len(task.reward), torch.tensor([c.lr for c in cells], dtype=torch.float64), row.log_z_rate)
    # Adam's step does not depend on a gradient's scale: rates of their own are scales of the parameters
    optimizer = torch.optim.Adam(learnt.parameters, lr=1.0, betas=(0.9, 0.99), eps=1e-12, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * update / cell.updates))
    )
    waiting = [sample(whole, here.reference) for _ in range(-(-cell.stale // cell.reuse))]
    parts: list[Drawn] = []
    marks = {round(cell.updates * (i + 1) / 8) for i in range(8)}
    curves: list[list[dict]] = [[] for _ in cells]
    dial = torch.tensor([c.dial for c in cells], dtype=torch.float64)[here.cell]
    targets = [(tasks.tilted(ref, task.reward, task.beta), None if row.own is None else row.own(task, ref, c.dial))
               for c, ref in zip(cells, here.log_ref)]  # fmt: skip
    began = time.process_time()
    for update in range(cell.updates):
        steps = tasks.log_table(task.tree, learnt.logits())  # [C, P, S, A]
        if not parts:
            waiting.append(sample(whole, steps))
            parts = split(here, waiting.pop(0), cell.reuse)
        fresh = cell.reuse == 1 and cell.stale == 0
        batch = batch_of(here, steps, learnt.log_z(), learnt.value(), parts.pop(0), fresh)
        loss = len(cells) * row.loss(batch, dial)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        if update + 1 in marks:
            log_policy = tasks.log_probs(task.tree, learnt.logits().detach())
            for curve, policy, (stated, own) in zip(curves, log_policy, targets):
                curve.append({"update": update + 1, **tasks.figures(task, policy, stated, own)})
    seconds = round((time.process_time() - began) / len(cells), 3)
    made = []
    for c, curve, log_z, ref in zip(cells, curves, learnt.log_z().detach(), here.log_ref):
        out = {**asdict(c), **curve[-1], "curve": curve, "seconds": seconds}
        if row.log_z is not None:
            out["log_z_error"] = float((log_z - row.log_z(task, ref, c.dial)).abs().mean())
        made.append(out)
    return made


class _Learnt:
    """What C cells learn, in units of each cell's rate."""

    def __init__(self, start: Tensor, prompts: int, rates: Tensor, log_z_rate: float) -> None:
        cells, _, places, choices = start.shape
        shapes = ((cells, prompts, places, choices), (cells, prompts), (cells, prompts, places))
        self.parameters = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        self.start, self.rates, self.log_z_rates = start, rates, LOG_Z * log_z_rate * rates

    def logits(self) -> Tensor:
        return self.start + self.rates[:, None, None, None] * self.parameters[0]

    def log_z(self) -> Tensor:
        return self.log_z_rates[:, None] * self.parameters[1]

    def value(self) -> Tensor:
        return self.rates[:, None, None] * self.parameters[2]


def sample(here: Setting, steps: Tensor) -> Drawn:
    """A string for every response, by steps [C, P, S, A]."""
    which = walk(here, steps, here.group, torch.zeros_like(here.cell))
    return Drawn(which, along(here, steps.detach(), which))


def walk(here: Setting, steps: Tensor, group: Tensor, at: Tensor) -> Tensor:
    """Strings from the places `at` down the tree, by steps [C, P, S, A] of their cell and prompt. [B] int64"""
    tree = here.task.tree
    places, choices = tree.child.shape
    upto = steps.detach().exp().cumsum(-1).reshape(-1, choices)[:, :-1]  # the last choice is what is left
    child = tree.child.reshape(-1)
    most = tree.allowed.sum(-1) - 1  # rounding must not lead to a choice that a place lacks
    row = group * places
    # every cell draws as many numbers as it has strings, from its own generator
    shares = torch.bincount(group // len(here.task.reward), minlength=len(here.draws)).tolist()
    uniform = torch.cat([
        torch.rand(tree.depth, share, dtype=torch.float64, generator=draw)
        for draw, share in zip(here.draws, shares)
    ], 1)  # fmt: skip
    for u in uniform:
        going = at.clamp_min(0)
        chosen = (u[:, None] >= upto[row + going]).sum(-1).minimum(most[going])
        at = torch.where(at < 0, at, child[going * choices + chosen])
    return -1 - at


def split(here: Setting, drawn: Drawn, parts: int) -> list[Drawn]:
    """A batch as `parts` batches, each with as many responses of every prompt."""
    if parts == 1:
        return [drawn]
    groups = len(here.log_ref) * len(here.task.reward)
    which = drawn.which.reshape(groups, parts, -1)
    old = drawn.old.reshape(groups, parts, -1, drawn.old.shape[-1])
    return [Drawn(which[:, i].reshape(-1), old[:, i].flatten(0, 1)) for i in range(parts)]


def along(here: Setting, steps: Tensor, which: Tensor) -> Tensor:
    """What `steps` [C, P, S, A] gives the tokens of strings [B]: [B, T], 0 after the end."""
    tree = here.task.tree
    places, choices = tree.child.shape
    entry = (tree.place * choices + tree.token.clamp_min(0))[which] + (here.group * places * choices)[:, None]
    picked = steps.reshape(-1).gather(0, entry.reshape(-1)).reshape(entry.shape)
    return picked.masked_fill((tree.token == tasks.END)[which], 0.0)


def batch_of(here: Setting, steps: Tensor, log_z: Tensor, value: Tensor, drawn: Drawn, fresh: bool) -> Batch:
    """steps: [C, P, S, A]; log_z: [C, P]; value: [C, P, S]; `fresh`: the policy that sampled is this one."""
    task, which, prompt, group = here.task, drawn.which, here.prompt, here.group
    mask = (task.tree.token != tasks.END)[which]
    places = len(task.tree.child)

    def chosen(table: Tensor) -> Tensor:
        """Of a table [C, P, S]: [B, T]."""
        at = group[:, None] * places + task.tree.place[which]
        return table.reshape(-1).gather(0, at.reshape(-1)).reshape(at.shape).masked_fill(~mask, 0.0)

    def entropy() -> Tensor:
        return chosen(-(steps.exp() * steps.masked_fill(~task.tree.allowed, 0.0)).sum(-1))

    def completed(times: int) -> Tensor:
        """Where there is a choice; a token without one has what the next one has, or the response's reward."""
        choice = mask & (task.tree.place[which] < places - 1)
        at = task.tree.place[which][choice].repeat_interleave(times)  # by cell, prompt, response
        of = group[:, None].expand_as(mask)[choice].repeat_interleave(times)
        reward = task.reward[of % len(task.reward), walk(here, steps, of, at)]
        value = torch.where(mask, task.reward[prompt, which][:, None], 0.0)
        value[choice] = reward.reshape(-1, times).mean(-1)
        for t in reversed(range(mask.shape[1] - 1)):
            value[:, t] = torch.where(choice[:, t] | ~mask[:, t + 1], value[:, t], value[:, t + 1])
        return value

    return Batch(
        along(here, steps, which), entropy, along(here, here.reference, which), None if fresh else drawn.old, mask,
        task.reward[prompt, which], task.right[prompt, which], which, group, here.cell, log_z.reshape(-1)[group],
        lambda: chosen(value), completed,
    )  # fmt: skip
