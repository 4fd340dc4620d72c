"""Rewards to advantages: group and batch normalisation, GAE, and the transforms that are methods of their own.

All of them are plain torch over [B] or the tokens' layout, detached, in float64 inside and the input's dtype outside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowrl_kernels.core import checks
from flowrl_kernels.core.layout import check_mask, segments_of
from flowrl_kernels.core.segments import Grouped, Segments, grouped


def _per_group(reward: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor, Grouped]:
    """reward [B] in float64, its group's mean [B], its group's size [B], and the groups in order."""
    checks.floating("reward", reward, dims=1)
    checks.same_device("groups", checks.integers("groups", groups, tuple(reward.shape)), "reward", reward)
    value, own = reward.detach().double(), grouped(groups)
    one = torch.ones_like(value)
    return value, own.mean(value, one), own.total(one), own


def _beside_reward(name: str, value: Tensor, reward: Tensor) -> Tensor:
    """`value` in float64, checked to be [B] floats where the rewards are."""
    checks.floating(name, value, dims=1)
    if value.shape != reward.shape:
        checks.fail(name, f"shape {tuple(reward.shape)} as reward has", checks.shape(value))
    checks.same_device(name, value, "reward", reward)
    return value.detach().double()


def group_normalize(reward: Tensor, groups: Tensor, *, eps: float = 1e-6, scale: bool = True) -> Tensor:
    """(r - mean) / (std + eps) within each group (GRPO, arXiv 2402.03300); std unbiased.

    A group of one gives 0: it says nothing about what is better (verl gives the raw reward there).

    Args:
        reward: [B] floats.
        groups: [B] integer group ids in any order.
        eps: added to the standard deviation.
        scale: False leaves out the division (Dr.GRPO, arXiv 2503.20783).
    """
    eps, scale = _at_least_0("eps", eps), checks.flag("scale", scale)
    value, mean, size, own = _per_group(reward, groups)
    centred = torch.where(size > 1, value - mean, 0.0)
    if scale:
        variance = own.mean(centred.square(), size) * size / (size - 1).clamp_min(1.0)
        centred = centred / (variance.sqrt() + eps)
    return centred.to(reward.dtype)


def leave_one_out(reward: Tensor, groups: Tensor) -> Tensor:
    """r minus the mean of the group's other members (RLOO, arXiv 2402.14740); a group of one gives 0. [B]"""
    value, mean, size, _ = _per_group(reward, groups)
    return torch.where(size > 1, (value - mean) * size / (size - 1).clamp_min(1.0), 0.0).to(reward.dtype)


def optimal_baseline(reward: Tensor, length: Tensor, groups: Tensor) -> Tensor:
    """r minus the group's mean weighted by length, sum l r / sum l (OPO, arXiv 2505.23585); a group of one gives 0. [B]

    length: [B] tokens of each response. The weight stands for the squared norm of its gradient, which makes this the
    baseline of least variance if all tokens' gradients are alike and orthogonal.
    """
    value, _, size, own = _per_group(reward, groups)
    checks.integers("length", length, tuple(reward.shape))
    checks.same_device("length", length, "reward", reward)
    weight = length.clamp_min(1).double()
    return torch.where(size > 1, value - own.total(value * weight) / own.total(weight), 0.0).to(reward.dtype)


def raft(reward: Tensor) -> Tensor:
    """max(r, 0): only good samples are trained (RAFT, arXiv 2304.06767). [B]"""
    return checks.floating("reward", reward, dims=1).detach().clamp_min(0.0)


def reinforce_rej(reward: Tensor, groups: Tensor, *, tolerance: float = 1e-9) -> Tensor:
    """r, or 0 where all rewards of the group are equal (Reinforce-Rej, arXiv 2504.11343). [B]"""
    tolerance = _at_least_0("tolerance", tolerance)
    value, mean, size, own = _per_group(reward, groups)
    spread = own.mean((value - mean).abs(), size)
    return torch.where(spread > tolerance, value, 0.0).to(reward.dtype)


