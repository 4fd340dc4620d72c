"""The sampled backward in Triton on a GPU: unbiased, the same again, and the definition's pairs and factors."""

import pytest
import torch
from gpu_waits import host_waits

from flowrl_kernels import Sampled, linear_logprob
from flowrl_kernels.chunked import sampled as definition
from flowrl_kernels.testing import assert_grad_close, poisoned_memory, rl_like_inputs

pytestmark = pytest.mark.gpu


def batch(dtype, n=2048, h=512, v=20000):
    hidden, weight, target, grad = rl_like_inputs(n, h, v, zipf=1.0, dtype=dtype, device="cuda")
    return hidden, weight, target, grad * 64  # float16 gradients stay in range


def gradients(data, share=0.1, draw=0, impl="triton", order=None, **settings):
    """The report, and the gradients of hidden and weight."""
    hidden, weight, target, grad = data
    report = torch.zeros(4, device=hidden.device)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    if share > 0:
        settings |= {"sampled": Sampled(share, (7, draw), order=order), "report": report}
    linear_logprob(x, w, target, impl=impl, **settings).logp.backward(grad)
    return report, x.grad, w.grad


def excess(data, draws=32, **settings):
    """|mean - exact| over the root of (summed element variances / draws), eq. 35, of both gradients."""
    exact = gradients(data, share=0.0)[1:]
    total, square = ([torch.zeros_like(t, dtype=torch.float64) for t in exact] for _ in range(2))
    for i in range(draws):
        for t, s, g in zip(total, square, gradients(data, draw=i, **settings)[1:]):
            t += g
            s += g.double().square()
    ratios = []
    for t, s, wanted in zip(total, square, exact):
        mean = t / draws
        variance = (s - draws * mean.square()).sum() / (draws - 1)
        ratios.append(float((mean - wanted).norm() / (variance / draws).sqrt()))
    return ratios


# in 16 bits both sides are rounded too: a share whose draws err by far more than that
SHARES = {torch.float32: 0.1, torch.bfloat16: 0.01, torch.float16: 0.01}


@pytest.mark.parametrize("dtype", SHARES)
def test_the_mean_of_many_draws_is_the_exact_gradient_in_an_order_too(dtype):
    data = batch(dtype)
    order = torch.randperm(20000, generator=torch.Generator().manual_seed(0)).cuda()
    for given in (None, order):
        for ratio in excess(data, share=SHARES[dtype], order=given):
            assert 0.7 < ratio < 1.3


def test_a_factor_two_percent_too_large_would_not_pass(monkeypatch):
    from flowrl_kernels.triton import sampled

    make_plan = sampled.make_plan

    def wrong(*arguments):
        plan = make_plan(*arguments)
        return plan._replace(factor=1.02 * plan.factor)

    monkeypatch.setattr(sampled, "make_plan", wrong)
    assert max(excess(batch(torch.float32), share=0.1)) > 1.3


def test_two_runs_give_the_same_bits_and_the_host_waits_once():
    data = batch(torch.bfloat16)
    with poisoned_memory():
        first = gradients(data, draw=3)
    x, w = data[0].clone().requires_grad_(), data[1].clone().requires_grad_()
    out = linear_logprob(x, w, data[2], sampled=Sampled(0.1, (7, 3)), impl="triton").logp
    with host_waits() as waits:
        out.backward(data[3])
    assert len(waits) == 1
    assert torch.equal(x.grad, first[1])
    assert torch.equal(w.grad, first[2])
    assert not torch.equal(w.grad, gradients(data, draw=4)[2])


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-3), (torch.float16, 2e-3)])
def test_it_keeps_the_pairs_of_the_definition_with_its_factors_and_gives_its_gradients(dtype, rel, monkeypatch):
    from flowrl_kernels.triton import sampled

    data, plans, make = batch(dtype), [], definition.make_plan

    def spy(*arguments):  # the two forwards round differently, statistics by a step of fp16: gradients by the first's
        plans.append(make(*arguments))
        return plans[0]

    monkeypatch.setattr(sampled, "make_plan", spy)
    monkeypatch.setattr(definition, "make_plan", spy)
    (told, *got), (other, *expected) = (gradients(data, impl=impl) for impl in ("triton", "chunked"))
    ours, theirs = plans[0].factor, plans[1].factor
    assert 0.05 < (theirs > 0).float().mean() < 0.15
    assert ((ours - theirs).abs() <= 0.02 * theirs).float().mean() > 0.99
    assert ((ours - theirs).abs() <= 0.02 * theirs)[theirs > 0].float().mean() > 0.95
    assert told[1:].tolist() == pytest.approx(other[1:].tolist(), rel=5e-3)
    for g, e in zip(got, expected):
        assert g.dtype == dtype
        assert_grad_close(g, e, rel=rel, row=0.2)


def test_a_row_draws_by_its_id_and_not_by_its_place_and_main_grad_in_an_order_adds_the_same():
    hidden, weight, target, grad = data = batch(torch.float32)
    turn = torch.randperm(2048, generator=torch.Generator().manual_seed(1)).cuda()
    order = torch.randperm(20000, generator=torch.Generator().manual_seed(2)).cuda()
    whole = gradients(data, order=order)
    main = torch.ones(weight.shape, device="cuda")
    x, w = hidden[turn].clone().requires_grad_(), weight.clone().requires_grad_()
    draw = Sampled(0.1, (7, 0), rows=turn, order=order)
    linear_logprob(x, w, target[turn], sampled=draw, main_grad=main, impl="triton").logp.backward(grad[turn])
    assert_grad_close(x.grad, whole[1][turn], rel=1e-4)
    assert_grad_close(main - 1.0, whole[2], rel=1e-4)


@pytest.mark.sanitize
@pytest.mark.parametrize("h", [64, 63])
def test_slabs_bias_and_odd_sizes_stay_within_their_memory(h, monkeypatch):
    from flowrl_kernels.triton import bounded

    monkeypatch.setattr(bounded, "SLAB_BYTES", 4 * 128 * (2 * 128 + 4 * h))
    data = batch(torch.bfloat16, 300, h, 3001)
    bias = torch.zeros(3001, device="cuda", requires_grad=True)
    report, dx, dw = gradients(data, bias=bias)
    assert report[2] == 0
    assert 0.0 < report[1] < 0.2
    for gradient in (dx, dw, bias.grad):
        assert gradient.isfinite().all()
        assert gradient.norm() > 0
