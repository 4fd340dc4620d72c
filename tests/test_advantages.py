"""Advantages against plain recursions and loops; groups in any order, responses ragged, holed, padded or packed."""

import math
import statistics

import pytest
import torch

from flowrl_kernels import advantages, gae, group_normalize, reinforce_pp_advantage
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.testing import cu_seqlens_of, ragged_mask

REWARD = torch.tensor([1.0, 0.0, 1.0, -2.0, 0.5, 0.5, 3.0, 0.25, 0.0], dtype=torch.float64)
GROUPS = torch.tensor([3, 7, 3, 7, 5, 5, -1, 3, 7])  # 5: all equal; -1: a group of one
B, T = 7, 9


def members(i):
    return [j for j in range(len(GROUPS)) if GROUPS[j] == GROUPS[i]]


@pytest.mark.parametrize("scale", [True, False])
def test_group_normalize_is_the_unbiased_z_score(scale):
    got = group_normalize(REWARD, GROUPS, scale=scale)
    for i in range(9):
        own = [float(REWARD[j]) for j in members(i)]
        wanted = 0.0
        if len(own) > 1:
            wanted = float(REWARD[i]) - statistics.mean(own)
            if scale:
                wanted /= statistics.stdev(own) + 1e-6
        assert float(got[i]) == pytest.approx(wanted, abs=1e-12)
    assert got[6] == 0
    assert (got[4:6] == 0).all()


def test_the_order_of_a_batch_does_not_matter():
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    for f in (group_normalize, advantages.leave_one_out, advantages.reinforce_rej):
        torch.testing.assert_close(f(REWARD[order], GROUPS[order]), f(REWARD, GROUPS)[order], rtol=0, atol=1e-15)


def test_one_bad_reward_stays_in_its_group():
    reward = REWARD.clone()
    reward[0] = math.nan
    got = group_normalize(reward, GROUPS)
    assert got[[0, 2, 7]].isnan().all()
    others = [1, 3, 4, 5, 6, 8]
    assert torch.equal(got[others], group_normalize(REWARD, GROUPS)[others])


def test_large_rewards_with_a_small_spread_keep_their_digits():
    reward = (torch.tensor([0.0, 1.0, 2.0, 1.0]) + 4096).float()
    got = group_normalize(reward, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(got, torch.tensor([-1.0, 0.0, 1.0, 0.0]) / (2 / 3) ** 0.5, rtol=1e-5, atol=1e-6)
    assert got.dtype == torch.float32


def test_leave_one_out_subtracts_the_mean_of_the_others():
    got = advantages.leave_one_out(REWARD, GROUPS)
    for i in range(9):
        others = [float(REWARD[j]) for j in members(i) if j != i]
        wanted = float(REWARD[i]) - statistics.mean(others) if others else 0.0
        assert float(got[i]) == pytest.approx(wanted, abs=1e-12)


def test_the_optimal_baseline_is_the_mean_weighted_by_length():
    length = torch.tensor([3, 1, 7, 2, 5, 4, 1, 9, 2])
    got = advantages.optimal_baseline(REWARD, length, GROUPS)
    for i in range(9):
        weights = [int(length[j]) for j in members(i)]
        baseline = statistics.fmean([float(REWARD[j]) for j in members(i)], weights)
        wanted = float(REWARD[i]) - baseline if len(weights) > 1 else 0.0
        assert float(got[i]) == pytest.approx(wanted, abs=1e-12)


def test_raft_trains_good_samples_only_and_reinforce_rej_mixed_groups_only():
    assert advantages.raft(torch.tensor([1.0, -1.0, 0.0])).tolist() == [1.0, 0.0, 0.0]
    got = advantages.reinforce_rej(REWARD, GROUPS)
    mixed = torch.tensor([len({float(REWARD[j]) for j in members(i)}) > 1 for i in range(9)])
    assert torch.equal(got, torch.where(mixed, REWARD, 0.0))
    assert not mixed.all()


def test_the_unlikeliest_answer_of_a_group_keeps_its_whole_reward():
    mean_logp = torch.tensor([-1.0, -2.0, -3.0, -0.5, -1.0, -1.0, -9.0, -2.5, -0.7], dtype=torch.float64)
    got = advantages.unlikeliness_reward(REWARD, mean_logp, GROUPS, strength=0.25)
    for i in range(9):
        own = sorted(members(i), key=lambda j: (float(mean_logp[j]), j))
        wanted = float(REWARD[i]) * (1 - 0.25 * own.index(i) / len(own))
        assert float(got[i]) == pytest.approx(wanted, abs=1e-15)


def test_whiten_over_the_mask():
    mask = ragged_mask(B, T)
    value = torch.randn(B, T, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = advantages.whiten(value.masked_fill(~mask, math.nan), mask)
    inside = value[mask].tolist()
    mean, variance = statistics.mean(inside), statistics.variance(inside)
    torch.testing.assert_close(got[mask], (value[mask] - mean) / math.sqrt(variance + 1e-8), rtol=1e-12, atol=1e-12)
    assert (got[~mask] == 0).all()
    assert (advantages.whiten(value, torch.zeros_like(mask)) == 0).all()
    one = torch.zeros_like(mask)
    one[0, 0] = True
    assert advantages.whiten(value, one).isfinite().all()


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    mask = ragged_mask(B, T, seed=seed)
    mask[0, 0] = mask[1, :2] = False  # holes at the start too
    reward = torch.randn(B, generator=draw, dtype=torch.float64)
    value, tokens = torch.randn(2, B, T, generator=draw, dtype=torch.float64)
    lengths = torch.where(mask.any(1), T - mask.flip(1).int().argmax(1), 0)
    return mask, reward, value, tokens, torch.arange(T) < lengths[:, None], cu_seqlens_of(lengths)


def recursion(mask, reward, value, tokens, gamma, lam):
    """(advantage, returns) by the definition, over the tokens that count."""
    advantage, returns = torch.zeros(B, T, dtype=torch.float64), torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        here = [t for t in range(T) if mask[b, t]]
        trace, following = 0.0, 0.0
        for t in reversed(here):
            r = float(tokens[b, t]) + (float(reward[b]) if t == here[-1] else 0.0)
            delta = r + gamma * following - float(value[b, t])
            trace = delta + gamma * lam * trace
            following = float(value[b, t])
            advantage[b, t], returns[b, t] = trace, trace + following
    return advantage, returns


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (0.99, 0.0)])
def test_gae_is_the_recursion_padded_and_packed(gamma, lam):
    for seed in range(3):
        mask, reward, value, tokens, inside, cu_seqlens = batch(seed)
        wanted = recursion(mask, reward, value, tokens, gamma, lam)
        junk = value.masked_fill(~mask, math.nan)
        padded = gae(reward, junk, mask, gamma=gamma, lam=lam, token_reward=tokens.masked_fill(~mask, math.nan))
        flat = gae(
            reward, junk[inside], mask[inside], gamma=gamma, lam=lam, cu_seqlens=cu_seqlens, token_reward=tokens[inside]
        )
        for got, packed, expected in zip(padded, flat, wanted):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(packed, got[inside])
            assert (got[~mask] == 0).all()


