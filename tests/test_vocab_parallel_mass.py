"""vocab_parallel=: a rank whose part of the vocabulary is banned whole."""

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from flowrl_kernels import linear_logprob
from flowrl_kernels.testing import assert_grad_close, peaked_inputs

V, CUT = 60, 25


def worker(rank, world):
    hidden, weight, target = peaked_inputs(9, 8, V)
    target[target < CUT] = 30
    bias = torch.zeros(V)
    bias[:CUT] = -torch.inf
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    whole = linear_logprob(x, w, target, bias=bias, entropy=True)
    expected = torch.autograd.grad(whole.logp.sum() + whole.entropy.sum(), x)[0]
    own = slice(0, CUT) if rank == 0 else slice(CUT, V)
    x, w = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
    out = linear_logprob(x, w, target, bias=bias[own], entropy=True, vocab_parallel=dist.group.WORLD)
    torch.testing.assert_close(out.logp, whole.logp, atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(out.entropy, whole.entropy, atol=4e-6, rtol=1e-6)
    assert_grad_close(torch.autograd.grad(out.logp.sum() + out.entropy.sum(), x)[0], expected, rel=1e-5)


@pytest.mark.distributed
def test_a_shard_without_mass_leaves_the_entropy_alone():
    on_ranks(worker, 2)
