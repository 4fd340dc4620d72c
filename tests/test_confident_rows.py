"""Very confident rows: what is left to the other tokens survives, in log-probs, entropy and gradients."""

import pytest
import torch

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.testing import relative_error


def confident(n=64, h=32, v=1500, level=25.0, gap=20.5):
    """Rows whose target stands at about `level` and holds all but some 5e-7 of the mass."""
    make = torch.Generator().manual_seed(0)
    weight = torch.randn(v, h, generator=make) / h**0.5
    target = torch.randint(v, (n,), generator=make)
    bias = torch.zeros(v)
    hidden = level * weight[target] / weight[target].square().sum(1, keepdim=True)
    hidden += 0.02 * torch.randn(n, h, generator=make)
    bias -= 0.0
    z = hidden.double() @ weight.double().T
    rest = z.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    top = z.gather(1, target[:, None])[:, 0]
    hidden *= (14.5 / (top - rest))[:, None].float()
    return hidden, weight, target


def gradients(hidden, weight, target, how):
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    return torch.autograd.grad(how(x, w).sum(), (x, w))


@pytest.mark.parametrize("epsilon", [0.0, 1e-3])
def test_gradients_are_as_good_as_eager_float32(epsilon):
    hidden, weight, target = confident()
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact_logp = torch.log_softmax(x @ w.T, -1).gather(1, target[:, None])[:, 0]
    rest = -torch.expm1(exact_logp)
    assert 1e-7 < float(rest.median()) < 2e-6
    exact = torch.autograd.grad(exact_logp.sum(), (x, w))
    ours = gradients(
        hidden, weight, target, lambda x, w: linear_logprob(x, w, target, epsilon=epsilon, impl="chunked").logp
    )
    eager = gradients(hidden, weight, target, lambda x, w: torch.log_softmax(x @ w.T, -1).gather(1, target[:, None]))
    for mine, theirs, right in zip(ours, eager, exact):
        assert relative_error(mine, right)[0] < max(0.05, 1.5 * relative_error(theirs, right)[0])
        assert relative_error(mine, right)[0] < 0.1


@pytest.mark.parametrize("offset", [300.0, -300.0, 3000.0])
def test_a_large_common_level_costs_no_digits(offset):
    make = torch.Generator().manual_seed(1)
    logits = offset + torch.randn(40, 900, generator=make).mul(64).round() / 64  # exact in float32 at this level
    target = torch.randint(900, (40,), generator=make)
    exact = torch.log_softmax(logits.double(), -1)
    entropy = -(exact.exp() * exact).sum(-1)
    picked = exact.gather(1, target[:, None])[:, 0]
    z = logits.clone().requires_grad_()
    out = logprob(z, target, entropy=True, impl="chunked")
    assert (out.logp - picked).abs().max() < 2e-6
    assert (out.entropy - entropy).abs().max() < 2e-6
    got = torch.autograd.grad(out.logp.sum(), z)[0]
    right = torch.zeros_like(exact).scatter_(1, target[:, None], 1.0) - exact.exp()
    assert (got - right).abs().max() < 1e-6
    hidden = torch.eye(40)
    through = linear_logprob(hidden, logits.T.contiguous(), target, entropy=True, impl="chunked")
    assert (through.logp - picked).abs().max() < 2e-6
    assert (through.entropy - entropy).abs().max() < 2e-6
