"""The methods that are compared, one row each: its dial, its loss on a batch, and the optimum it states.

A row's loss is the library's own, called as a trainer would. `own` is the distribution at which the row's expected
gradient is zero, on samples of the policy (checked by enumeration in tests/test_evidence.py), or None where there is
no single one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.evidence import gradients, optima
from benchmarks.evidence.batch import Batch
from benchmarks.evidence.tasks import Task
from flowrl_kernels import advantages, flowrl_loss, group_normalize

Loss = Callable[[Batch, Tensor], Tensor]  # (batch, dial [B])
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
    log_z: Optimum | None = None  # the true one at `own`, [P], of a row that learns it
    log_z_rate: float = 1.0  # of its learning rate, beside the other rows'
    rollouts: int = 1  # that one response costs
    mixes: bool = True  # whether cells of different dials may train side by side


def _flow(preset: str | None, **settings: float | str | bool | None) -> Loss:
    def loss(batch: Batch, beta: Tensor) -> Tensor:
        return _residual(batch, beta * batch.reward, preset=preset, **settings)

    return loss


def _residual(batch: Batch, reward: Tensor, **settings: float | str | bool | None) -> Tensor:
    """flowrl_loss of beta times the reward [B]; log Z is the batch's, unless `settings` or the preset have another."""
    if settings.get("preset") in ("group", "tba"):
        settings["groups"] = batch.groups
    else:
        settings.setdefault("log_z", batch.log_z)
    settings.setdefault("beta", 1.0)
    ref = batch.ref if settings.get("anchor", "ref") else None
    return flowrl_loss(batch.logp, ref, reward, logp_old=batch.old, mask=batch.mask, **settings).loss


def _paper_normalised(batch: Batch, beta: Tensor) -> Tensor:
    return _residual(batch, beta * group_normalize(batch.reward, batch.groups), preset="paper")


def _power(batch: Batch, power: Tensor) -> Tensor:
    return _residual(batch, batch.reward, preset="length_true", beta=5.0, length_power=float(power[0]))


def _alpha(batch: Batch, alpha: Tensor) -> Tensor:
    return _residual(batch, batch.reward, preset="tb", beta=5.0, phi=float(alpha[0]))


def _mara(batch: Batch, beta: Tensor) -> Tensor:
    """Of beta times the reward, whose likeliest right answer lifts the others by log pi_ref alone."""
    whole = torch.where(batch.mask, batch.ref, 0.0).sum(-1)
    scaled = beta * batch.reward
    if not bool((batch.right == (batch.reward > 0)).all()):
        raise ValueError(f"task: wanted rewards of 0 where an answer is wrong; got {batch.reward.unique().tolist()}")
    least = float(scaled[batch.right].min()) if batch.right.any() else 1.0
    reward = advantages.mara_reward(scaled, whole, batch.groups, beta=1.0, threshold=least)
    return _residual(batch, reward, preset="length_true")


BETAS = (1.0, 2.0, 5.0, 10.0, 20.0)
WEIGHTS = (1.0, 0.5, 0.2, 0.1, 0.05)  # the same targets, paid as KL
PAPER = (0.2, 0.5, 1.0, 2.0, 5.0, 15.0)
TOKEN = (0.3, 0.1, 0.03, 0.01, 0.003, 0.0)  # of a penalty that is averaged over tokens, beside deviations of 1
BONUS = (0.0, 0.01, 0.03, 0.1, 0.3)
FEW = (0.0, 0.02, 0.05, 0.1, 0.2)
g, o = gradients, optima

