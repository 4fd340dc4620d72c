"""Several ids a row, and the statistics of a row, in the Triton kernels under the interpreter."""

import pytest
import torch

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.reference.linear_logprob import linear_logprob as reference
from flowrl_kernels.testing import assert_grad_close, poisoned_memory
from tests.test_several import normal, several

N, H, V = 13, 16, 389


def call(hidden, weight, ids, bias=None, **settings):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    return leaves, linear_logprob(*leaves[:2], ids, bias=leaves[2], impl="triton", **settings)


@pytest.mark.parametrize("k", [2, 37])
def test_log_probs_and_gradients_are_those_of_float64(dtype, within, k):
    hidden, weight, ids = several(N, H, V, k, dtype)
    bias, temperature, g, ge = normal(V).to(dtype), normal(N, seed=2).abs() + 0.5, normal(N, k, seed=3), normal(N)
    g[5] = torch.tensor([1.0, -1.0] + [0.0] * (k - 2))
    for softcap, scale in ((None, 0.7), (15.0, 1.0))[k > 2 :]:
        leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
        exact = reference(
            leaves[0], leaves[1], ids, leaves[2], temperature.double(), scale, softcap, entropy=True
        )  # itself held to a plain log-softmax by tests/test_several.py
        wanted = torch.autograd.grad((exact.logp, exact.entropy), leaves, (g.double(), ge.double()))
        settings = {"temperature": temperature, "logit_scale": scale, "softcap": softcap, "entropy": True}
        with poisoned_memory():
            leaves, out = call(hidden, weight, ids, bias, **settings)
            got = torch.autograd.grad((out.logp, out.entropy), leaves, (g, ge))
        assert (out.logp - exact.logp).abs().max() < 2e-5
        assert (out.entropy - exact.entropy).abs().max() < 2e-5
        assert_grad_close(got[0], wanted[0], rel=2 * within)
        assert_grad_close(got[1], wanted[1], rel=2 * within, row=50 * within)
        assert_grad_close(got[2], wanted[2], rel=max(within, 2e-5), row=50 * within)


def test_each_id_has_the_bits_it_has_alone_whatever_the_flags(dtype):
    hidden, weight, ids = several(N, H, 900, 3, dtype)
    plain = linear_logprob(hidden, weight, ids, impl="triton").logp
    more = linear_logprob(hidden, weight, ids, entropy=True, statistics=True, impl="triton")
    assert torch.equal(more.logp, plain)
    some = linear_logprob(hidden[3:9], weight, ids[3:9], impl="triton").logp
    assert torch.equal(some, plain[3:9])
    for k in range(3):
        alone = linear_logprob(hidden, weight, ids[:, k], statistics=k == 0, impl="triton")
        assert torch.equal(plain[:, k], alone.logp)


def test_the_weight_gradient_goes_into_main_grad(dtype, within):
    hidden, weight, ids = several(N, H, V, 3, dtype)
    g = normal(N, 3)
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    wanted = torch.autograd.grad(reference(*leaves, ids).logp, leaves, g.double())
    main = torch.ones(V, H)
    (x, w, _), out = call(hidden, weight, ids, main_grad=main)
    out.logp.backward(g)
    assert w.grad is None
    assert_grad_close(main - 1.0, wanted[1], rel=within, row=50 * within)
    assert_grad_close(x.grad, wanted[0], rel=2 * within)  # of 13 rows few count


def test_statistics_are_the_argmax_whether_an_id_is_it_and_the_mean_logit(dtype):
    hidden, weight, ids = several(N, H, 900, 3, dtype)
    hidden[7] = 0.0  # every logit equal: the lowest id is the argmax
    hidden[8], weight[890] = weight[300] * 3, weight[300]  # two equal ones, splits apart
    z = hidden.double() @ weight.double().T / 0.7
    live, best = (ids >= 0).any(1), z.argmax(1)
    out = linear_logprob(hidden, weight, ids, temperature=0.7, statistics=True, impl="triton")
    assert torch.equal(out.argmax, torch.where(live, best, -1))
    assert out.argmax[7] == 0
    assert torch.equal(out.is_top1, ids == best[:, None])
    assert (out.mean_logits - torch.where(live, z.mean(1), 0.0)).abs().max() < 1e-5


def test_logits_take_several_ids_too(dtype, within):
    hidden, weight, ids = several(N, H, 4100, 35)
    logits, g, ge = (hidden @ weight.T).to(dtype), normal(N, 35, seed=3), normal(N)
    for softcap in (None, 20.0):
        z = logits.double().requires_grad_()
        bent = z if softcap is None else softcap * torch.tanh(z / softcap)
        every = torch.log_softmax(bent / 0.7, 1)
        logp = torch.where(ids >= 0, every.gather(1, ids.clamp_min(0)), 0.0)
        entropy = torch.where((ids >= 0).any(1), -(every.exp() * every).sum(1), 0.0)
        (wanted,) = torch.autograd.grad((logp, entropy), z, (g.double(), ge.double()))
        for inplace in (False, True):
            z = logits.clone().requires_grad_()
            out = logprob(
                z, ids, temperature=0.7, softcap=softcap, entropy=True, inplace_backward=inplace, impl="triton"
            )
            assert (out.logp - logp).abs().max() < 2e-5
            assert (out.entropy - entropy).abs().max() < 2e-5
            assert_grad_close(torch.autograd.grad((out.logp, out.entropy), z, (g, ge))[0], wanted, rel=within)
    assert torch.equal(out.logp[:, 0], logprob(logits, ids[:, 0], temperature=0.7, softcap=20.0, impl="triton").logp)
