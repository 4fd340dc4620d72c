"""Losses that the library has no setting for do what their papers write, by hand on a few tokens."""

import math

import pytest
import torch

from benchmarks.evidence import gradients, numbers, plan, sweep
from benchmarks.evidence.batch import Batch
from benchmarks.evidence.rows import ROWS
from flowrl_kernels import group_normalize, policy_gradient_loss
from flowrl_kernels.advantages import leave_one_out


def batch(logp, old=None, reward=(1.0, 0.0), ref=None, entropy=None, lengths=None):
    logp = torch.tensor(logp, dtype=torch.float64).requires_grad_()
    size, width = logp.shape
    mask = torch.arange(width) < torch.tensor(lengths or [width] * size)[:, None]
    reward = torch.tensor(reward, dtype=torch.float64)
    old = None if old is None else torch.tensor(old, dtype=torch.float64)
    ref = torch.zeros(size, width, dtype=torch.float64) if ref is None else torch.tensor(ref, dtype=torch.float64)
    zero = torch.zeros(size, dtype=torch.int64)
    return Batch(
        logp, lambda: torch.tensor(entropy, dtype=torch.float64), ref, old, mask, reward, reward > 0, zero, zero,
        zero, torch.zeros(size), lambda: torch.zeros_like(ref), lambda times: torch.zeros_like(ref),
    )  # fmt: skip


def loss(method, b, dial):
    return method(b, torch.full_like(b.reward, dial))


def gradient(method, b, dial=0.0):
    return torch.autograd.grad(loss(method, b, dial), b.logp)[0]


LOGP, OLD = [[-1.0, -0.7], [-0.4, -2.0]], [[-1.3, -0.5], [-0.4, -1.1]]
A = 0.5 / math.sqrt(0.5)  # of rewards 1 and 0: half their gap over their unbiased deviation (eps 1e-6 beside it)


@pytest.mark.parametrize("method", [gradients.sapo, gradients.gmpo])
def test_where_the_policy_sampled_itself_soft_and_geometric_ratios_give_the_gradient_of_grpo(method):
    ref = [[-1.2, -0.1], [-0.9, -1.0]]
    for weight in (0.0, 0.3):
        b = batch(LOGP, ref=ref)
        torch.testing.assert_close(gradient(method, b, weight), gradient(gradients.grpo, b, weight))


def test_a_penalty_beside_the_loss_is_the_coefficient_that_the_library_takes():
    b = batch(LOGP, OLD, ref=[[-1.2, -0.1], [-0.9, -1.0]], lengths=[2, 1])
    a = group_normalize(b.reward, b.groups)
    own = policy_gradient_loss(
        b.logp, b.old, a, mask=b.mask, kl=0.3, logp_ref=b.ref, aggregate="seq-mean-token-mean"
    ).loss  # fmt: skip
    torch.testing.assert_close(loss(gradients.grpo, b, 0.3), own)
    torch.testing.assert_close(gradient(gradients.grpo, b, 0.3), torch.autograd.grad(own, b.logp)[0])
    for kind in ("k1", "k2", "k3"):
        own = policy_gradient_loss(
            b.logp, b.old, leave_one_out(b.reward, b.groups), mask=b.mask, ratio="none", kl=0.3, kl_kind=kind,
            logp_ref=b.ref, aggregate="seq-mean-token-sum",
        ).loss  # fmt: skip
        torch.testing.assert_close(loss(gradients.rloo_kl_in_loss(kind), b, 0.3), own)


def test_sapo_weighs_a_token_by_four_times_the_slope_of_its_gate():
    found = gradient(gradients.sapo, batch(LOGP, OLD))
    for i, (a, tau) in enumerate(((A, 1.0), (-A, 1.05))):
        for t in range(2):
            ratio = math.exp(LOGP[i][t] - OLD[i][t])
            s = 1 / (1 + math.exp(-tau * (ratio - 1)))
            assert float(found[i, t]) == pytest.approx(-a * ratio * 4 * s * (1 - s) / 2 / 2, rel=1e-5)


