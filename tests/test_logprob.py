"""logprob: log-probabilities from logits that already exist."""

import pytest
import torch

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.testing import assert_grad_close

IMPLS = ["reference", "chunked", pytest.param("triton", marks=pytest.mark.gpu)]


def peaked_logits(n, v, impl="chunked", dtype=torch.float32, seed=0):
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=make) * 3
    target = torch.randint(v, (n,), generator=make)
    logits[torch.arange(n), target] += 25 * torch.rand(n, generator=make)
    device = "cuda" if impl == "triton" else "cpu"
    return logits.to(device, dtype), target.to(device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_match_float64(impl, dtype):
    logits, target = peaked_logits(67, 9001, impl, dtype)
    make = torch.Generator().manual_seed(1)
    temperature = (0.6 + torch.rand(67, generator=make)).to(logits.device)
    g, ge = (torch.randn(67, generator=make).to(logits.device) for _ in range(2))
    settings = {"temperature": temperature, "softcap": 40.0, "entropy": True}
    z64 = logits.double().requires_grad_()
    exact = logprob(z64, target, impl="reference", **{**settings, "temperature": temperature.double()})
    expected = torch.autograd.grad((exact.logp, exact.entropy), z64, (g.double(), ge.double()))[0]
    z = logits.requires_grad_()
    out = logprob(z, target, impl=impl, **settings)
    assert (out.logp - exact.logp).abs().max() < 2e-5
    assert (out.entropy - exact.entropy).abs().max() < 2e-5
    got = torch.autograd.grad((out.logp, out.entropy), z, (g, ge))[0]
    assert got.dtype == dtype
    assert_grad_close(got, expected, rel=1e-4 if dtype == torch.float32 else 2.5e-3)


@pytest.mark.parametrize("impl", ["chunked", pytest.param("triton", marks=pytest.mark.gpu)])
def test_a_row_keeps_its_bits_whatever_the_batch(impl):
    logits, target = peaked_logits(150, 700, impl)
    whole = logprob(logits, target, impl=impl).logp
    order = torch.randperm(150, generator=torch.Generator().manual_seed(2)).to(logits.device)
    assert torch.equal(logprob(logits[order], target[order], impl=impl).logp, whole[order])
    assert torch.equal(logprob(logits[:7], target[:7], entropy=True, impl=impl).logp, whole[:7])


def test_the_gradient_can_overwrite_the_logits_once():
    logits, target = peaked_logits(10, 300)
    leaf = logits.clone().requires_grad_()
    expected = torch.autograd.grad(logprob(leaf, target).logp.sum(), leaf)[0]
    leaf = logits.clone().requires_grad_()
    z = leaf * 1.0
    out = logprob(z, target, inplace_backward=True).logp.sum()
    out.backward(retain_graph=True)
    assert torch.equal(leaf.grad, expected)
    assert torch.equal(z, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_banned_tokens_and_ignored_rows(impl):
    logits, target = peaked_logits(8, 260, impl)
    logits[:, 100:200] = -torch.inf
    target[:2], target[2:4], target[4:] = 150, -100, 5
    z = logits.requires_grad_()
    out = logprob(z, target, entropy=True, impl=impl)
    assert (out.logp[:2] == -torch.inf).all()
    assert (out.logp[2:4] == 0).all()
    grad = torch.autograd.grad(out.logp[2:].sum() + out.entropy.sum(), z)[0]
    assert grad.isfinite().all()
    assert (grad[2:4] == 0).all()


def test_both_doors_agree():
    make = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(20, 16, generator=make), torch.randn(333, 16, generator=make)
    target = torch.randint(333, (20,), generator=make)
    a = linear_logprob(hidden, weight, target, entropy=True)
    b = logprob(hidden @ weight.T, target, entropy=True)
    torch.testing.assert_close(a.logp, b.logp, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.entropy, b.entropy, atol=1e-5, rtol=0)
