"""Policy gradients: each a loss on a batch at one value of its dial, by the library's own functions.

What the library has no setting for is written out here from its paper (docs/maths.md, eq. 41 to 44).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.evidence.batch import Batch
from flowrl_kernels import advantages, group_normalize, policy_gradient_loss
from flowrl_kernels.policy_gradient import value_loss

Clip = tuple[float | None, float | None]
PPO: Clip = (0.8, 1.2)
HIGHER: Clip = (0.8, 1.28)


def gradient(
    batch: Batch, advantage: Tensor, *, clip: Clip = PPO, aggregate: str = "seq-mean-token-sum", kl: float = 0.0,
    kl_kind: str = "k3", ratio: str = "token",
) -> Tensor:  # fmt: skip
    """The library's loss; advantage [B] or [B, T]. Token means are those of each cell by itself."""
    if aggregate == "token-mean":
        if kl:
            raise ValueError(f"kl: wanted 0 beside a token mean, which scales advantages; got {kl}")
        share = batch.share if advantage.dim() == 1 else batch.share[:, None]
        advantage, aggregate = advantage * share, "seq-mean-token-sum"
    extra = {"kl": kl, "kl_kind": kl_kind, "logp_ref": batch.ref} if kl else {}
    bounds = {} if ratio == "none" else {"clip": clip}
    return policy_gradient_loss(
        batch.logp, batch.old, advantage, mask=batch.mask, aggregate=aggregate, ratio=ratio, **bounds, **extra
    ).loss  # fmt: skip


def per_sequence(batch: Batch, tokens: Tensor) -> Tensor:
    """Mean over sequences of sums over tokens [B, T]."""
    return torch.where(batch.mask, tokens, 0.0).sum(-1).mean()


def left_out(batch: Batch, reward: Tensor) -> Tensor:
    return advantages.leave_one_out(reward, batch.groups)


def rloo_kl_in_reward(batch: Batch, weight: float) -> Tensor:
    """RLOO on r - weight (log pi - log pi_ref), sums over tokens, no deviation: reverse KL's own gradient."""
    return gradient(batch, left_out(batch, batch.reward - weight * batch.gap), ratio="none")


def rloo_entropy_in_reward(batch: Batch, weight: float) -> Tensor:
    whole = torch.where(batch.mask, batch.sampled, 0.0).sum(-1)
    return gradient(batch, left_out(batch, batch.reward - weight * whole), ratio="none")


def rloo_kl_in_loss(kind: str) -> Callable[[Batch, float], Tensor]:
    """RLOO with "k1", "k2" or "k3" of each token in the loss."""

    def loss(batch: Batch, weight: float) -> Tensor:
        return gradient(batch, left_out(batch, batch.reward), ratio="none", kl=weight, kl_kind=kind)

    return loss


def rloo_ratio_times_k3(batch: Batch, weight: float) -> Tensor:
    """k3 of each token times its ratio, gradient through both (DeepSeek-V3.2, eq. 41): reverse KL of each token."""
    move = batch.ref - batch.logp
    k3 = move.exp() - move - 1
    penalty = per_sequence(batch, batch.ratio * k3)
    return gradient(batch, left_out(batch, batch.reward), ratio="none") + weight * penalty


def rloo_straight_through_k3(batch: Batch, weight: float) -> Tensor:
    """k3's value with k2's gradient (verl's "k3+")."""
    move = batch.ref - batch.logp
    k3, k2 = move.exp() - move - 1, move.square() / 2
    penalty = per_sequence(batch, k2 - k2.detach() + k3.detach())
    return gradient(batch, left_out(batch, batch.reward), ratio="none") + weight * penalty


def grpo(batch: Batch, weight: float) -> Tensor:
    a = group_normalize(batch.reward, batch.groups)
    return gradient(batch, a, aggregate="seq-mean-token-mean", kl=weight)


def grpo_kl_in_reward(batch: Batch, weight: float) -> Tensor:
    a = group_normalize(batch.reward - weight * batch.gap, batch.groups)
    return gradient(batch, a, aggregate="seq-mean-token-mean")


def grpo_entropy_bonus(batch: Batch, weight: float) -> Tensor:
    """Each token's entropy in the loss, averaged as the tokens are."""
    a = group_normalize(batch.reward, batch.groups)
    bonus = per_sequence(batch, batch.entropy() / batch.mask.sum(-1, keepdim=True))
    return gradient(batch, a, aggregate="seq-mean-token-mean") - weight * bonus


