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


def troubled(rank, world):
    hidden, weight, target = peaked_inputs(31, 16, V)
    group = dist.group.WORLD
    # two heads of one group: rank 0 holds as many rows of either, the others do not
    for v in (V, V - 20):
        cuts = [0, 100, v] if world == 2 else [0, 60, 100, 150, v]
        own = slice(cuts[rank], cuts[rank + 1])
        ids = target % v
        out = linear_logprob(hidden, weight[own], ids, vocab_parallel=group)
        whole = linear_logprob(hidden, weight[:v], ids)
        torch.testing.assert_close(out.logp, whole.logp, atol=4e-6, rtol=1e-6)
    # NaN in one rank's rows shows on every rank, in result and gradient
    own = slice(100 * rank, 100 * rank + 100)
    for bad in range(world):
        shard = weight[own].clone()
        if rank == bad:
            shard[3, 2] = float("nan")
        x = hidden.clone().requires_grad_()
        out = linear_logprob(x, shard, target % 200, entropy=True, vocab_parallel=group)
        assert out.logp.isnan().all()
        assert out.entropy.isnan().all()
        assert torch.autograd.grad(out.logp.sum(), x)[0].isnan().any()
    # junk in an ignored row does not
    ids = (target % 200).masked_fill(torch.arange(31) % 3 == 0, -100)
    dirty = hidden.masked_fill((ids == -100)[:, None], float("nan"))
    results = []
    for x in (hidden.clone(), dirty):
        x, w = x.requires_grad_(), weight[own].clone().requires_grad_()
        out = linear_logprob(x, w, ids, entropy=True, vocab_parallel=group)
        results.append((out.logp, out.entropy, *torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    # a shard that is all -inf, some targets in it
    bias = torch.zeros(200)
    bias[:100] = -torch.inf
    x, w = hidden.clone().requires_grad_(), weight[:200].clone().requires_grad_()
    whole = linear_logprob(x, w, target % 200, bias=bias, entropy=True)
    banned = whole.logp == -torch.inf
    assert banned.any()
    assert not banned.all()
    keep = (~banned).float()
    expected = torch.autograd.grad((whole.logp, whole.entropy), (x, w), (keep, keep))
    x, w = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
    out = linear_logprob(x, w, target % 200, bias=bias[own], entropy=True, vocab_parallel=group)
    assert torch.equal(out.logp == -torch.inf, banned)
    torch.testing.assert_close(out.logp, whole.logp, atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy, whole.entropy, atol=4e-6, rtol=1e-6)
    got = torch.autograd.grad((out.logp, out.entropy), (x, w), (keep, keep), retain_graph=True)
    assert_grad_close(got[0], expected[0], rel=1e-5)
    assert (got[1] == 0).all() if rank == 0 else torch.allclose(got[1], expected[1][own], atol=1e-5)
    # not differentiable twice, and no more than that
    first = torch.autograd.grad(out.logp[~banned].sum() * 1.0, x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="vocab_parallel: a second derivative"):
        first.sum().backward()
    # no tokens
    none = linear_logprob(hidden[:0], weight[own], target[:0], entropy=True, vocab_parallel=group)
    assert none.logp.shape == none.entropy.shape == (0,)


@pytest.mark.distributed
def test_a_split_head_hides_no_nan_hangs_on_no_second_head_and_takes_a_shard_without_mass():
    on_ranks(troubled, 2)
