"""The methods that are compared, one row each: its dial, its loss on a batch, and the optimum it states.

A row's loss is the library's own, called as a trainer would. `own` is the distribution at which the row's expected
gradient is zero (checked by enumeration in tests/test_evidence.py), or None where there is no single one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.evidence import tasks
from benchmarks.evidence.tasks import Task
from flowrl_kernels import advantages, flowrl_loss, group_normalize, policy_gradient_loss


class Batch(NamedTuple):
    """B sampled responses of at most T tokens."""

    logp: Tensor  # [B, T] float64, with a gradient
    entropy: Tensor  # [B, T] of the policy where each token was chosen, with a gradient
    ref: Tensor  # [B, T]
    old: Tensor | None  # [B, T] of the policy that sampled; None: it is this one
    mask: Tensor  # [B, T] bool
    reward: Tensor  # [B]
    right: Tensor  # [B] bool
    answer: Tensor  # [B] int64: which string
    groups: Tensor  # [B] int64
    log_z: Tensor  # [B] learned, with a gradient

    @property
    def gap(self) -> Tensor:
        """log pi - log pi_ref of each whole response, detached. [B]"""
        return torch.where(self.mask, self.logp.detach() - self.ref, 0.0).sum(-1)


Loss = Callable[[Batch, float], Tensor]
Optimum = Callable[[Task, Tensor, float], Tensor]  # (task, log_ref [R], dial) -> [P, R]


@dataclass(frozen=True)
class Row:
    """One method. `dial` is what it sweeps, from `values`; `default` is what its authors or the field take."""

    source: str
    dial: str
    values: tuple[float, ...]
    default: float
    loss: Loss
    own: Optimum | None
    learns_log_z: bool = False


def _flow(preset: str, **settings: float | str) -> Loss:
    def loss(batch: Batch, beta: float) -> Tensor:
        return flowrl_loss(
            batch.logp, batch.ref, batch.reward, batch.log_z, logp_old=batch.old, mask=batch.mask, preset=preset,
            beta=beta, **settings,
        ).loss  # fmt: skip

    return loss


def _paper_normalised(batch: Batch, beta: float) -> Tensor:
    reward = group_normalize(batch.reward, batch.groups)
    return flowrl_loss(
        batch.logp, batch.ref, reward, batch.log_z, logp_old=batch.old, mask=batch.mask, beta=beta
    ).loss  # fmt: skip


def _power(beta: float) -> Callable[[Batch, float], Tensor]:
    def loss(batch: Batch, power: float) -> Tensor:
        return flowrl_loss(
            batch.logp, batch.ref, batch.reward, batch.log_z, logp_old=batch.old, mask=batch.mask,
            preset="length_true", beta=beta, length_power=power,
        ).loss  # fmt: skip

    return loss


def _mara(batch: Batch, beta: float) -> Tensor:
    whole = torch.where(batch.mask, batch.ref, 0.0).sum(-1)
    least = float(batch.reward[batch.right].min()) if batch.right.any() else 1.0
    reward = advantages.mara_reward(batch.reward, whole, batch.groups, beta=beta, threshold=least)
    return _flow("length_true")(batch._replace(reward=reward), beta)


def _mara_optimum(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    """Every right answer gets the mass of the likeliest right one of the whole prompt."""
    rows = []
    for reward, right in zip(task.reward, task.right):
        mode = torch.where(right, log_ref, -torch.inf).argmax()
        rows.append(torch.where(right, log_ref[mode] + beta * reward[mode], log_ref + beta * reward))
    return torch.stack(rows).log_softmax(-1)


def _gradient(
    batch: Batch, advantage: Tensor, *, clip: tuple[float | None, float | None] = (0.8, 1.2),
    aggregate: str = "seq-mean-token-sum", kl: float | None = None, kl_kind: str = "k3", ratio: str = "token",
) -> Tensor:  # fmt: skip
    extra = {"kl": kl, "kl_kind": kl_kind, "logp_ref": batch.ref} if kl else {}
    bounds = {} if ratio == "none" else {"clip": clip}
    return policy_gradient_loss(
        batch.logp, batch.old, advantage, mask=batch.mask, aggregate=aggregate, ratio=ratio, **bounds, **extra
    ).loss  # fmt: skip


def _kl_in_reward(batch: Batch, weight: float) -> Tensor:
    """RLOO on r - weight (log pi - log pi_ref), sums over tokens, no deviation: reverse KL's own gradient."""
    return _gradient(batch, advantages.leave_one_out(batch.reward - weight * batch.gap, batch.groups), ratio="none")


def _entropy_in_reward(batch: Batch, weight: float) -> Tensor:
    whole = torch.where(batch.mask, batch.logp.detach(), 0.0).sum(-1)
    return _gradient(batch, advantages.leave_one_out(batch.reward - weight * whole, batch.groups), ratio="none")