def test_gae_without_token_rewards_and_discount_is_return_minus_value():
    mask, reward, value, *_ = batch()
    advantage, returns = gae(reward, value, mask)
    torch.testing.assert_close(returns, torch.where(mask, reward[:, None], 0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(advantage, torch.where(mask, reward[:, None] - value, 0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reinforce_pp_is_returns_to_go_whitened_padded_and_packed(gamma):
    for seed in range(3):
        mask, reward, _, tokens, inside, cu_seqlens = batch(seed)
        zeros = torch.zeros(B, T, dtype=torch.float64)
        returns, _ = recursion(mask, reward, zeros, tokens, gamma, 1.0)
        inner = returns[mask]
        wanted = torch.zeros_like(returns)
        wanted[mask] = (inner - inner.mean()) * (inner.var() + 1e-8).rsqrt()
        got = reinforce_pp_advantage(reward, mask, gamma=gamma, token_reward=tokens)
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        flat = reinforce_pp_advantage(
            reward, mask[inside], gamma=gamma, token_reward=tokens[inside], cu_seqlens=cu_seqlens
        )
        torch.testing.assert_close(flat, got[inside], rtol=1e-12, atol=1e-12)


def test_the_reward_stands_at_the_last_counting_token():
    mask, reward, _, _, inside, cu_seqlens = batch()
    got = advantages.last_token(reward, Segments(mask, None))
    wanted = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        here = mask[b].nonzero()
        if len(here):
            wanted[b, here[-1]] = reward[b]
    assert torch.equal(got, wanted)
    assert torch.equal(advantages.last_token(reward, Segments(mask[inside], cu_seqlens.long())), got[inside])


def test_empty_batches():
    none, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert group_normalize(none, ids).shape == (0,)
    assert gae(none, torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool))[0].shape == (0, 4)
    packed = reinforce_pp_advantage(
        none, torch.zeros(0, dtype=torch.bool), cu_seqlens=torch.zeros(1, dtype=torch.int64)
    )
    assert packed.shape == (0,)
    silent = gae(torch.ones(2), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    assert all((t == 0).all() for t in silent)


def test_nothing_carries_a_gradient_and_dtypes_are_kept():
    reward = REWARD.float().requires_grad_()
    for out in (
        group_normalize(reward, GROUPS), advantages.leave_one_out(reward, GROUPS), advantages.raft(reward),
        advantages.reinforce_rej(reward, GROUPS), advantages.unlikeliness_reward(reward, reward, GROUPS),
        *gae(reward, reward[:, None], torch.ones(9, 1)), reinforce_pp_advantage(reward, torch.ones(9, 2)),
    ):  # fmt: skip
        assert not out.requires_grad
        assert out.dtype == torch.float32


def test_the_values_that_relatives_take_from_the_reference_policy():
    rewards = torch.tensor([[0.0, 1.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    got = advantages.optimal_value(rewards, temperature=0.5)
    assert float(got[0]) == pytest.approx(0.5 * math.log((1 + 2 * math.exp(2) + math.exp(4)) / 4))
    assert float(got[1]) == pytest.approx(5.0)
    quantiles = advantages.qrpo_target(torch.tensor([1.0, 4.0], dtype=torch.float64), rewards, beta=0.1)
    log_z = math.log(0.1) + 10.0  # the authors' simplification: up to exp(-1 / beta) = 4.5e-5 right
    assert float(quantiles[0]) == pytest.approx(0.75 - 0.1 * log_z, abs=5e-6)
    assert float(quantiles[1]) == pytest.approx(0.0 - 0.1 * log_z, abs=5e-6)
    one = advantages.qrpo_target(torch.tensor([9.0], dtype=torch.float64), rewards[:1], beta=1.0)
    assert float(one) == pytest.approx(1.0 - math.log(math.e - 1.0))  # Z = integral of e^q over [0, 1]
    exact = math.log(sum(math.exp((i + 0.5) / 1e5 / 0.1) for i in range(100000)) / 1e5)
    assert log_z == pytest.approx(exact, abs=1e-4)


def test_the_target_of_gflowrl_is_its_clipped_gap():
    reward = torch.tensor([1.0, 0.0, 0.3], dtype=torch.float64)
    ratio = torch.tensor([0.1, -0.2, 0.0], dtype=torch.float64)  # mean log old - log ref
    got = advantages.gflowrl_target(reward, ratio, torch.tensor([0, 0, 1]), beta=0.5, clip=(0.2, 0.28))
    # own = beta r - log ratio: 0.4 and 0.2, mean 0.3; gap = mean - own
    torch.testing.assert_close(got, torch.tensor([0.1, -0.1, 0.0], dtype=torch.float64))
    far = advantages.gflowrl_target(reward, ratio, torch.tensor([0, 0, 1]), beta=8.0)
    torch.testing.assert_close(far, torch.tensor([0.2, -0.28, 0.0], dtype=torch.float64))


ROW, IDS = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0, 0, 1])
FLAT = torch.ones(3, 2)
BAD = {
    "raft of a list": (lambda: advantages.raft([1.0]), TypeError, "reward: .*list"),
    "eps below 0": (lambda: advantages.group_normalize(ROW, IDS, eps=-1), ValueError, "eps: .*at least 0.*-1"),
    "scale as text": (lambda: advantages.group_normalize(ROW, IDS, scale="no"), TypeError, "scale: .*'no'"),
    "tolerance as text": (lambda: advantages.reinforce_rej(ROW, IDS, tolerance="0"), TypeError, "tolerance: .*'0'"),
    "strength as a list": (
        lambda: advantages.unlikeliness_reward(ROW, ROW, IDS, strength=[0.5]), TypeError, r"strength: .*\[0.5\]",
    ),
    "gamma infinite": (lambda: advantages.gae(ROW, FLAT, FLAT, gamma=math.inf), ValueError, "gamma: .*inf"),
    "lam as None": (lambda: advantages.gae(ROW, FLAT, FLAT, lam=None), TypeError, "lam: .*None"),
    "no value": (lambda: advantages.gae(ROW, None, FLAT), TypeError, "value: .*NoneType"),
    "gamma as an array": (
        lambda: advantages.reinforce_pp_advantage(ROW, FLAT, gamma=torch.ones(2)), ValueError, r"gamma: .*\(2,\)",
    ),
    "a mask of fractions": (lambda: advantages.whiten(FLAT, 0.5 * FLAT), ValueError, "mask: .*other values"),
    "a complex mask": (lambda: advantages.whiten(FLAT, FLAT * 1j), TypeError, "mask: .*complex64"),
    "boundaries that fall": (
        lambda: advantages.gae(ROW, ROW, ROW > -1, cu_seqlens=torch.tensor([0, 2, 1, 3])), ValueError,
        "cu_seqlens: .*rising",
    ),
    "no rollouts": (lambda: advantages.optimal_value(torch.ones(2, 0)), ValueError, r"reference_rewards: .*\(2, 0\)"),
    "rewards of another number": (
        lambda: advantages.qrpo_target(ROW, torch.ones(2, 4), beta=1.0), ValueError, r"reward: .*\(2,\).*\(3,\)",
    ),
    "a clip of one": (lambda: advantages.gflowrl_target(ROW, ROW, IDS, clip=(0.2,)), ValueError, "clip: .*low, high"),
    "ratios of another number": (
        lambda: advantages.gflowrl_target(ROW, ROW[:2], IDS), ValueError, r"log_ratio_ref: .*\(2,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_an_argument_that_cannot_be_meant_is_named(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
