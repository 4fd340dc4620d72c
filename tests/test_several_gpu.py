"""Several ids a row, and a row's statistics, on a GPU: 16-bit inputs, several slabs, nothing waited for."""

import pytest
import torch
from gpu_waits import host_waits
from test_several import exact, normal, several

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.testing import assert_grad_close, poisoned_memory

pytestmark = pytest.mark.gpu


def gradients(hidden, weight, ids, g, **settings):
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob(x, w, ids, impl="triton", **settings)
    return out, *torch.autograd.grad(out.logp, (x, w), g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixty_four_ids_over_several_slabs_are_one_rounding_from_exact_and_the_same_twice(dtype):
    hidden, weight, ids = several(1024, 512, 40000, 64, dtype, 20.0, "triton")
    g = normal(1024, 64).cuda()
    logp, _, (dx, dw) = exact(hidden, weight, ids, g, torch.zeros(1024, device="cuda"))
    with poisoned_memory():
        first, again = (gradients(hidden, weight, ids, g) for _ in range(2))
    assert (first[0].logp - logp).abs().max() < 3e-4
    assert_grad_close(first[1], dx, rel=2.5e-3)
    assert_grad_close(first[2], dw, rel=2.5e-3, row=0.2)
    assert torch.equal(first[0].logp, again[0].logp)
    assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:]))


def test_statistics_are_those_of_fp32_logits_and_leave_the_bits_alone():
    hidden, weight, ids = several(700, 1024, 5000, 3, torch.bfloat16, impl="triton")
    z = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    best, live = z.argmax(1), (ids >= 0).any(1)
    out = linear_logprob(hidden, weight, ids, statistics=True, entropy=True, impl="triton")
    assert torch.equal(out.logp, linear_logprob(hidden, weight, ids, impl="triton").logp)
    top = z.topk(2, 1).values
    clear = live & (top[:, 0] - top[:, 1] > 1e-3)
    assert clear.sum() > 300
    assert torch.equal(out.argmax[clear], best[clear])
    assert torch.equal(out.is_top1[clear], (ids == best[:, None])[clear])
    assert (out.mean_logits - torch.where(live, z.double().mean(1), 0.0)).abs().max() < 1e-4


def test_several_ids_and_statistics_never_make_the_host_wait():
    hidden, weight, ids = several(300, 256, 3000, 5, torch.bfloat16, impl="triton")
    bias, g = torch.zeros(3000, dtype=torch.bfloat16, device="cuda", requires_grad=True), normal(300, 5).cuda()
    logits = (hidden @ weight.t()).requires_grad_()

    def both():
        out = linear_logprob(hidden, weight, ids, bias=bias, statistics=True, softcap=20.0, impl="triton")
        torch.autograd.grad(out.logp, bias, g)
        torch.autograd.grad(logprob(logits, ids, softcap=20.0, impl="triton").logp, logits, g)

    both()
    with host_waits() as waits:
        both()
    assert waits == []


@pytest.mark.sanitize
@pytest.mark.parametrize(("h", "k"), [(64, 2), (63, 37)])
def test_odd_sizes_and_ragged_lists_stay_within_their_memory(h, k):
    hidden, weight, ids = several(150, h, 3001, k, torch.bfloat16, impl="triton")
    bias, g = torch.zeros(3001, device="cuda", dtype=torch.bfloat16, requires_grad=True), normal(150, k).cuda()
    out, dx, dw = gradients(hidden, weight, ids, g, bias=bias, statistics=True)
    for made in (out.logp, out.mean_logits, dx, dw):
        assert made.isfinite().all()
    assert int(out.argmax.max()) < 3001
