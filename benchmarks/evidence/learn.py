"""One cell: a method at one value of its dial trains a table on a listed task, and is measured exactly."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.evidence import tasks
from benchmarks.evidence.rows import ROWS, Batch
from benchmarks.evidence.tasks import Task

LOG_Z = 4.0  # log Z is one number a prompt, off by nats at the start, and every residual waits for it


@dataclass(frozen=True)
class Cell:
    """What a run is made of; a row of the results is these and what came out."""

    task: str
    method: str
    dial: float
    lr: float  # of Adam for the table, falling to a hundredth along a cosine; log Z has LOG_Z times as much
    seed: int
    updates: int = 1500
    samples: int = 64  # responses per prompt and batch
    reuse: int = 1  # updates from each batch
    stale: int = 0  # updates that a batch is old when it is used


def run(cell: Cell) -> dict:
    """The cell with its figures, the last one and the way there at eight places."""
    task, row = tasks.TASKS[cell.task](), ROWS[cell.method]
    draw = torch.Generator().manual_seed(cell.seed)
    log_ref = tasks.log_probs(task.tree, task.reference)
    stated = tasks.tilted(log_ref, task.reward, task.beta)
    own = None if row.own is None else row.own(task, log_ref, cell.dial)
    table = task.reference.repeat(len(task.reward), 1, 1).requires_grad_()  # [P, S, A]
    log_z = torch.zeros(len(task.reward), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam(
        [{"params": [table], "lr": cell.lr}, {"params": [log_z], "lr": LOG_Z * cell.lr}], betas=(0.9, 0.99)
    )
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda update: 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * update / cell.updates))
    )
    began, curve, waiting = time.perf_counter(), [], []
    marks = {round(cell.updates * (i + 1) / 8) for i in range(8)}
    for update in range(cell.updates):
        if update % cell.reuse == 0:
            waiting.append(sample(task, table.detach(), cell.samples, draw))
            drawn = waiting.pop(0) if len(waiting) > cell.stale // cell.reuse else waiting[0]
        fresh = cell.reuse == 1 and cell.stale == 0
        loss = row.loss(batch_of(task, table, log_z, drawn, fresh), cell.dial)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rate.step()
        if update + 1 in marks:
            log_policy = tasks.log_probs(task.tree, table.detach())
            curve.append({"update": update + 1, **tasks.figures(task, log_policy, stated, own)})
    out = {**asdict(cell), **curve[-1], "curve": curve, "seconds": round(time.perf_counter() - began, 2)}
    if row.learns_log_z and row.own is not None and own is not None:
        out["log_z_error"] = float((log_z.detach() - true_log_z(task, log_ref, cell)).abs().mean())
    return out


def sample(task: Task, table: Tensor, samples: int, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """`samples` strings of each prompt by their exact probabilities: strings [B], log-probs of their tokens [B, T]."""
    logp = tasks.log_probs(task.tree, table)  # [P, R]
    which = torch.multinomial(logp.exp(), samples, replacement=True, generator=draw).reshape(-1)
    prompt = torch.arange(len(task.reward)).repeat_interleave(samples)
    steps = tasks.log_table(task.tree, table)
    return which, prompt, along(task, steps, which, prompt)


def along(task: Task, steps: Tensor, which: Tensor, prompt: Tensor) -> Tensor:
    """What `steps` [P, S, A] gives the tokens of strings: [B, T], 0 after the end."""
    place, token = task.tree.place[which], task.tree.token[which]
    return steps[prompt[:, None], place, token.clamp_min(0)].masked_fill(token == tasks.END, 0.0)


def batch_of(task: Task, table: Tensor, log_z: Tensor, drawn: tuple[Tensor, Tensor, Tensor], fresh: bool) -> Batch:
    which, prompt, old = drawn
    steps = tasks.log_table(task.tree, table)
    logp = along(task, steps, which, prompt)
    reference = tasks.log_table(task.tree, task.reference).expand_as(steps)
    rows = steps[prompt[:, None], task.tree.place[which]]  # [B, T, A]
    entropy = -torch.where(rows.isinf(), 0.0, rows.exp() * rows).sum(-1)
    mask = task.tree.token[which] != tasks.END
    return Batch(
        logp, entropy, along(task, reference, which, prompt), None if fresh else old, mask,
        task.reward[prompt, which], task.right[prompt, which], which, prompt, log_z[prompt],
    )  # fmt: skip


def true_log_z(task: Task, log_ref: Tensor, cell: Cell) -> Tensor:
    """log Z of the row's own optimum. [P]"""
    from flowrl_kernels.trainer.evaluate import log_partition

    if cell.method == "paper":
        length = task.tree.length.double()
        return torch.tensor([log_partition(log_ref, length, r, cell.dial) for r in task.reward], dtype=torch.float64)
    beta = task.beta if cell.method == "length_true_p" else cell.dial
    if cell.method == "mara":
        raised = []
        for reward, right in zip(task.reward, task.right):
            mode = torch.where(right, log_ref, -torch.inf).argmax()
            raised.append(torch.where(right, reward[mode] + (log_ref[mode] - log_ref) / beta, reward))
        return torch.logsumexp(log_ref + beta * torch.stack(raised), -1)
    return torch.logsumexp(log_ref + beta * task.reward, -1)
