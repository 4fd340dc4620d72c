"""The sampled backward: unbiased, the same again where it must be, and honest about its error."""

import math

import pytest
import torch

from flowrl_kernels import LinearFlowRLLoss, Sampled, linear_logprob
from flowrl_kernels.chunked import sampled as room
from flowrl_kernels.chunked import sampling
from flowrl_kernels.core.counter import fold
from flowrl_kernels.testing import rl_like_inputs

V = 3000
DATA = rl_like_inputs(48, 24, V, zipf=1.0)


def gradients(draw=(0, 0), share=0.1, data=DATA, impl="chunked", exact=False, **settings):
    hidden, weight, target, grad = data
    x, w, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), torch.zeros(V, requires_grad=True)
    report = torch.zeros(3 if exact else 4)
    sampled = None if exact else Sampled(share, draw, **settings)
    linear_logprob(x, w, target, bias=b, report=report, sampled=sampled, impl=impl).logp.backward(grad)
    return (x.grad, w.grad, b.grad), report


def excess(draws=64, **settings):
    """|mean - exact| over the root of (summed element variances / draws), of each gradient: near 1 if unbiased."""
    exact, _ = gradients(exact=True)
    made = [gradients((7, i), **settings)[0] for i in range(draws)]
    ratios = []
    for i, wanted in enumerate(exact):
        drawn = torch.stack([g[i].double() for g in made])
        spread = (drawn.var(0).sum() / draws).sqrt()
        ratios.append(float((drawn.mean(0) - wanted).norm() / spread))
    return ratios


@pytest.mark.parametrize("order", [None, torch.randperm(V, generator=torch.Generator().manual_seed(0))])
def test_the_mean_of_many_draws_is_the_exact_gradient(order):
    assert max(excess(order=order)) <= 1.3


def test_a_factor_two_percent_too_large_would_not_pass(monkeypatch):
    make_plan = room.make_plan

    def wrong(*arguments):
        plan = make_plan(*arguments)
        return plan._replace(factor=1.02 * plan.factor)

    monkeypatch.setattr(room, "make_plan", wrong)
    assert max(excess()) > 1.3


def test_the_same_draw_gives_the_same_bits_and_another_draw_others():
    first, again, other = (gradients((3, step))[0] for step in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in zip(first, other))


def test_a_retained_graph_and_a_recomputed_one_draw_the_same_pairs():
    hidden, weight, target, grad = DATA
    w = weight.clone().requires_grad_()

    def forward(x):
        return linear_logprob(x, w, target, sampled=Sampled(0.1, (5,))).logp

    x = hidden.clone().requires_grad_()
    logp = forward(x)
    once = torch.autograd.grad(logp, (x, w), grad, retain_graph=True)
    twice = torch.autograd.grad(logp, (x, w), grad)
    kept = torch.autograd.grad(torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=False), (x, w), grad)
    for a, b, c in zip(once, twice, kept):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_no_generator_is_read_or_moved():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gradients()[0]
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first[0], gradients()[0][0])