def unlikeliness_reward(reward: Tensor, logp_old_mean: Tensor, groups: Tensor, *, strength: float = 0.25) -> Tensor:
    """r (1 - strength rank / G), rank 0 for the least likely of its group (arXiv 2506.02355). [B]

    logp_old_mean: [B] length-normalised log-prob of each response under the behaviour policy. Normalise afterwards.
    """
    value, _, size, own = _per_group(reward, groups)
    _beside_reward("logp_old_mean", logp_old_mean, reward)
    strength = checks.number("strength", strength)
    by_logp = logp_old_mean.sort(stable=True).indices  # ties go by place
    order = by_logp[groups.long()[by_logp].sort(stable=True).indices]
    place = torch.arange(len(order), device=order.device) - own.offsets[own.which[order]]
    rank = torch.empty_like(order).scatter_(0, order, place)
    return (value * (1.0 - strength * rank / size)).to(reward.dtype)


def mara_reward(reward: Tensor, logp_ref: Tensor, groups: Tensor, *, beta: float, threshold: float = 1.0) -> Tensor:
    """Rewards that make the target flat over right answers (MARA, arXiv 2510.20817). [B]

    r'(y) = r(z) + (log pi_ref(z) - log pi_ref(y)) / beta where r(y) >= threshold, z the group's most likely response
    under the reference among those; other rewards stay. pi_ref exp(beta r') then gives every right answer of the group
    the mass of z. It holds for raw rewards and rows whose target is pi_ref exp(beta r) / Z (presets "tb",
    "length_true"; the KL paid in the reward at weight 1 / beta), not under length normalisation or a normalised reward.

    Args:
        reward: [B] floats, raw.
        logp_ref: [B] log-probability of each whole response under the reference, nats (a sum over tokens).
        groups: [B] integer group ids in any order.
        beta: the target's factor of the reward, above 0.
        threshold: least reward of a right answer.
    """
    value, _, _, own = _per_group(reward, groups)
    ref = _beside_reward("logp_ref", logp_ref, reward)
    beta = checks.positive("beta", checks.number("beta", beta))
    right = value >= checks.number("threshold", threshold)
    # the first of the most likely right ones: by -log pi_ref, wrong ones behind, then by group
    by_ref = torch.where(right, -ref, torch.inf).sort(stable=True).indices
    order = by_ref[own.which[by_ref].sort(stable=True).indices]
    mode = order[own.offsets[own.which]]  # [B]
    lifted = value[mode] + (ref[mode] - ref) / beta
    return torch.where(right, lifted, value).to(reward.dtype)


def distinct_advantage(
    reward: Tensor, classes: Tensor, groups: Tensor, *, credit: str = "shapley", threshold: float = 1.0
) -> Tensor:
    """Credit for how many *different* right answers a group holds, less a baseline of the group's others. [B]

    credit "shapley": 1[right] / (right answers of its class in the group), the Shapley share of the number of classes
    found; its expected policy gradient is that of the sum over k <= G of E[distinct in k samples] / k. "alone":
    1[right and no other of its class is], what the group would lose without it; its gradient is that of
    E[distinct in G samples]. The baseline is the mean credit of the other members in the group without this one, so it
    does not depend on the response and leaves the expected gradient alone. A group of one has its credit.

    Args:
        reward: [B] floats.
        classes: [B] integer ids of what a response answers; equal for the same solution, within a group.
        groups: [B] integer group ids in any order.
        credit: "shapley" or "alone".
        threshold: least reward of a right answer.
    """
    value, _, size, own = _per_group(reward, groups)
    checks.same_device("classes", checks.integers("classes", classes, tuple(reward.shape)), "reward", reward)
    checks.one_of("credit", credit, ("shapley", "alone"))
    right = (value >= checks.number("threshold", threshold)).double()
    kinds = grouped(own.which * len(value) + grouped(classes).which)  # groups by class
    same = kinds.total(right)  # right answers of one's class, oneself among them
    alone = right * (same == 1)
    if credit == "shapley":
        share = right / same.clamp_min(1.0)
        others = own.total(share) - alone
    else:
        share = alone
        others = own.total(alone) - alone + right * (same == 2)
    return (share - others / (size - 1).clamp_min(1.0)).to(reward.dtype)


