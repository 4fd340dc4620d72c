"""Policy gradients: each a loss on a batch and its dial [B], by the library's own functions.

A dial is one number a response, for cells of several values train side by side; so penalties are added here where the
library takes one coefficient (tests/test_evidence_rows.py holds both together). What the library has no setting for is
written out from its paper (docs/maths.md, eq. 41 to 44).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.evidence.batch import Batch
from flowrl_kernels import advantages, group_normalize, policy_gradient_loss
from flowrl_kernels.policy_gradient import value_loss
from flowrl_kernels.reference.policy_gradient import kl_penalty

Clip = tuple[float | None, float | None]
PPO: Clip = (0.8, 1.2)
HIGHER: Clip = (0.8, 1.28)


def gradient(
    batch: Batch, advantage: Tensor, *, clip: Clip = PPO, aggregate: str = "seq-mean-token-sum", ratio: str = "token"
) -> Tensor:
    """The library's loss; advantage [B] or [B, T]."""
    bounds = {} if ratio == "none" else {"clip": clip}
    return policy_gradient_loss(
        batch.logp, batch.old, advantage, mask=batch.mask, aggregate=aggregate, ratio=ratio, **bounds
    ).loss  # fmt: skip


def summed(batch: Batch, weight: Tensor, tokens: Tensor) -> Tensor:
    """Mean over sequences of weight [B] times the sum over tokens [B, T]."""
    return (weight * torch.where(batch.mask, tokens, 0.0).sum(-1)).mean()


def averaged(batch: Batch, weight: Tensor, tokens: Tensor) -> Tensor:
    """The same with means over each sequence's tokens."""
    return summed(batch, weight / batch.mask.sum(-1), tokens)


def penalty(batch: Batch, kind: str) -> Tensor:
    """k1, k2 or k3 of each token (docs/maths.md, eq. 14). [B, T]"""
    return kl_penalty(batch.logp, torch.where(batch.mask, batch.ref, 0.0), kind, None)


def left_out(batch: Batch, reward: Tensor) -> Tensor:
    return advantages.leave_one_out(reward, batch.groups)


def rloo_kl_in_reward(batch: Batch, weight: Tensor) -> Tensor:
    """RLOO on r - weight (log pi - log pi_ref), sums over tokens, no deviation: reverse KL's own gradient."""
    return gradient(batch, left_out(batch, batch.reward - weight * batch.gap), ratio="none")


def rloo_entropy_in_reward(batch: Batch, weight: Tensor) -> Tensor:
    whole = torch.where(batch.mask, batch.sampled, 0.0).sum(-1)
    return gradient(batch, left_out(batch, batch.reward - weight * whole), ratio="none")


def rloo_kl_in_loss(kind: str) -> Callable[[Batch, Tensor], Tensor]:
    """RLOO with "k1", "k2" or "k3" of each token in the loss."""

    def loss(batch: Batch, weight: Tensor) -> Tensor:
        reward = gradient(batch, left_out(batch, batch.reward), ratio="none")
        return reward + summed(batch, weight, penalty(batch, kind))

    return loss


def rloo_ratio_times_k3(batch: Batch, weight: Tensor) -> Tensor:
    """k3 of each token times its ratio, gradient through both (DeepSeek-V3.2, eq. 41): reverse KL of each token."""
    reward = gradient(batch, left_out(batch, batch.reward), ratio="none")
    return reward + summed(batch, weight, batch.ratio * penalty(batch, "k3"))


def rloo_straight_through_k3(batch: Batch, weight: Tensor) -> Tensor:
    """k3's value with k2's gradient (verl's "k3+")."""
    k3, k2 = penalty(batch, "k3"), penalty(batch, "k2")
    reward = gradient(batch, left_out(batch, batch.reward), ratio="none")
    return reward + summed(batch, weight, k2 - k2.detach() + k3.detach())


def grpo(batch: Batch, weight: Tensor) -> Tensor:
    a = group_normalize(batch.reward, batch.groups)
    return gradient(batch, a, aggregate="seq-mean-token-mean") + averaged(batch, weight, penalty(batch, "k3"))


def grpo_kl_in_reward(batch: Batch, weight: Tensor) -> Tensor:
    a = group_normalize(batch.reward - weight * batch.gap, batch.groups)
    return gradient(batch, a, aggregate="seq-mean-token-mean")


def grpo_entropy_bonus(batch: Batch, weight: Tensor) -> Tensor:
    """Each token's entropy in the loss, averaged as the tokens are."""
    a = group_normalize(batch.reward, batch.groups)
    return gradient(batch, a, aggregate="seq-mean-token-mean") - averaged(batch, weight, batch.entropy())


