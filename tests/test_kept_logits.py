"""The exact backward on a CPU, where the forward left some of its logits for it."""

import pytest
import torch

import flowrl_kernels as fk
from flowrl_kernels.chunked import recompute
from flowrl_kernels.ops.linear_logprob import linear_logprob as operator

N, H, V = 300, 24, 5003


def batch(dtype=torch.float32, n=N):
    g = torch.Generator().manual_seed(n)
    hidden, weight = torch.randn(n, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    bias, target = torch.randn(V, generator=g).to(dtype), torch.randint(V, (n,), generator=g)
    return [t.requires_grad_() for t in (hidden, weight, bias)], target, torch.randn(n, generator=g)


def gradients(leaves, target, upstream, entropy=False, impl="chunked", **options):
    hidden, weight, bias = leaves
    out = fk.linear_logprob(hidden, weight, target, bias=bias, temperature=0.7, entropy=entropy, impl=impl, **options)
    total = (out.logp * upstream.to(out.logp.dtype)).sum() + (out.entropy.sum() if entropy else 0.0)
    return torch.autograd.grad(total, leaves, retain_graph=True), total


@pytest.fixture
def never_kept(monkeypatch):
    def check(*arguments, **options):
        with monkeypatch.context() as patch:
            patch.setattr(recompute, "KEPT", 0)
            return gradients(*arguments, **options)[0]

    return check


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("n", [1, 37, N])
def test_gradients_are_those_of_float64_where_logits_were_kept(dtype, entropy, n):
    leaves, target, upstream = batch(dtype, n)
    assert recompute.kept_shape(n, V) == (-(-n // 256) * 256, 4096)
    got, _ = gradients(leaves, target, upstream, entropy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    want, _ = gradients(wide, target, upstream, entropy, impl="reference")
    for a, b in zip(got, want):
        limit = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 2.5e-3}[dtype]
        assert (a.double() - b).norm() <= limit * b.norm()


@pytest.mark.parametrize("entropy", [False, True])
def test_rows_that_are_ignored_or_weigh_nothing_do_not_shift_what_was_kept(never_kept, entropy):
    leaves, target, upstream = batch()
    target[::5], upstream[3::7] = -100, 0.0
    got, _ = gradients(leaves, target, upstream, entropy)
    for a, b in zip(got, never_kept(leaves, target, upstream, entropy)):
        assert (a - b).norm() <= 3e-6 * b.norm()


def test_a_retained_graph_gives_the_same_bits_again():
    leaves, target, upstream = batch()
    first, total = gradients(leaves, target, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, leaves)))


def test_values_have_the_bits_that_they_have_where_nothing_is_kept():
    leaves, target, _ = batch()
    own = fk.linear_logprob(*leaves[:2], target, bias=leaves[2], entropy=True, impl="chunked")
    with torch.no_grad():
        alone = fk.linear_logprob(*leaves[:2], target, bias=leaves[2], entropy=True, impl="chunked")
    assert torch.equal(own.logp, alone.logp)
    assert torch.equal(own.entropy, alone.entropy)


def test_the_weights_accumulator_takes_the_same_gradient():
    leaves, target, upstream = batch()
    want, _ = gradients(leaves, target, upstream)
    main_grad = torch.ones(V, H)
    hidden, weight, bias = leaves
    out = fk.linear_logprob(hidden, weight, target, bias=bias, temperature=0.7, main_grad=main_grad, impl="chunked")
    (out.logp * upstream).sum().backward()
    torch.testing.assert_close(main_grad - 1.0, want[1], rtol=0, atol=2e-6)


def test_what_is_kept_is_bounded_and_nothing_where_it_would_not_pay():
    for n in (1, 256, 257, 1024, 4096, 1 << 20):
        for vocab in (1, 1000, 8192, 32768, 151936):
            rows, columns = recompute.kept_shape(n, vocab)
            assert rows * columns <= recompute.KEPT
            assert columns <= recompute.MOST * vocab
            assert columns == 0 or (rows >= n and columns >= recompute.LEAST * vocab)
    assert recompute.kept_shape(1024, 32768) == (1024, 12288)
    assert recompute.kept_shape(1024, 151936) == recompute.kept_shape(0, 32768) == (0, 0)


def test_nothing_is_kept_without_a_gradient():
    leaves, target, _ = batch()
    head = (None, torch.ones(1), 1.0, None, -100, False, 0.0, None, None, "chunked")
    assert operator(*leaves[:2], target, *head)[4].shape == (0, 0)