def test_what_a_row_draws_depends_on_its_id_and_not_on_its_place():
    hidden, weight, target, grad = DATA
    turn = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(48) + (5 << 32)
    whole = gradients(rows=ids)[0]
    turned = gradients(rows=ids[turn], data=(hidden[turn], weight, target[turn], grad[turn]))[0]
    torch.testing.assert_close(turned[0], whole[0][turn], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(turned[1], whole[1], rtol=1e-4, atol=1e-6)


def test_rows_without_a_gradient_leave_the_others_their_draw():
    hidden, weight, target, grad = DATA
    some = torch.where(torch.arange(48) % 3 == 0, 0.0, grad)
    with_ids = gradients(rows=torch.arange(48), data=(hidden, weight, target, some))[0]
    without = gradients(data=(hidden, weight, target, some))[0]
    assert torch.equal(with_ids[1], without[1])


def test_the_estimated_error_is_near_the_true_one_and_no_bound_is_claimed():
    exact, _ = gradients(exact=True)
    true, told = [], []
    for step in range(16):
        (_, _, db), report = gradients((9, step))
        bound, share, fell_back, estimate = report.tolist()
        assert math.isnan(bound)
        assert fell_back == 0.0
        assert 0.07 < share < 0.13
        told.append(estimate**2)
        true.append(float(((db - exact[2]).norm() / exact[2].norm()) ** 2))
    ratio = (sum(told) / sum(true)) ** 0.5
    assert 0.7 < ratio < 1.4, ratio


@pytest.mark.parametrize("share", [0.02, 0.16, 0.6])
def test_tau_gives_the_share_that_was_asked_for(share):
    cost = torch.randn(64, 300, generator=torch.Generator().manual_seed(0)).mul(3.0).exp()
    cost[:, :30] = 0.0
    tau = sampling.threshold(cost, share, None, "")
    expected = sampling.chances(cost, tau).double().mean() / sampling.ONE
    assert float(expected) == pytest.approx(share, rel=0.015)


def test_more_than_every_pair_of_some_weight_is_every_one():
    cost = torch.rand(8, 20)
    cost[:, :10] = 0.0
    chance = sampling.chances(cost, sampling.threshold(cost, 0.9, None, ""))
    assert torch.equal(chance, torch.where(cost > 0.0, sampling.ONE, 0))


def test_the_random_numbers_are_the_published_generators():
    # SplitMix64 of seed 1234567: the first outputs of the reference implementation
    state, outputs = 1234567, []
    for i in (1, 2, 3):
        counter = torch.tensor([state + i * sampling.GOLDEN & (1 << 64) - 1], dtype=torch.uint64).view(torch.int64)
        outputs.append(int(sampling.mix(counter)) & (1 << 64) - 1)
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_neighbouring_rows_runs_and_draws_are_not_correlated():
    bits = torch.stack([sampling.uniform(fold((0, s)), torch.arange(200), 400) for s in (0, 1)]).double() / sampling.ONE
    assert abs(float(bits.mean()) - 0.5) < 5 / (12 * bits.numel()) ** 0.5
    for a, b in ((bits[0], bits[1]), (bits[:, 1:], bits[:, :-1]), (bits[..., 1:], bits[..., :-1])):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 5 / a.numel() ** 0.5


def test_certain_rows_and_broken_rows_harm_no_other_row():
    hidden, weight, target, grad = DATA
    hidden = hidden.clone()
    hidden[3] = 1e4 * weight[target[3]]  # nothing is left beside its target
    sure = gradients(data=(hidden, weight, target, grad))[0]
    assert all(g.isfinite().all() for g in sure)
    hidden[5] = torch.nan
    broken = gradients(data=(hidden, weight, target, grad))[0]
    assert broken[0][5].isnan().all()
    others = torch.arange(48) != 5
    assert broken[0][others].isfinite().all()


def test_a_share_at_which_it_does_not_pay_is_the_exact_backward():
    exact, _ = gradients(exact=True)
    got, report = gradients(share=0.9)
    assert report.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(got, exact))


def test_it_is_refused_by_name_where_there_is_none():
    hidden, weight, target, _ = DATA
    for settings, kind, message in (
        ({"impl": "reference"}, RuntimeError, "sampled"),
        ({"epsilon": 0.1}, ValueError, "epsilon: wanted 0 beside sampled"),
        ({"kept": (torch.zeros(0), torch.zeros(49))}, ValueError, "kept: "),
    ):
        with pytest.raises(kind, match=message):
            linear_logprob(hidden, weight, target, sampled=Sampled(0.1, (0,)), **settings)
    for wrong, kind, message in (
        (0.1, TypeError, "sampled: "),
        (Sampled(0.0, (0,)), ValueError, "sampled.share: "),
        (Sampled(0.1, 3), TypeError, "sampled.draw: "),
        (Sampled(0.1, (0.5,)), TypeError, "sampled.draw: "),
        (Sampled(0.1, (0,), rows=torch.arange(5)), ValueError, "sampled.rows: "),
        (Sampled(0.1, (0,), order=torch.zeros(V, dtype=torch.long)), ValueError, "sampled.order: "),
        (Sampled(0.1, (0,), group=3), TypeError, "sampled.group: "),
    ):
        with pytest.raises(kind, match=message):
            linear_logprob(hidden, weight, target, sampled=wrong)


def test_the_loss_module_takes_it():
    hidden, weight, target, _ = DATA
    x, report = hidden.clone().requires_grad_(), torch.zeros(4)
    edges = torch.tensor([0, 16, 48])
    out = LinearFlowRLLoss()(
        x, weight, target, torch.zeros(48), torch.ones(2), torch.zeros(2), cu_seqlens=edges, report=report,
        sampled=Sampled(0.1, (0,)),
    )  # fmt: skip
    out.loss.backward()
    assert 0.05 < report[1] < 0.15
    assert x.grad.isfinite().all()
