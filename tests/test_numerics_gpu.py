"""What the numerics contract promises for tensor cores, and for the kernels on a GPU in bf16 (docs/numerics.md)."""

import pytest
import torch
from gpu_waits import host_waits

from flowrl_kernels import LinearFlowRLLoss, linear_logprob, logprob
from flowrl_kernels.core.dispatch import resolve
from flowrl_kernels.testing import assert_grad_close, oracle, peaked_inputs, poisoned_memory, ragged_mask

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]
PRECISION = (256, 3584, 8192)  # a real hidden size: it decides how much truncated sums lose
SEVERAL_SLABS = (1024, 512, 40000)
ROWS = (700, 1024, 5000)
LONG = (16400, 131072)  # more than 2^31 logits


def inputs(n, h, v, dtype=torch.bfloat16, **settings):
    return [t.cuda() for t in peaked_inputs(n, h, v, dtype=dtype, **settings)]


def gradients(hidden, weight, target, grad, **settings):
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob(x, w, target, impl="triton", **settings)
    return out.logp, *torch.autograd.grad(out.logp, (x, w), grad)


@pytest.mark.parametrize("peak", [16.0, 24.0, 40.0])
def test_logp_is_as_exact_as_fp32_logits_from_the_same_tensor_cores(peak):
    hidden, weight, target = inputs(*PRECISION, peak=peak)
    expected, _, _, _ = oracle(hidden, weight, target)

    def error(logits):
        picked = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
        return (picked.double() - expected).abs()

    ours = (linear_logprob(hidden, weight, target, impl="triton").logp - expected).abs()
    fp32 = error(torch.mm(hidden, weight.t(), out_dtype=torch.float32))
    assert ours.max() <= 1.5 * fp32.max() + 1e-5
    largest = (hidden.double() @ weight.double().t()).abs().amax(1)
    rows = (largest > 16) & (largest < 40)
    if rows.sum() > 50:
        eager = error(hidden @ weight.t())[rows]
        assert 100 * ours[rows].max() < eager.max()
        assert 100 * ours[rows].mean() < eager.mean()


@pytest.mark.parametrize("dtype", HALVES)
def test_gradients_over_several_slabs_are_one_rounding_from_exact_and_the_same_twice(dtype):
    hidden, weight, target = inputs(*SEVERAL_SLABS, dtype, peak=20.0)
    grad = torch.randn(len(target), generator=torch.Generator().manual_seed(1)).cuda()
    _, _, dx, dw = oracle(hidden, weight, target, grad)
    first, again = (gradients(hidden, weight, target, grad) for _ in range(2))
    assert_grad_close(first[1], dx, rel=2.5e-3)
    assert_grad_close(first[2], dw, rel=2.5e-3, row=0.2)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("odd", [0, 1])  # rows that start at multiples of 16 bytes, and others
def test_a_row_keeps_its_bits_whatever_the_batch_and_the_flags(dtype, odd):
    n, h, v = ROWS
    hidden, weight, target = inputs(n, h - odd, v, dtype)
    whole = linear_logprob(hidden, weight, target, entropy=True, impl="triton")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3)).cuda()
    moved = linear_logprob(hidden[order], weight, target[order], entropy=True, impl="triton")
    assert torch.equal(moved.logp, whole.logp[order])
    assert torch.equal(moved.entropy, whole.entropy[order])
    for size in (*range(1, 41), 129, 300):
        assert torch.equal(linear_logprob(hidden[:size], weight, target[:size], impl="triton").logp, whole.logp[:size])
    ignored = torch.where(torch.arange(n, device="cuda") % 3 == 0, -100, target)
    some = linear_logprob(hidden, weight, ignored, impl="triton").logp
    assert torch.equal(some[ignored >= 0], whole.logp[ignored >= 0])
    for settings in ({}, {"epsilon": 0.01}):
        assert torch.equal(
            linear_logprob(hidden.clone().requires_grad_(), weight, target, impl="triton", **settings).logp, whole.logp
        )


def test_the_weight_is_exactly_one_on_the_first_minibatch():
    b, t = 7, 61
    hidden, weight, target = inputs(b * t, 256, 3000)
    mask = ragged_mask(b, t).cuda()
    with torch.no_grad():  # and packed
        old = linear_logprob(hidden[mask.flatten()], weight, target[mask.flatten()], impl="triton").logp
    padded = torch.zeros(b, t, device="cuda").masked_scatter_(mask, old)
    reward, log_z = torch.randn(2, b, device="cuda")
    given = (hidden.view(b, t, -1).requires_grad_(), weight, target.view(b, t), padded - 0.1, reward, log_z)
    for single_pass in (False, True):
        out = LinearFlowRLLoss(single_pass=single_pass, impl="triton")(*given, logp_old=padded, mask=mask)
        assert (out.weight[mask.any(1)] == 1.0).all()


def test_forward_and_exact_backward_never_make_the_host_wait():
    hidden, weight, target = inputs(300, 256, 3000)
    target[::5] = -100
    grad = torch.randn(300, device="cuda")
    gradients(hidden, weight, target, grad, entropy=True)  # compiles
    with host_waits() as waits:
        gradients(hidden, weight, target, grad, entropy=True)
    assert waits == []
    logits = (hidden @ weight.t()).requires_grad_()
    torch.autograd.grad(logprob(logits, target).logp, logits, grad)
    with host_waits() as waits:
        torch.autograd.grad(logprob(logits, target).logp, logits, grad)
    assert waits == []


def test_no_result_reads_memory_that_was_never_written():
    hidden, weight, target = inputs(333, 200, 5001)
    target[::5] = -100
    grad = torch.randn(333, device="cuda")
    clean = gradients(hidden, weight, target, grad, entropy=True)
    with poisoned_memory():
        poisoned = gradients(hidden, weight, target, grad, entropy=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned))


def test_rows_past_two_billion_logits_are_those_of_a_small_call():
    n, v = LONG
    make = torch.Generator("cuda").manual_seed(0)
    logits = torch.empty(n, v, dtype=torch.bfloat16, device="cuda").normal_(generator=make).requires_grad_()
    target = torch.randint(v, (n,), generator=make, device="cuda")
    out = logprob(logits, target, impl="triton").logp
    (whole,) = torch.autograd.grad(out.sum(), logits)
    last = logits[-3:].detach().clone().requires_grad_()
    few = logprob(last, target[-3:], impl="triton").logp
    assert torch.equal(few, out[-3:])
    assert torch.equal(torch.autograd.grad(few.sum(), last)[0], whole[-3:])


def test_auto_takes_triton_here_and_the_operators_keep_their_contract_with_torch():
    hidden, weight, target = inputs(20, 64, 300)
    assert resolve("linear_logprob", "auto", hidden) == "triton"
    one = torch.ones(1, device="cuda")
    given = (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        target,
        None,
        one,
        1.0,
        None,
        -100,
        True,
        0.0,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.flowrl.linear_logprob.default, (*given, "triton"))

    def loss(x, w):
        return linear_logprob(x, w, target).logp.sum()

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    traced = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(plain, torch.autograd.grad(traced(hidden, weight), (hidden, weight))):
        assert torch.equal(a, b)
