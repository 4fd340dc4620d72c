"""The sampled backward in Triton under the interpreter: the pairs of the definition in torch, and its gradients."""

import math

import pytest
import torch

from flowrl_kernels import Sampled, linear_logprob
from flowrl_kernels.chunked import sampled as definition
from flowrl_kernels.testing import assert_grad_close, poisoned_memory, rl_like_inputs
from flowrl_kernels.triton import sampled as room

N, H, V = 40, 16, 1000


def backward(data, impl="triton", share=0.1, needs=(True, True), draw=(3, 1), order=None, rows=None, **settings):
    """Gradients of hidden, weight and bias, and the report."""
    hidden, weight, target, grad = data
    x, w = (t.clone().requires_grad_(need) for t, need in zip((hidden, weight), needs))
    b, report = torch.zeros(len(weight), dtype=hidden.dtype, requires_grad=True), torch.zeros(4)
    with poisoned_memory():
        sampled = None if share == 1.0 else Sampled(share, draw, rows, order)
        settings |= {} if sampled is None else {"report": report}
        linear_logprob(x, w, target, bias=b, sampled=sampled, impl=impl, **settings).logp.backward(grad)
    return (x.grad, w.grad, b.grad), report


def batch(dtype=torch.float32):
    hidden, weight, target, grad = rl_like_inputs(N, H, V, zipf=1.0, dtype=dtype)
    grad = 64 * grad  # float16 gradients stay in their range
    grad[3], target[7] = 0.0, -100
    return hidden, weight, target, grad


@pytest.mark.parametrize("in_order", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_it_draws_the_pairs_of_the_definition_and_gives_its_gradients(monkeypatch, in_order, dtype, within):
    data, plans = batch(dtype), []
    live = (data[3] != 0) & (data[2] >= 0)
    make = definition.make_plan

    def spy(*arguments):  # the two forwards round differently, statistics by a step of fp16: the first one's plan
        plans.append(make(*arguments))
        return (
            plans[0] if len(plans) == 1 else plans[0]._replace(mass=plans[0].mass[live], factor=plans[0].factor[live])
        )

    for place in (room, definition):
        monkeypatch.setattr(place, "make_plan", spy)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0)) if in_order else None
    got, report = backward(data, order=order)
    expected, told = backward(data, "chunked", order=order)
    ours, theirs = plans[0].factor[live], plans[1].factor
    assert ((ours - theirs).abs() <= 0.02 * theirs).float().mean() > 0.99
    assert (plans[0].factor[~live] == 0).all()
    assert torch.isnan(report[0])
    assert report[1:].tolist() == pytest.approx(told[1:].tolist(), rel=5e-3)
    for g, e in zip(got, expected):
        assert g.dtype == dtype
        rel = 4e-3 if dtype == torch.bfloat16 else max(within, 1e-5)  # each is rounded by itself
        assert_grad_close(g, e, rel=rel, row=0.2)


def test_slabs_and_main_grad_in_an_order_change_nothing(monkeypatch):
    data = batch()
    order = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    whole, _ = backward(data, order=order)
    main = torch.ones(V, H)
    assert backward(data, order=order, needs=(False, True), main_grad=main)[0][1] is None
    assert_grad_close(main - 1.0, whole[1], rel=1e-5)
    monkeypatch.setattr(room.bounded, "SLAB_BYTES", 1 << 15)
    parts, report = backward(data, order=order)
    assert_grad_close(parts[0], whole[0], rel=1e-6)
    assert torch.equal(parts[1], whole[1])
    assert math.isnan(report[0])


def test_a_share_at_which_it_does_not_pay_no_row_and_no_gradient_are_exact():
    data = batch()
    exact, _ = backward(data, share=1.0)
    got, report = backward(data, share=0.7)
    assert report.tolist() == [0.0, 1.0, 1.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(got, exact))
    hidden, weight, target, _ = data
    for rows in (0, N):
        got, _ = backward((hidden[:rows], weight, target[:rows], torch.zeros(rows)))
        assert all((g == 0).all() for g in got)