def whiten(value: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the mask, unbiased variance; 0 outside. The layout of `value`."""
    check_mask(mask, checks.floating("value", value))
    eps = _at_least_0("eps", eps)
    x, m = value.detach().double(), mask.to(torch.bool)
    num = m.sum().clamp_min(1)
    mean = torch.where(m, x, 0.0).sum() / num
    centred = torch.where(m, x - mean, 0.0)
    variance = centred.square().sum() / (num - 1).clamp_min(1)
    return (centred * (variance + eps).rsqrt()).to(value.dtype)


def reinforce_pp_advantage(
    reward: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,
    token_reward: Tensor | None = None,
) -> Tensor:
    """Returns-to-go, whitened over the whole batch (REINFORCE++, arXiv 2501.03262); 0 outside the mask.

    Args:
        reward: [B], paid at each response's last token.
        mask: [B, T], or [N] with `cu_seqlens`.
        gamma: discount per token.
        cu_seqlens: [B+1] for packed tokens.
        token_reward: the layout of `mask`: paid per token besides (a KL penalty, say).
    """
    gamma = checks.number("gamma", gamma)
    layout = _segments(mask, cu_seqlens, reward, token_reward=token_reward)
    value = torch.zeros(mask.shape, dtype=torch.float64, device=mask.device)
    if token_reward is not None:
        value = torch.where(layout.mask, token_reward.detach().double(), 0.0)
    rewards = value + last_token(reward.detach().double(), layout)
    return whiten(discounted(rewards, layout, gamma), layout.mask).to(reward.dtype)


def gae(
    reward: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    cu_seqlens: Tensor | None = None,
    token_reward: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates (arXiv 1506.02438), not whitened, and returns; 0 outside the mask.

    Args:
        reward: [B], paid at each response's last token.
        value: the layout of `mask`: V of the state before each token.
        mask: [B, T], or [N] with `cu_seqlens`. Holes are stepped over.
        gamma, lam: discount and trace decay per token.
        token_reward: the layout of `mask`: what each token is paid besides, or None.

    Returns:
        (advantage, returns), the layout of `mask`.
    """
    gamma, lam = checks.number("gamma", gamma), checks.number("lam", lam)
    layout = _segments(mask, cu_seqlens, reward, value=checks.plain("value", value), token_reward=token_reward)
    v = torch.where(layout.mask, value.detach().double(), 0.0)
    r = last_token(reward.detach().double(), layout)
    if token_reward is not None:
        r = r + torch.where(layout.mask, token_reward.detach().double(), 0.0)
    # with V(s_t+1) of the next token that counts: delta_t = r_t + gamma V_t+1 - V_t, A_t = delta_t + gamma lam A_t+1
    advantage = _scan(r, v, layout, gamma, lam)
    returns = torch.where(layout.mask, advantage + v, 0.0)
    return advantage.to(value.dtype), returns.to(value.dtype)


def discounted(reward: Tensor, segments: Segments, gamma: float) -> Tensor:
    """Returns-to-go of token rewards. The layout of `reward`."""
    return _scan(reward, None, segments, gamma, 1.0)


def last_token(reward: Tensor, segments: Segments) -> Tensor:
    """Each sequence's reward [B] at its last counting token, 0 elsewhere."""
    mask = segments.mask
    if mask.numel() == 0:
        return reward.new_zeros(mask.shape)
    position = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    counted = torch.where(mask, position, -1)
    if segments.cu_seqlens is None:
        last = counted.amax(1, keepdim=True)
    else:
        tops = torch.segment_reduce(
            counted.double(), "max", offsets=segments.cu_seqlens, axis=0, initial=-1.0, unsafe=True
        )
        last = segments.spread(tops).long()
    return torch.where(mask & (position == last), segments.spread(reward), 0.0)


def _scan(reward: Tensor, value: Tensor | None, segments: Segments, gamma: float, lam: float) -> Tensor:
    """A_t = r_t + gamma V_t+1 - V_t + gamma lam A_t+1 over the counting tokens, those between stepped over."""
    mask = segments.mask
    ends = torch.zeros_like(mask)
    if segments.cu_seqlens is None:
        ends[:, -1:] = True
    else:
        edges = mask.new_zeros(len(mask) + 1)
        ends = edges.index_fill(0, segments.cu_seqlens[1:], True)[1:]
    step = torch.where(mask, reward, 0.0)
    if value is not None:
        # the next counting token's: the first one at t + 1 or later
        near = _recurrence(torch.where(mask, value, 0.0), (~mask & ~ends).double())
        step = step + torch.where(mask, gamma * torch.where(ends, 0.0, _shifted(near, 1)) - value, 0.0)
    carry = torch.where(mask, step.new_full((), gamma * lam), 1.0)
    return torch.where(mask, _recurrence(step, torch.where(ends, 0.0, carry)), 0.0)


def _recurrence(x: Tensor, a: Tensor) -> Tensor:
    """y_t = x_t + a_t y_t+1 along the last dimension, in log2(T) steps; nothing crosses an a of 0, NaN neither."""
    reach = 1
    while reach < x.shape[-1]:
        x = x + torch.where(a != 0, a * _shifted(x, reach), 0.0)
        a = a * _shifted(a, reach)
        reach *= 2
    return x


def _shifted(x: Tensor, by: int) -> Tensor:
    """x_t+by at t, 0 beyond the end."""
    return torch.nn.functional.pad(x[..., by:], (0, by))


def _segments(mask: Tensor, cu_seqlens: Tensor | None, reward: Tensor, **per_token: Tensor | None) -> Segments:
    checks.floating("reward", reward, dims=1)
    checks.same_device("reward", reward, "mask", checks.plain("mask", mask))
    segments = segments_of(mask, mask, cu_seqlens, "mask", reward, "reward")
    for name, value in per_token.items():
        if value is None:
            continue
        if checks.floating(name, value).shape != mask.shape:
            checks.fail(name, f"shape {tuple(mask.shape)} as mask has", checks.shape(value))
        checks.same_device(name, value, "mask", mask)
    return segments


def _at_least_0(name: str, value: float) -> float:
    value = checks.number(name, value, "a finite number of at least 0")
    if not value >= 0.0:
        checks.fail(name, "a finite number of at least 0", value)
    return value


def _rollouts(reference_rewards: Tensor) -> Tensor:
    checks.floating("reference_rewards", reference_rewards, dims=2)
    if reference_rewards.shape[1] == 0:
        checks.fail("reference_rewards", "[B, K] with K of at least 1", checks.shape(reference_rewards))
    return reference_rewards.detach().double()


def optimal_value(reference_rewards: Tensor, *, temperature: float = 0.5) -> Tensor:
    """V* = t log mean exp(r / t) over rollouts of the reference, [B, K] -> [B] (A*-PO, arXiv 2505.20686)."""
    r = _rollouts(reference_rewards)
    temperature = checks.positive("temperature", temperature)
    mean = torch.logsumexp(r / temperature, -1) - math.log(r.shape[-1])
    return (temperature * mean).to(reference_rewards.dtype)


def qrpo_target(reward: Tensor, reference_rewards: Tensor, *, beta: float) -> Tensor:
    """Quantile of r [B] among rewards of the reference [B, K], less beta log Z (QRPO, arXiv 2507.08068). [B]

    The quantile of the reference's own rewards is uniform, so Z = E exp(u / beta) = beta (e^(1/beta) - 1). The authors
    leave out the 1 (their eq. 11, log Z = log beta + 1/beta), which is the same below beta 0.05 and .46 off at 1.
    """
    beta, rollouts = checks.positive("beta", beta), _rollouts(reference_rewards)
    checks.same_device("reward", checks.floating("reward", reward, dims=1), "reference_rewards", rollouts)
    if len(reward) != len(rollouts):
        checks.fail("reward", f"one number per row of reference_rewards, ({len(rollouts)},)", checks.shape(reward))
    quantile = (rollouts <= reward.detach().double()[:, None]).double().mean(1)
    log_z = math.log(beta) + 1.0 / beta + math.log(-math.expm1(-1.0 / beta))
    return (quantile - beta * log_z).to(reward.dtype)


def gflowrl_target(
    reward: Tensor,
    log_ratio_ref: Tensor,
    groups: Tensor,
    *,
    beta: float = 8.0,
    clip: tuple[float, float] = (0.2, 0.28),
) -> Tensor:
    """-clip(g), g = Z + mean(log old - log ref) - beta r, Z the group's mean of the rest (arXiv 2607.13394).

    log_ratio_ref: [B] mean over tokens of log pi_old - log pi_ref. As read from third-party notes; not checked
    against the authors' code, which is not public.
    """
    value, _, _, of_group = _per_group(reward, groups)
    if checks.floating("log_ratio_ref", log_ratio_ref).shape != reward.shape:
        checks.fail("log_ratio_ref", f"shape {tuple(reward.shape)} as reward has", checks.shape(log_ratio_ref))
    checks.same_device("log_ratio_ref", log_ratio_ref, "reward", reward)
    if not (isinstance(clip, (tuple, list)) and len(clip) == 2):
        checks.fail("clip", "(low, high)", repr(clip))
    low, high = (_at_least_0("clip", bound) for bound in clip)
    own = checks.number("beta", beta) * value - log_ratio_ref.detach().double()
    gap = of_group.mean(own, torch.ones_like(own)) - own
    return (-gap.clamp(-low, high)).to(reward.dtype)
