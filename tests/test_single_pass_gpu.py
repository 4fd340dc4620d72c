"""The single pass in Triton on a GPU: the bits of two passes, their gradients within a rounding, no host sync."""

import pytest
import torch
from gpu_waits import host_waits

from flowrl_kernels import LinearFlowRLLoss, linear_logprob
from flowrl_kernels.core import passes
from flowrl_kernels.testing import assert_grad_close, peaked_inputs, ragged_mask

pytestmark = pytest.mark.gpu
WITHIN = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}


def batch(dtype, b=8, t=96, h=256, v=20000):
    hidden, weight, target = (x.cuda() for x in peaked_inputs(b * t, h, v, dtype=dtype, peak=12.0))
    mask = ragged_mask(b, t).cuda()
    ref = linear_logprob(hidden, weight, target, impl="triton").logp - 0.05
    make = torch.Generator("cuda").manual_seed(0)
    reward, log_z = (torch.randn(b, generator=make, device="cuda") for _ in range(2))
    return hidden.view(b, t, h), weight, target.view(b, t), ref.view(b, t), reward, log_z, mask


def run(single_pass, data):
    hidden, weight, target, ref, reward, log_z, mask = data
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = LinearFlowRLLoss(single_pass=single_pass, impl="triton")
    out = loss(x, w, target, ref, reward, log_z, mask=mask)
    return out, torch.autograd.grad(out.loss * 64.0, (x, w))


@pytest.mark.parametrize("dtype", list(WITHIN))
@pytest.mark.parametrize("tokens", [200, 10000])
def test_one_pass_gives_the_bits_and_the_gradients_of_two(dtype, tokens, monkeypatch):
    monkeypatch.setattr(passes, "chunk_tokens", lambda *_: tokens)
    data = batch(dtype)
    one, one_grads = run(True, data)
    two, two_grads = run(False, data)
    assert torch.equal(one.residual, two.residual)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.loss, two.loss)
    for got, expected in zip(one_grads, two_grads):
        assert_grad_close(got, expected, rel=WITHIN[dtype], row=0.2)
    again = run(True, data)[1]
    assert all(torch.equal(a, b) for a, b in zip(one_grads, again))


def test_a_padded_batch_makes_the_host_wait_nowhere():
    data = batch(torch.bfloat16)
    run(True, data)  # compiles
    with host_waits() as waits:
        run(True, data)
    assert waits == []


@pytest.mark.sanitize
@pytest.mark.parametrize("h", [64, 63])
def test_odd_sizes_stay_within_their_memory(h):
    _, gradients = run(True, batch(torch.bfloat16, b=4, t=33, h=h, v=1301))
    assert all(gradient.isfinite().all() for gradient in gradients)