def _kl_in_loss(batch: Batch, weight: float) -> Tensor:
    """RLOO with k2 on each token in the loss."""
    a = advantages.leave_one_out(batch.reward, batch.groups)
    return _gradient(batch, a, kl=weight, kl_kind="k2")


def _grpo(batch: Batch, weight: float) -> Tensor:
    a = group_normalize(batch.reward, batch.groups)
    return _gradient(batch, a, aggregate="seq-mean-token-mean", kl=weight)


def _grpo_kl_in_reward(batch: Batch, weight: float) -> Tensor:
    a = group_normalize(batch.reward - weight * batch.gap, batch.groups)
    return _gradient(batch, a, aggregate="seq-mean-token-mean")


def _dapo(batch: Batch, entropy: float) -> Tensor:
    """Clip-higher, token mean, no KL; the dial is an entropy bonus, for DAPO has none of its own."""
    a = group_normalize(batch.reward, batch.groups)
    loss = _gradient(batch, a, clip=(0.8, 1.28), aggregate="token-mean")
    return loss - entropy * torch.where(batch.mask, batch.entropy, 0.0).sum() / batch.mask.sum()


def _distinct(credit: str) -> Loss:
    def loss(batch: Batch, weight: float) -> Tensor:
        a = advantages.distinct_advantage(batch.right.double(), batch.answer, batch.groups, credit=credit)
        if weight:
            a = a - weight * advantages.leave_one_out(batch.gap, batch.groups)
        return _gradient(batch, a, ratio="none")

    return loss


def _tilt(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    return tasks.tilted(log_ref, task.reward, beta)


def _tilt_inverse(task: Task, log_ref: Tensor, weight: float) -> Tensor:
    return tasks.tilted(log_ref, task.reward, 1.0 / weight)


def _tilt_length(task: Task, log_ref: Tensor, beta: float) -> Tensor:
    return tasks.tilted_by_length(log_ref, task.reward, task.tree.length.double(), beta)


def _of_entropy(task: Task, log_ref: Tensor, weight: float) -> Tensor:
    return (task.reward / weight).log_softmax(-1)


BETAS = (1.0, 2.0, 5.0, 10.0, 20.0)
WEIGHTS = (1.0, 0.5, 0.2, 0.1, 0.05)  # the same targets, paid as KL

# fmt: off
ROWS: dict[str, Row] = {
    "tb": Row("trajectory balance, arXiv 2201.13259", "beta", BETAS, 5.0, _flow("tb"), _tilt, True),
    "length_true": Row("its penalty weighted by 1/|y|", "beta", BETAS, 5.0, _flow("length_true"), _tilt, True),
    "length_true_p": Row("its penalty weighted by |y|^-p, beta 5", "p", (0.5, 1.0, 2.0), 1.0, _power(5.0),
                         lambda task, ref, p: _tilt(task, ref, 5.0), True),
    "paper": Row("arXiv 2509.15207, eq. 6, raw rewards", "beta", (0.2, 0.5, 1.0, 2.0, 5.0, 15.0), 15.0,
                 _flow("paper"), _tilt_length, True),
    "paper_normalised": Row("arXiv 2509.15207, eq. 6, rewards normalised in the group", "beta",
                            (0.2, 0.5, 1.0, 2.0, 5.0, 15.0), 15.0, _paper_normalised, None, True),
    "mara": Row("arXiv 2510.20817 on length_true", "beta", BETAS, 5.0, _mara, _mara_optimum, True),
    "rloo_kl_in_reward": Row("arXiv 2402.14740, KL paid in the reward", "weight", WEIGHTS, 0.2, _kl_in_reward,
                             _tilt_inverse),
    "rloo_k2_in_loss": Row("the same, k2 of each token in the loss", "weight", WEIGHTS, 0.2, _kl_in_loss, None),
    "rloo_entropy": Row("the same, entropy instead of KL", "weight", WEIGHTS, 0.2, _entropy_in_reward, _of_entropy),
    "grpo": Row("arXiv 2402.03300, k3 of each token in the loss", "weight", (1.0, 0.3, 0.1, 0.03, 0.001, 0.0), 0.001,
                _grpo, None),
    "grpo_kl_in_reward": Row("the same, KL paid in the reward", "weight", WEIGHTS, 0.05, _grpo_kl_in_reward, None),
    "dapo": Row("arXiv 2503.14476; its dial here is an entropy bonus", "entropy", (0.0, 0.003, 0.01, 0.03, 0.1), 0.0,
                _dapo, None),
    "distinct_shapley": Row("credit 1 / right answers of its class; the dial is KL paid in the reward", "weight",
                            (0.0, 0.02, 0.05, 0.1, 0.2), 0.0, _distinct("shapley"), None),
    "distinct_alone": Row("credit for being the only one of its class; the same dial", "weight",
                          (0.0, 0.02, 0.05, 0.1, 0.2), 0.0, _distinct("alone"), None),
}
# fmt: on
