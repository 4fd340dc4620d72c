"""What is not a first backward is exact (the reference) or refused by name, never 0 or None in silence."""

import pytest
import torch
from torch.autograd import forward_ad

from flowrl_kernels import linear_logprob, logprob

MAKE = torch.Generator().manual_seed(1)
HIDDEN, WEIGHT = torch.randn(4, 8, generator=MAKE), torch.randn(20, 8, generator=MAKE)
TARGET = torch.tensor([3, 19, 0, 7])
KEPT = torch.arange(20).repeat(4), torch.arange(0, 81, 20)
DOORS = {
    "linear": lambda x, w, impl: linear_logprob(x, w, TARGET, impl=impl).logp,
    "bounded": lambda x, w, impl: linear_logprob(x, w, TARGET, impl=impl, epsilon=0.1).logp,
    "entropy": lambda x, w, impl: linear_logprob(x, w, TARGET, impl=impl, entropy=True).entropy,
    "logits": lambda x, w, impl: logprob(x @ w.T, TARGET, impl=impl).logp,
    "logits in place": lambda x, w, impl: logprob(x @ w.T, TARGET, impl=impl, inplace_backward=True).logp,
    "kept": lambda x, w, impl: linear_logprob(x, w, TARGET, kept=KEPT, impl=impl).logp,
}


@pytest.mark.parametrize("door", DOORS)
def test_a_second_derivative_is_refused_by_name(door):
    def loss(x):
        return DOORS[door](x, WEIGHT, "chunked").sum()

    x = HIDDEN.clone().requires_grad_()
    first = torch.autograd.grad(loss(x), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="logprob.*second derivative is not implemented.*reference"):
        torch.autograd.grad(first.square().sum(), x)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.functional.hvp(loss, HIDDEN, torch.ones_like(HIDDEN))


@pytest.mark.parametrize("door", DOORS)
def test_a_graph_of_the_gradient_that_nobody_goes_through_is_no_error(door):
    x = HIDDEN.clone().requires_grad_()
    first = torch.autograd.grad(DOORS[door](x, WEIGHT, "chunked").sum(), x, create_graph=True)[0]
    plain = torch.autograd.grad(DOORS[door](x, WEIGHT, "chunked").sum(), x)[0]
    assert torch.equal(first, plain)


@pytest.mark.parametrize("door", DOORS)
def test_forward_mode_is_refused_by_name(door):
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="logprob.*forward-mode"):
        DOORS[door](forward_ad.make_dual(HIDDEN, torch.ones_like(HIDDEN)), WEIGHT, "chunked")
    with pytest.raises(NotImplementedError, match="logprob.*(forward-mode|torch.func)"):
        torch.func.jvp(lambda x: DOORS[door](x, WEIGHT, "chunked"), (HIDDEN,), (torch.ones_like(HIDDEN),))


@pytest.mark.parametrize("door", DOORS)
def test_a_gradient_under_torch_func_is_refused_by_name(door):
    with pytest.raises(NotImplementedError, match="logprob.*torch.func"):
        torch.func.grad(lambda x: DOORS[door](x, WEIGHT, "chunked").sum())(HIDDEN)


@pytest.mark.parametrize("door", ["linear", "logits"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_a_forward_is_right(door):
    several = torch.stack([HIDDEN, 2 * HIDDEN])
    got = torch.func.vmap(lambda x: DOORS[door](x, WEIGHT, "chunked"))(several)
    assert torch.equal(got, torch.stack([DOORS[door](x, WEIGHT, "chunked") for x in several]))


@pytest.mark.parametrize("door", ["linear", "entropy", "logits"])
def test_the_reference_has_them_all(door):
    x, w = HIDDEN.double(), WEIGHT.double()

    def loss(a):
        return DOORS[door](a, w, "reference").sum()

    v = torch.randn(4, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = 1e-5
    up, down = (torch.func.grad(loss)(x + sign * step * v) for sign in (1, -1))
    hvp = torch.autograd.functional.hvp(loss, x, v)[1]
    assert hvp.norm() > 1e-3
    assert (hvp - (up - down) / (2 * step)).abs().max() < 1e-7
    tangent = torch.func.jvp(loss, (x,), (v,))[1]
    assert abs(float(tangent - (loss(x + step * v) - loss(x - step * v)) / (2 * step))) < 1e-7


@pytest.mark.parametrize("door", [d for d in DOORS if d != "logits in place"])
def test_a_later_backward_leaves_earlier_gradients_alone(door):
    x, w = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    loss = DOORS[door](x, w, "chunked").sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    kept = [g.clone() for g in first]
    torch.autograd.grad(3 * loss, (x, w), retain_graph=True)
    for _ in range(3):
        loss.backward(retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, kept))
    torch.testing.assert_close(x.grad, 3 * kept[0])