def test_gmpo_weighs_a_response_by_the_geometric_mean_of_bounded_ratios_and_drops_tokens_beyond():
    logp = [[-1.0, -0.7], [-0.4, -2.0]]
    old = [[-1.6, -0.5], [-0.4, -1.1]]  # ratios' logs: .6 (held at .4), -.2; 0, -.9 (held at -.4, for A is negative)
    found = gradient(gradients.gmpo, batch(logp, old))
    first, second = math.exp((0.4 - 0.2) / 2), math.exp((0.0 - 0.4) / 2)
    expected = [[0.0, -A * first / 2 / 2], [A * second / 2 / 2, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-12)


def test_straight_through_k3_has_the_value_of_k3_and_the_gradient_of_k2():
    ref = [[-1.2, -0.1], [-0.9, -1.0]]
    b = batch(LOGP, ref=ref)
    torch.testing.assert_close(
        gradient(gradients.rloo_straight_through_k3, b, 0.7), gradient(gradients.rloo_kl_in_loss("k2"), b, 0.7)
    )
    value = loss(gradients.rloo_straight_through_k3, b, 0.7) - loss(gradients.rloo_kl_in_loss("k3"), b, 0.7)
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-12)


def test_the_top_entropy_mask_leaves_the_tokens_of_least_entropy_without_a_gradient():
    found = gradient(gradients.top_entropy, batch(LOGP, entropy=[[0.3, 1.2], [0.9, 0.1]]), 0.5)
    expected = [[0.0, -A / 2], [A / 2, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-12)


def test_dapo_averages_over_the_tokens_of_mixed_groups():
    b = batch(
        [[-1.0, -0.7], [-0.4, 0.0], [-0.2, -0.1], [-0.3, -0.3]],
        reward=(1.0, 0.0, 1.0, 1.0),
        lengths=[2, 1, 2, 2],
        entropy=[[0.0, 0.0]] * 4,
    )
    b = b._replace(groups=torch.tensor([0, 0, 1, 1]), cell=torch.zeros(4, dtype=torch.int64))
    expected = [[-A / 3, -A / 3], [A / 3, 0.0], [0.0, 0.0], [0.0, 0.0]]
    found = gradient(gradients.dapo, b)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-12)


def test_the_plan_names_methods_once_and_its_test_seeds_choose_nothing():
    points = list(plan.points())
    assert len({point.key() for point in points}) == len(points)
    assert {point.method for point in points} <= set(ROWS)
    assert not set(plan.TEST) & set(plan.VALIDATION)
    rows = [[0.1, 100, *[None] * 9], [0.3, 100, *[None] * 9]]
    at = sweep.COLUMNS.index("kl_own")
    rows[0][at], rows[1][at] = 0.5, 0.2
    assert sweep.best_rate(rows, "kl_own") == 0.3
    rows[1][at] = None  # not finite
    assert sweep.best_rate(rows, "kl_own") == 0.1


def test_the_tables_of_the_page_are_what_the_results_give():
    page = numbers.PAGE.read_text()
    assert numbers.with_tables(page, sweep.made_so_far(sweep.FRONTIER)) == page


def test_intervals_are_those_of_students_t_and_gaps_are_paired():
    made = numbers.estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert made.mean == 3.0
    assert made.half == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    cells = [{"x": 1.0}, {"x": 3.0}, {"x": 5.0}]
    assert numbers.gap(cells, [{"x": 0.0}, {"x": 2.0}, {"x": 4.0}], "x") == (1.0, 0.0)


def test_every_point_that_is_kept_has_the_seeds_and_rates_of_the_plan():
    made = sweep.made_so_far(sweep.FRONTIER)
    known = {point.key(): point for point in plan.points()}
    assert set(made["points"]) <= set(known)
    for key, point in made["points"].items():
        assert sorted({row[0] for row in point["validation"]}) == sorted(plan.RATES), key
        assert {row[1] for row in point["validation"]} == set(plan.VALIDATION), key
        assert [row[:2] for row in point["cells"]] == [[point["lr"], seed] for seed in plan.TEST], key
        assert point["lr"] == sweep.best_rate(point["validation"], known[key].aim), key
