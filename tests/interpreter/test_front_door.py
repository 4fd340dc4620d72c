"""The public functions with impl="triton", on CPU tensors by the interpreter."""

import pytest
import torch
import triton
import triton.language as tl

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.core import dispatch
from flowrl_kernels.testing import assert_grad_close, oracle, peaked_inputs


def test_the_public_functions_run_on_the_kernels_and_agree_with_float64(dtype, within):
    hidden, weight, target = peaked_inputs(30, 24, 500, dtype=dtype)
    target[4] = -100
    grad = torch.randn(30, generator=torch.Generator().manual_seed(1))
    logp, entropy, dx, dw = oracle(hidden, weight, target, grad)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_logprob(x, w, target, entropy=True, impl="triton")
    assert (out.logp - logp).abs().max() < 2e-5
    assert (out.entropy - entropy).abs().max() < 2e-5
    got = torch.autograd.grad(out.logp, (x, w), grad)
    assert_grad_close(got[0], dx, rel=2 * within)
    assert_grad_close(got[1], dw, rel=2 * within, row=50 * within)
    hidden, weight = hidden.float(), weight.float()
    z = hidden @ weight.T
    from_logits = logprob(z.requires_grad_(), target, entropy=True, impl="triton")
    assert (from_logits.logp - logp).abs().max() < 3e-5
    (dz,) = torch.autograd.grad(from_logits.logp, z, grad)
    assert_grad_close(dz @ weight, dx, rel=1e-4)


def test_float64_products_are_refused_and_bfloat16_ones_where_the_interpreter_is_as_triton_ships_it(monkeypatch):
    hidden, weight, target = peaked_inputs(4, 8, 130)
    monkeypatch.setattr(dispatch, "interpreter_multiplies_bfloat16", False)
    for dtype in (torch.float64, torch.bfloat16):
        with pytest.raises(RuntimeError, match="triton"):
            linear_logprob(hidden.to(dtype), weight.to(dtype), target, impl="triton")


@triton.jit
def round_trip_kernel(values, rounded, wide, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(values + i).to(tl.bfloat16)
    tl.store(rounded + i, x)
    tl.store(wide + i, x.to(tl.float32))


@triton.jit
def product_kernel(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    x = tl.load(a + m[:, None] * K + k[None])
    y = tl.load(b + n[None] * K + k[:, None])
    acc = tl.full((M, N), 1.0, tl.float32)
    tl.store(out + m[:, None] * N + n[None], tl.dot(x, y, acc, input_precision="ieee"))


def test_the_interpreter_as_mended_rounds_to_bfloat16_as_torch_does():
    if not dispatch.interpreter_multiplies_bfloat16:
        pytest.skip("this interpreter is not mended")
    make = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=make).to(torch.int32)  # subnormals and NaN among them
    bits[:2048] = (bits[:2048] & ~0xFFFF) | 0x8000  # ties
    values = bits.view(torch.float32)
    values[-4:] = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38])
    rounded, wide = torch.empty(4096, dtype=torch.bfloat16), torch.empty(4096)
    round_trip_kernel[(1,)](values, rounded, wide, N=4096)
    for got in (rounded.float(), wide):
        torch.testing.assert_close(got, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_the_interpreter_as_mended_multiplies_right_and_keeps_a_rows_bits_wherever_it_stands(dtype):
    m, k, n = 32, 64, 128
    make = torch.Generator().manual_seed(0)
    a, b = torch.randn(m, k, generator=make).to(dtype), torch.randn(n, k, generator=make).to(dtype)
    order = torch.randperm(m, generator=make)
    out, moved = torch.empty(m, n), torch.empty(m, n)
    product_kernel[(1,)](a, b, out, M=m, K=k, N=n)
    product_kernel[(1,)](a[order], b, moved, M=m, K=k, N=n)
    assert torch.equal(moved, out[order])
    assert_grad_close(out, 1.0 + a.double() @ b.double().T, rel=2e-7)


@pytest.mark.parametrize("entropy", [False, True])
def test_the_operators_satisfy_opcheck(entropy):
    hidden, weight, target = peaked_inputs(5, 8, 130)
    arguments = (
        hidden.requires_grad_(), weight.requires_grad_(), target, None, torch.ones(1), 1.0, None, -100, entropy, 0.0,
        None, None, "triton",
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.flowrl.linear_logprob.default, arguments, test_utils=tests)