def dapo(batch: Batch, weight: float) -> Tensor:
    """Clip-higher, token mean over groups that are not all equal, no KL; the dial is an entropy bonus, which it lacks.

    DAPO samples again until every group is mixed; here as many responses as any method has must do.
    """
    a = group_normalize(batch.reward, batch.groups)
    moved = torch.zeros(int(batch.groups[-1]) + 1, dtype=torch.float64).index_add_(0, batch.groups, a.abs())
    mixed = batch.mask & (moved > 0)[batch.groups][:, None]
    tokens = batch.of_cells(mixed.sum(-1).double()).clamp_min(1.0)
    share = (len(batch.cell) / len(tokens) / tokens)[batch.cell]
    loss = gradient(batch, a * share, clip=HIGHER)
    return loss - weight * per_sequence(batch, batch.entropy() * batch.share[:, None]) if weight else loss


def top_entropy(batch: Batch, share: float) -> Tensor:
    """DAPO's loss from the `share` of each cell's tokens whose entropy is largest (arXiv 2506.01939), and no others."""
    a = group_normalize(batch.reward, batch.groups)
    entropy = torch.where(batch.mask, batch.entropy().detach(), -torch.inf)
    of_cell = entropy.reshape(int(batch.cell[-1]) + 1, -1)  # [C, tokens]
    kept = (share * batch.of_cells(batch.mask.sum(-1).double())).ceil().long().clamp_min(1)
    least = of_cell.sort(descending=True).values.gather(1, kept[:, None] - 1)
    chosen = (of_cell >= least).reshape(entropy.shape) & batch.mask
    count = batch.of_cells(chosen.sum(-1).double())
    scale = (len(batch.cell) / len(count) / count)[batch.cell]
    return gradient(batch._replace(mask=chosen), a * scale, clip=HIGHER)


def sapo(batch: Batch, weight: float) -> Tensor:
    """A soft gate of the ratio in place of the clip (arXiv 2511.20347; docs/maths.md, eq. 42); k3 in the loss."""
    a = group_normalize(batch.reward, batch.groups)[:, None]
    tau = torch.where(a > 0, 1.0, 1.05)
    tokens = -a * torch.sigmoid(tau * (batch.ratio - 1)) * 4 / tau
    return per_sequence(batch, tokens / batch.mask.sum(-1, keepdim=True)) + _k3(batch, weight)


def gmpo(batch: Batch, weight: float) -> Tensor:
    """The geometric mean of clipped ratios (arXiv 2507.20673; docs/maths.md, eq. 43); k3 in the loss."""
    a = group_normalize(batch.reward, batch.groups)[:, None]
    move = a.sign() * (batch.logp - batch.sampled)
    held = a.sign() * torch.minimum(move, move.clamp(-0.4, 0.4))
    mean = torch.where(batch.mask, held, 0.0).sum(-1) / batch.mask.sum(-1)
    return -(a[:, 0] * mean.exp()).mean() + _k3(batch, weight)


def _k3(batch: Batch, weight: float) -> Tensor:
    move = torch.where(batch.mask, batch.ref - batch.logp, 0.0)
    return weight * per_sequence(batch, (move.exp() - move - 1) / batch.mask.sum(-1, keepdim=True))


def _actor_critic(batch: Batch, token_reward: Tensor | None) -> Tensor:
    """PPO with a table of values, GAE at lambda 1, not whitened; the critic's loss weighs a half."""
    value = batch.value()
    a, returns = advantages.gae(batch.reward, value.detach(), batch.mask, token_reward=token_reward)
    critic = value_loss(value, returns, mask=batch.mask, aggregate="seq-mean-token-sum")
    return gradient(batch, a) + 0.5 * critic


def ppo_kl_in_reward(batch: Batch, weight: float) -> Tensor:
    return _actor_critic(batch, -weight * torch.where(batch.mask, batch.sampled - batch.ref, 0.0))


def ppo_kl_in_loss(batch: Batch, weight: float) -> Tensor:
    move = torch.where(batch.mask, batch.ref - batch.logp, 0.0)
    return _actor_critic(batch, None) + weight * per_sequence(batch, move.exp() - move - 1)


def vine(completions: int) -> Callable[[Batch, float], Tensor]:
    """VinePPO (arXiv 2410.01679; docs/maths.md, eq. 44): values by fresh completions; KL paid in the reward.

    A step is one choice here, on Sums a digit. Completions are rollouts: a cell of it draws fewer responses.
    """

    def loss(batch: Batch, weight: float) -> Tensor:
        value = batch.completed(completions)  # [B, T]
        last = batch.mask.sum(-1, keepdim=True) - 1
        after = value.roll(-1, 1).scatter(1, last, batch.reward[:, None])
        paid = left_out(batch, batch.gap)[:, None]
        return gradient(batch, torch.where(batch.mask, after - value - weight * paid, 0.0))

    return loss


def distinct(credit: str) -> Callable[[Batch, float], Tensor]:
    def loss(batch: Batch, weight: float) -> Tensor:
        a = advantages.distinct_advantage(batch.right.double(), batch.answer, batch.groups, credit=credit)
        if weight:
            a = a - weight * left_out(batch, batch.gap)
        return gradient(batch, a, ratio="none")

    return loss
