"""The public functions with impl="triton", on CPU tensors by the interpreter."""

import pytest
import torch

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.testing import assert_grad_close, oracle, peaked_inputs


def test_the_public_functions_run_on_the_kernels_and_agree_with_float64():
    hidden, weight, target = peaked_inputs(30, 24, 500)
    target[4] = -100
    grad = torch.randn(30, generator=torch.Generator().manual_seed(1))
    logp, entropy, dx, dw = oracle(hidden, weight, target, grad)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob(x, w, target, entropy=True, impl="triton")
    assert (out.logp - logp).abs().max() < 2e-5
    assert (out.entropy - entropy).abs().max() < 2e-5
    got = torch.autograd.grad(out.logp, (x, w), grad)
    assert_grad_close(got[0], dx, rel=1e-5)
    assert_grad_close(got[1], dw, rel=1e-5)
    z = hidden @ weight.T
    from_logits = logprob(z.requires_grad_(), target, entropy=True, impl="triton")
    assert (from_logits.logp - logp).abs().max() < 3e-5
    (dz,) = torch.autograd.grad(from_logits.logp, z, grad)
    assert_grad_close(dz @ weight, dx, rel=1e-4)


def test_float64_and_bfloat16_products_are_refused_here():
    hidden, weight, target = peaked_inputs(4, 8, 130)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match="triton"):
            linear_logprob(hidden.to(dtype), weight.to(dtype), target, impl="triton")


@pytest.mark.parametrize("entropy", [False, True])
def test_the_operators_satisfy_opcheck(entropy):
    hidden, weight, target = peaked_inputs(5, 8, 130)
    arguments = (
        hidden.requires_grad_(), weight.requires_grad_(), target, None, torch.ones(1), 1.0, None, -100, entropy, 0.0,
        None, None, "triton",
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.flowrl.linear_logprob.default, arguments, test_utils=tests)