def dapo(batch: Batch, weight: Tensor) -> Tensor:
    """Clip-higher, token mean over groups that are not all equal, no KL; the dial is an entropy bonus, which it lacks.

    DAPO samples again until every group is mixed; here as many responses as any method has must do.
    """
    a = group_normalize(batch.reward, batch.groups)
    moved = torch.zeros(int(batch.groups[-1]) + 1, dtype=torch.float64).index_add_(0, batch.groups, a.abs())
    mixed = batch.mask & (moved > 0)[batch.groups][:, None]
    tokens = batch.of_cells(mixed.sum(-1).double()).clamp_min(1.0)
    share = (len(batch.cell) / len(tokens) / tokens)[batch.cell]
    return gradient(batch, a * share, clip=HIGHER) - summed(batch, weight * batch.share, batch.entropy())


def top_entropy(batch: Batch, share: Tensor) -> Tensor:
    """DAPO's loss from the `share` of each cell's tokens whose entropy is largest (arXiv 2506.01939), and no others."""
    a = group_normalize(batch.reward, batch.groups)
    entropy = torch.where(batch.mask, batch.entropy().detach(), -torch.inf)
    of_cell = entropy.reshape(int(batch.cell[-1]) + 1, -1)  # [C, tokens]
    tokens = batch.mask.sum(-1).double()
    kept = (batch.of_cells(share * tokens)).ceil().long().clamp_min(1)
    least = of_cell.sort(descending=True).values.gather(1, kept[:, None] - 1)
    chosen = (of_cell >= least).reshape(entropy.shape) & batch.mask
    count = batch.of_cells(chosen.sum(-1).double())
    scale = (len(batch.cell) / len(count) / count)[batch.cell]
    return gradient(batch._replace(mask=chosen), a * scale, clip=HIGHER)


def sapo(batch: Batch, weight: Tensor) -> Tensor:
    """A soft gate of the ratio in place of the clip (arXiv 2511.20347; docs/maths.md, eq. 42); k3 in the loss."""
    a = group_normalize(batch.reward, batch.groups)[:, None]
    tau = torch.where(a > 0, 1.0, 1.05)
    tokens = -a * torch.sigmoid(tau * (batch.ratio - 1)) * 4 / tau
    one = torch.ones_like(weight)
    return averaged(batch, one, tokens) + averaged(batch, weight, penalty(batch, "k3"))


def gmpo(batch: Batch, weight: Tensor) -> Tensor:
    """The geometric mean of clipped ratios (arXiv 2507.20673; docs/maths.md, eq. 43); k3 in the loss."""
    a = group_normalize(batch.reward, batch.groups)[:, None]
    move = a.sign() * (batch.logp - batch.sampled)
    held = a.sign() * torch.minimum(move, move.clamp(-0.4, 0.4))
    mean = torch.where(batch.mask, held, 0.0).sum(-1) / batch.mask.sum(-1)
    return -(a[:, 0] * mean.exp()).mean() + averaged(batch, weight, penalty(batch, "k3"))


def _actor_critic(batch: Batch, token_reward: Tensor | None) -> Tensor:
    """PPO with a table of values, GAE at lambda 1, not whitened; the critic's loss weighs a half."""
    value = batch.value()
    a, returns = advantages.gae(batch.reward, value.detach(), batch.mask, token_reward=token_reward)
    critic = value_loss(value, returns, mask=batch.mask, aggregate="seq-mean-token-sum")
    return gradient(batch, a) + 0.5 * critic


def ppo_kl_in_reward(batch: Batch, weight: Tensor) -> Tensor:
    return _actor_critic(batch, -weight[:, None] * torch.where(batch.mask, batch.sampled - batch.ref, 0.0))


def ppo_kl_in_loss(batch: Batch, weight: Tensor) -> Tensor:
    return _actor_critic(batch, None) + summed(batch, weight, penalty(batch, "k3"))


def vine(completions: int) -> Callable[[Batch, Tensor], Tensor]:
    """VinePPO (arXiv 2410.01679; docs/maths.md, eq. 44): values by fresh completions; KL paid in the reward.

    A step is one choice here, on Sums a digit. Completions are rollouts: a cell of it draws fewer responses.
    """

    def loss(batch: Batch, weight: Tensor) -> Tensor:
        value = batch.completed(completions)  # [B, T]
        last = batch.mask.sum(-1, keepdim=True) - 1
        after = value.roll(-1, 1).scatter(1, last, batch.reward[:, None])
        paid = (weight * left_out(batch, batch.gap))[:, None]
        return gradient(batch, torch.where(batch.mask, after - value - paid, 0.0))

    return loss


def distinct(credit: str) -> Callable[[Batch, Tensor], Tensor]:
    def loss(batch: Batch, weight: Tensor) -> Tensor:
        a = advantages.distinct_advantage(batch.right.double(), batch.answer, batch.groups, credit=credit)
        return gradient(batch, a - weight * left_out(batch, batch.gap), ratio="none")

    return loss
