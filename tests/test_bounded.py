"""The bounded backward: the bound holds, is used, and costs no accuracy that matters."""

import pytest
import torch

from flowrl_kernels import linear_logprob
from flowrl_kernels.chunked import bounded
from flowrl_kernels.testing import assert_grad_close, composition, oracle, relative_error, rl_like_inputs


def dropped_error(hidden, weight, target, grad, epsilon):
    """(reported bound, true relative L1 error of the set that was dropped, in float64, plan share)."""
    seen = []
    make_plan = bounded.make_plan

    def spy(*arguments):
        seen.append(make_plan(*arguments))
        return seen[-1]

    report = torch.zeros(3)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded, "make_plan", spy)
        linear_logprob(x, w, target, epsilon=epsilon, report=report, impl="chunked").logp.backward(grad)
    plan = seen[0]
    p = torch.softmax(hidden.double() @ weight.double().T, -1)
    rest = p.scatter(1, target[:, None], 0.0)
    entries = grad.double().abs()[:, None] * rest
    total = 2.0 * entries.sum()
    rows = grad.nonzero()[:, 0]
    active = plan.active.repeat_interleave(bounded.COLUMNS, 1)[:, : weight.shape[0]]
    dropped = entries[rows].masked_fill(active, 0.0).sum()
    return report, float(dropped / total), (x.grad, w.grad)


def adversarial(name, n=192, h=24, v=5000):
    make = torch.Generator().manual_seed(7)
    weight = torch.randn(v, h, generator=make) / h**0.5
    hidden = torch.randn(n, h, generator=make)
    target = torch.randint(v, (n,), generator=make)
    grad = torch.randn(n, generator=make)
    if name == "uniform":
        hidden *= 1e-3
    elif name == "one_hot":
        hidden = 60.0 * weight[target] / weight[target].square().sum(1, keepdim=True)
    elif name == "two_token_ties":
        other = torch.randint(v, (n,), generator=make)
        hidden = 40.0 * (weight[target] + weight[other])
    elif name == "targets_in_one_tile":
        target = torch.randint(100, (n,), generator=make)
        hidden = 12.0 * weight[target]
    elif name == "common_direction":
        common = torch.nn.functional.normalize(torch.randn(h, generator=make), dim=0)
        weight = weight + 5.0 * common
        hidden = 12.0 * weight[target] / weight[target].norm(dim=1, keepdim=True)
    elif name == "zero_gradients":
        hidden = 15.0 * weight[target]
        grad[::2] = 0.0
    return hidden, weight, target, grad


NAMES = ["uniform", "one_hot", "two_token_ties", "targets_in_one_tile", "common_direction", "zero_gradients"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("epsilon", [1e-3, 3e-2])
def test_the_true_error_stays_under_the_bound_and_the_bound_under_epsilon(name, epsilon):
    hidden, weight, target, grad = adversarial(name)
    report, true, gradients = dropped_error(hidden, weight, target, grad, epsilon)
    bound, share, fell_back = report.tolist()
    assert bound <= epsilon
    if fell_back:
        assert (bound, share) == (0.0, 1.0)
    else:
        assert true <= bound * (1 + 1e-6)
    _, _, dx, dw = oracle(hidden, weight, target, grad)
    for got, expected in zip(gradients, (dx, dw)):
        assert got.isfinite().all()
        assert relative_error(got, expected)[0] < max(5 * epsilon, 1e-3)


@pytest.mark.parametrize("zipf", [1.0, 1.2])
def test_on_rl_like_batches_it_drops_much_and_loses_little(zipf):
    hidden, weight, target, grad = rl_like_inputs(512, 384, 40000, zipf=zipf)
    made = composition(hidden, weight, target)
    assert 0.1 < made["mean_entropy_nats"] < 1.2, made
    report, true, (got_dx, got_dw) = dropped_error(hidden, weight, target, grad, 0.01)
    bound, share, fell_back = report.tolist()
    assert fell_back == 0.0
    assert 0.0 < share < 0.1, (share, made)
    assert 0.005 <= bound <= 0.01
    assert true <= bound
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    dx, dw = torch.autograd.grad(linear_logprob(x, w, target).logp, (x, w), grad)
    assert_grad_close(got_dx, dx, rel=1.5e-3, row=0.05)
    assert_grad_close(got_dw, dw, rel=1.5e-3, row=0.4)


def test_rows_of_dlogits_still_sum_to_zero():
    # a head whose rows are all the same direction sees nothing but the row sums of dlogits
    hidden, weight, target, grad = rl_like_inputs(256, 64, 20000)
    ones = torch.ones(20000, 1)
    x = torch.cat([hidden, torch.zeros(256, 1)], 1).requires_grad_()
    report = torch.zeros(3)
    out = linear_logprob(x, torch.cat([weight, ones], 1), target, epsilon=0.01, report=report)
    out.logp.backward(grad)
    assert report[2] == 0
    assert report[1] < 1
    assert x.grad[:, -1].abs().max() < 1e-6


def test_a_bias_main_grad_and_16_bit_inputs_take_the_same_path():
    hidden, weight, target, grad = rl_like_inputs(256, 64, 20000, dtype=torch.bfloat16)
    bias = 0.1 * torch.randn(20000, generator=torch.Generator().manual_seed(0))
    results = []
    for epsilon in (0.0, 0.003):
        report, main = torch.zeros(3), torch.zeros(20000, 64)
        x, w, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()
        settings = {"bias": b, "main_grad": main, "temperature": 0.9, "logit_scale": 1.1}
        linear_logprob(x, w, target, epsilon=epsilon, report=report, **settings).logp.backward(grad)
        assert w.grad is None
        results.append((x.grad, main, b.grad))
    assert 0 < report[1] < 1
    for got, expected in zip(results[1], results[0]):
        assert_grad_close(got, expected, rel=6e-3, row=0.5)


def test_softcap_and_an_entropy_gradient_take_the_exact_path():
    hidden, weight, target, grad = rl_like_inputs(64, 32, 4000)
    for settings in ({"softcap": 30.0}, {"entropy": True}):
        report, x = torch.zeros(3), hidden.clone().requires_grad_()
        out = linear_logprob(x, weight, target, epsilon=0.01, report=report, **settings)
        total = (out.logp * grad).sum() + (out.entropy.sum() if out.entropy is not None else 0.0)
        total.backward()
        assert report.tolist() == [0.0, 1.0, 1.0]


def test_two_bounded_runs_give_the_same_bits():
    hidden, weight, target, grad = rl_like_inputs(256, 48, 12000)
    grads = []
    for _ in range(2):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        linear_logprob(x, w, target, epsilon=0.01).logp.backward(grad)
        grads.append((x.grad, w.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_a_report_and_a_main_grad_may_change_between_forward_and_backward(epsilon):
    hidden, weight, target, grad = rl_like_inputs(64, 32, 4000, zipf=1.2)
    report, main = torch.zeros(3), torch.ones(4000, 32)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    first, second = (
        linear_logprob(x, w, target, epsilon=epsilon, report=report, main_grad=main).logp for _ in range(2)
    )
    main.zero_()
    first.backward(grad, retain_graph=True)
    first.backward(grad)
    second.backward(grad)  # three times one gradient
    alone, once = torch.zeros(4000, 32), x.grad / 3
    y = hidden.clone().requires_grad_()
    linear_logprob(y, w, target, epsilon=epsilon, main_grad=alone).logp.backward(grad)
    assert_grad_close(main / 3, alone, rel=1e-6)
    assert_grad_close(once, y.grad, rel=1e-6)
