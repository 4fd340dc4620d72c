"""vocab_parallel=: a head split over ranks gives what the whole head gives."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from flowrl_kernels import linear_logprob
from flowrl_kernels.testing import assert_grad_close, peaked_inputs

V = 203


def worker(rank, world):
    hidden, weight, target = peaked_inputs(31, 16, V)
    target[4] = -100
    bias = torch.randn(V, generator=torch.Generator().manual_seed(9))
    bias[:40] = -torch.inf  # a whole shard without mass, on four ranks
    target[target < 40] = 77
    target[4] = -100
    make = torch.Generator().manual_seed(3)
    g, ge = torch.randn(31, generator=make), torch.randn(31, generator=make)
    settings = {"temperature": 0.8, "softcap": 25.0, "entropy": True}
    x, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
    whole = linear_logprob(x, w, target, bias=b, **settings)
    expected = torch.autograd.grad((whole.logp, whole.entropy), (x, w, b), (g, ge))
    cuts = [0, 40, 97, 150, V] if world == 4 else [0, 120, V]
    own = slice(cuts[rank], cuts[rank + 1])
    x, w, b = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_(), bias[own].clone().requires_grad_()
    out = linear_logprob(x, w, target, bias=b, vocab_parallel=dist.group.WORLD, **settings)
    got = torch.autograd.grad((out.logp, out.entropy), (x, w, b), (g, ge))
    torch.testing.assert_close(out.logp, whole.logp, atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy, whole.entropy, atol=4e-6, rtol=1e-6)
    assert_grad_close(got[0], expected[0], rel=1e-5)
    if world == 2 or rank > 0:
        assert_grad_close(got[1], expected[1][own], rel=1e-5)
        assert_grad_close(got[2], expected[2][own], rel=1e-5)
    else:
        assert (got[1] == 0).all()
    again = linear_logprob(hidden, weight[own], target, bias=bias[own], vocab_parallel=dist.group.WORLD, **settings)
    assert torch.equal(again.logp, out.logp)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_a_split_head_equals_the_whole_one(world):
    on_ranks(worker, world)
