"""Where the methods' expected gradients are zero, on samples of the policy, and the log Z that belongs there.

All take (task, log_ref [R] float64, dial) and give log-probabilities [P, R], or log Z [P].
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.evidence import tasks
from benchmarks.evidence.tasks import Task

Optimum = Callable[[Task, Tensor, float], Tensor]


def inverse(optimum: Optimum) -> Optimum:
    """The same where the dial is the weight of a KL, 1 / beta."""
    return lambda task, log_ref, weight: optimum(task, log_ref, 1.0 / weight)


def at(optimum: Optimum, beta: float) -> Optimum:
    """The same at one beta, whatever the dial."""
    return lambda task, log_ref, dial: optimum(task, log_ref, beta)


def tilt(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    return tasks.tilted(log_ref, task.reward, beta)


def log_z(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    return torch.logsumexp(log_ref + beta * task.reward, -1)


def tilt_length(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    return tasks.tilted_by_length(log_ref, task.reward, task.tree.length.double(), beta)


def log_z_length(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    return tasks.log_z_by_length(log_ref, task.reward, task.tree.length.double(), beta)


def no_reference(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    """exp(|y| (beta r - log Z)): without a reference the length itself is what is weighed."""
    per_token = beta * task.reward - log_z_no_reference(task, log_ref, beta)[:, None]
    return (task.tree.length * per_token).log_softmax(-1)


def log_z_no_reference(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    low = beta * task.reward.min(-1).values
    high = beta * task.reward.max(-1).values + math.log(len(task.texts))
    for _ in range(100):
        middle = 0.5 * (low + high)
        above = torch.logsumexp(task.tree.length * (beta * task.reward - middle[:, None]), -1) > 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return 0.5 * (low + high)


def _raised(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    """Rewards whose tilt gives every right answer the mass of the likeliest right one of the whole prompt. [P, R]"""
    rows = []
    for reward, right in zip(task.reward, task.right):
        mode = torch.where(right, log_ref, -torch.inf).argmax()
        rows.append(torch.where(right, reward[mode] + (log_ref[mode] - log_ref) / beta, reward))
    return torch.stack(rows)


def mara(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    return tasks.tilted(log_ref, _raised(task, log_ref, beta), beta)


def log_z_mara(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    return torch.logsumexp(log_ref + beta * _raised(task, log_ref, beta), -1)


def of_entropy(task: Task, log_ref: Tensor, weight: float) -> Tensor:
    return (task.reward / weight).log_softmax(-1)


def token_reverse(task: Task, log_ref: Tensor, weight: float) -> Tensor:
    """Of reverse KL taken token by token, as if what a token leads to were not charged for its own KL (eq. 41).

    At every place pi is pi_ref exp(Q / weight) / Z, Q the chance of being right after a choice under pi itself.
    """
    return _from_the_ends(task, log_ref, lambda ref, q: (ref + q / weight).log_softmax(-1))


def token_forward(task: Task, log_ref: Tensor, weight: float) -> Tensor:
    """Of k3 in the loss, whose expected gradient is the forward KL's at each place: pi = weight pi_ref / (c - Q)."""

    def step(ref: Tensor, q: Tensor) -> Tensor:
        ref_p = ref.exp()
        best = torch.where(ref_p > 0, q, -torch.inf).max(-1, keepdim=True).values
        low, high = best + 1e-300, best + weight  # sum is 1 between: at `high` no term is above its share
        for _ in range(200):
            middle = 0.5 * (low + high)
            above = (weight * ref_p / (middle - q)).nan_to_num(0.0, 1e300).sum(-1, keepdim=True) > 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (weight * ref_p / (0.5 * (low + high) - q)).log()

    return _from_the_ends(task, log_ref, step)


def _from_the_ends(task: Task, log_ref: Tensor, step: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Places whose choices end strings first; `step` makes (log pi_ref [S, A], Q [S, A]) into log pi."""
    tree = task.tree
    ref = tasks.log_table(tree, tasks.table_of(tree, log_ref))
    found = []
    for reward in task.reward:
        q = torch.where(tree.child < 0, reward[(-1 - tree.child).clamp_min(0)], 0.0)
        log_pi = ref
        for _ in range(tree.depth):
            log_pi = step(ref, q.masked_fill(~tree.allowed, 0.0)).masked_fill(~tree.allowed, -torch.inf)
            value = (log_pi.exp() * q).sum(-1)
            q = torch.where(tree.child < 0, q, value[tree.child.clamp_min(0)])
        found.append(log_pi)
    return tasks.log_probs(tree, torch.stack(found))