# fmt: off
ROWS: dict[str, Row] = {
    "tb": Row("trajectory balance, arXiv 2201.13259", "beta", BETAS, 5.0, _flow("tb"), o.tilt, o.log_z),
    "length_true": Row("its penalty weighted by 1/|y|", "beta", BETAS, 5.0, _flow("length_true"), o.tilt, o.log_z),
    "length_true_p": Row("its penalty weighted by |y|^-p, beta 5", "p", (0.0, 0.5, 1.0, 2.0), 1.0, _power,
                         o.at(o.tilt, 5.0), o.at(o.log_z, 5.0), mixes=False),
    "alpha": Row("f-trajectory balance, arXiv 2605.15417, beta 5", "alpha", (0.0, 0.5, 1.0, 1.5, 2.0), 1.0, _alpha,
                 o.at(o.tilt, 5.0), o.at(o.log_z, 5.0), mixes=False),
    "tba": Row("arXiv 2503.18929: log Z is the group's mean", "beta", BETAS, 5.0, _flow("tba"), o.tilt),
    "mara": Row("arXiv 2510.20817 on length_true", "beta", BETAS, 5.0, _mara, o.mara, o.log_z_mara),
    # the paper and what its parts do
    "paper": Row("arXiv 2509.15207, eq. 6, raw rewards", "beta", PAPER, 15.0, _flow("paper"), o.tilt_length,
                 o.log_z_length),
    "paper_normalised": Row("arXiv 2509.15207, eq. 6, rewards normalised in the group", "beta",
                            (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 30.0), 15.0, _paper_normalised, None),
    "paper_no_weight": Row("the same without importance weight (raw rewards)", "beta", PAPER, 1.0, _flow("no_is"),
                           o.tilt_length, o.log_z_length),
    "paper_release": Row("the same, weight capped at 10", "beta", PAPER, 1.0, _flow("release"), o.tilt_length,
                         o.log_z_length),
    "paper_unclipped": Row("the same, weight not bounded", "beta", PAPER, 1.0, _flow("unclipped"), o.tilt_length,
                           o.log_z_length),
    "paper_group_log_z": Row("the same, log Z the group's mean", "beta", PAPER, 1.0, _flow("group"), None),
    "paper_slow_log_z": Row("the same, log Z learns at an eighth of the rate", "beta", PAPER, 1.0, _flow("paper"),
                            o.tilt_length, o.log_z_length, log_z_rate=0.125),
    "paper_no_log_z": Row("the same, log Z left out", "beta", PAPER, 1.0, _flow(None, log_z=None), None),
    "paper_sums": Row("the same without length normalisation", "beta", BETAS, 5.0,
                      _flow("paper", length_normalize=False), o.tilt, o.log_z),
    "paper_no_reference": Row("the same without the reference's term", "beta", PAPER, 1.0, _flow(None, anchor=None),
                              o.no_reference, o.log_z_no_reference),
    # policy gradients
    "rloo_kl_in_reward": Row("arXiv 2402.14740, KL paid in the reward", "weight", WEIGHTS, 0.2, g.rloo_kl_in_reward,
                             o.inverse(o.tilt)),
    "rloo_k1_in_loss": Row("the same, k1 of each token in the loss: no expected gradient", "weight", WEIGHTS, 0.2,
                           g.rloo_kl_in_loss("k1"), None),
    "rloo_k2_in_loss": Row("the same, k2 of each token in the loss", "weight", WEIGHTS, 0.2, g.rloo_kl_in_loss("k2"),
                           o.token_reverse),
    "rloo_k3_in_loss": Row("the same, k3 of each token in the loss", "weight", WEIGHTS, 0.2, g.rloo_kl_in_loss("k3"),
                           o.token_forward),
    "rloo_ratio_times_k3": Row("the same, k3 times the ratio (DeepSeek-V3.2)", "weight", WEIGHTS, 0.2,
                               g.rloo_ratio_times_k3, o.token_reverse),
    "rloo_straight_through_k3": Row("the same, k3 with k2's gradient (verl: k3+)", "weight", WEIGHTS, 0.2,
                                    g.rloo_straight_through_k3, o.token_reverse),
    "rloo_entropy_in_reward": Row("the same, entropy instead of KL", "weight", WEIGHTS, 0.2, g.rloo_entropy_in_reward,
                                  o.of_entropy),
    "vine": Row("VinePPO, arXiv 2410.01679, 3 completions a step, KL in the reward", "weight", WEIGHTS, 0.2, g.vine(3),
                o.inverse(o.tilt), rollouts=10),
    "ppo_kl_in_reward": Row("arXiv 1707.06347, KL paid in the reward", "weight", WEIGHTS, 0.05, g.ppo_kl_in_reward,
                            o.inverse(o.tilt)),
    "ppo_kl_in_loss": Row("the same, k3 of each token in the loss", "weight", WEIGHTS, 0.05, g.ppo_kl_in_loss,
                          o.token_forward),
    "grpo": Row("arXiv 2402.03300, k3 of each token in the loss", "weight", TOKEN, 0.003, g.grpo, None),
    "grpo_kl_in_reward": Row("the same, KL paid in the reward", "weight", WEIGHTS, 0.05, g.grpo_kl_in_reward, None),
    "grpo_entropy_bonus": Row("the same, an entropy bonus instead of KL", "weight", BONUS, 0.01, g.grpo_entropy_bonus,
                              None),
    "dapo": Row("arXiv 2503.14476; its dial here is an entropy bonus", "weight", BONUS, 0.0, g.dapo, None),
    "top_entropy": Row("arXiv 2506.01939 on DAPO", "share", (1.0, 0.5, 0.2, 0.1), 0.2, g.top_entropy, None),
    "sapo": Row("arXiv 2511.20347, k3 in the loss", "weight", TOKEN, 0.003, g.sapo, None),
    "gmpo": Row("arXiv 2507.20673, k3 in the loss", "weight", TOKEN, 0.003, g.gmpo, None),
    "distinct_shapley": Row("credit 1 / right answers of its class; the dial is KL paid in the reward", "weight", FEW,
                            0.0, g.distinct("shapley"), None),
    "distinct_alone": Row("credit for being the only one of its class; the same dial", "weight", FEW, 0.0,
                          g.distinct("alone"), None),
}
# fmt: on
