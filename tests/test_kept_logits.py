"""The exact backward on a CPU, where the forward left some of its logits for it."""

import weakref

import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flowrl_kernels as fk
from flowrl_kernels.chunked import linear_logprob as room
from flowrl_kernels.chunked import recompute, tiles
from flowrl_kernels.core.types import Head, Needs, Upstream
from flowrl_kernels.ops import linear_logprob as operators

N, H, V = 300, 24, 5300


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
    assert recompute.kept_shape(n, V, dtype.itemsize) == (n, 2048 if dtype == torch.bfloat16 else 4096)
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
            for itemsize in (2, 4, 8):
                rows, columns = recompute.kept_shape(n, vocab, itemsize)
                taken = rows * columns * max(itemsize, 4)
                assert taken <= min(48 << 20, 13 * n * vocab * itemsize // 16)
                assert columns == 0 or (rows == n and 4 * columns >= vocab)
    assert recompute.kept_shape(1024, 32768) == (1024, 12288)
    assert recompute.kept_shape(300, 32768) == (300, 26624)
    assert recompute.kept_shape(1024, 151936) == recompute.kept_shape(0, 32768) == (0, 0)


class Allocated(TorchDispatchMode):
    """Most bytes of tensors that lived at once, beside those given."""

    def __init__(self, *given):
        super().__init__()
        self.now, self.most, self.seen = 0, 0, {t.untyped_storage()._cdata: None for t in given}

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.meet(tensor.untyped_storage())
        return made

    def meet(self, storage):
        place, size = storage._cdata, storage.nbytes()
        if place not in self.seen:
            self.seen[place] = weakref.finalize(storage, self.gone, place, size)
            self.now += size
            self.most = max(self.most, self.now)

    def gone(self, place, size):
        del self.seen[place]
        self.now -= size


@pytest.mark.parametrize("n", [256, 1024])
def test_memory_beside_the_gradients_is_a_third_of_a_compiled_graphs_at_most_or_all_of_it_in_a_small_batch(
    n, monkeypatch
):
    # a compiled graph has logits and their gradient at once, as much as cpu-scaling measured (docs/benchmarks/fits.md)
    hidden_size, vocab = 256, 32768
    compiled = (2 * n - hidden_size) * vocab * 4
    monkeypatch.setattr(tiles, "row_block", lambda *sizes: 256)  # that of this hidden size; an eighth of it will do
    hidden, weight, target = torch.randn(n, 32), torch.randn(vocab, 32), torch.randint(vocab, (n,))
    head, grad = Head(weight, None, torch.ones(1)), Upstream(torch.randn(n))
    with Allocated(hidden, weight, target, *head[2:3], *grad[:1]) as allocated:
        kept = torch.empty(recompute.kept_shape(n, vocab))
        saved = room.linear_logprob_fwd(hidden, target, head, False, False, kept=kept)
        gradients = room.linear_logprob_bwd(grad, hidden, target, head, saved, Needs(True, True, False))
    most = allocated.most - sum(g.numel() * 4 for g in gradients if g is not None)
    assert kept.numel() * 4 < most <= compiled // (3 if n >= 1024 else 1)
    assert most - kept.numel() * 4 <= 1.5 * n * room.buffer_width(n, True) * 4, "a buffer at a time"


def test_at_every_number_of_tokens_what_is_kept_and_a_buffer_fit_in_that_memory():
    for n in range(128, 4097, 64):
        rows, columns = recompute.kept_shape(n, 32768)
        width = room.buffer_width(n, columns > 0)
        compiled = max(n, 2 * n - 256) * 32768
        assert rows * columns + n * width <= 0.95 * compiled / (3 if n >= 1024 else 1), n


@pytest.mark.parametrize("way", ["backward", "dropped", "checkpoint", "retained"])
def test_kept_logits_live_until_the_backward_has_read_them(way, monkeypatch):
    made = []

    def owned(hidden, weight, keep):
        if not keep:
            return torch.empty(0, 0)
        array = numpy.empty(recompute.kept_shape(len(hidden), len(weight)), dtype=numpy.float32)
        made.append(weakref.ref(array))
        return torch.from_numpy(array)

    monkeypatch.setattr(operators, "logits_to_keep", owned)
    (hidden, weight, _), target, upstream = batch()

    def forward(x):
        return fk.linear_logprob(x, weight, target, impl="chunked").logp

    if way == "checkpoint":
        logp = torch.utils.checkpoint.checkpoint(forward, hidden, use_reentrant=False)
        assert [ref() for ref in made] == [None]
    else:
        logp = forward(hidden)
        assert made[0]() is not None
    if way == "dropped":
        del logp
    else:
        logp.backward(upstream, retain_graph=way == "retained")
    if way == "retained":
        assert made[0]() is not None
        del logp
    assert len(made) == (2 if way == "checkpoint" else 1)
    assert all(ref() is None for ref in made)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_gives_the_same_bits(reentrant):
    (hidden, weight, bias), target, upstream = batch()

    def forward(x):
        return fk.linear_logprob(x, weight, target, bias=bias, impl="chunked").logp

    want = torch.autograd.grad(forward(hidden), (hidden, weight, bias), upstream)
    torch.utils.checkpoint.checkpoint(forward, hidden, use_reentrant=reentrant).backward(upstream)
    assert all(torch.equal(a, b.grad) for a, b in zip(want, (hidden, weight, bias)))


CASES = {
    "temperatures": {"temperature": torch.linspace(0.5, 2.0, N)},
    "scale": {"logit_scale": 0.3},
    "softcap": {"softcap": 8.0},
    "softcap and scale": {"softcap": 8.0, "logit_scale": 0.3},
    "several ids": {},
    "several ids and their entropy": {"entropy": True},
    "statistics": {"statistics": True, "entropy": True},
    "epsilon": {"epsilon": 1e-6},
    "a draw of all": {"sampled": fk.Sampled(0.9, (1,))},
    "a draw of all in an order": {"sampled": fk.Sampled(0.9, (1,), order=torch.arange(V).flip(0))},
}


@pytest.mark.parametrize("frozen", [(), ("weight",), ("hidden", "bias")])
@pytest.mark.parametrize("case", CASES)
def test_every_setting_has_the_gradients_of_the_reference(case, frozen):
    leaves, target, upstream = batch()
    target[::5], upstream[3::7] = -100, 0.0
    target[1] = -100 if "draw" in case else target[1]
    if case.startswith("several"):
        target = torch.stack([target, target.flip(0), target.roll(1)], 1)
        target[7] = 11  # the same three times
        upstream = torch.stack([upstream, 0.5 * upstream, -upstream], 1)
    names = dict(zip(("hidden", "weight", "bias"), leaves))
    live = [leaf.requires_grad_(name not in frozen) for name, leaf in names.items() if name not in frozen]

    def run(impl, **settings):
        out = fk.linear_logprob(*leaves[:2], target, bias=leaves[2], impl=impl, **settings)
        total = (out.logp * upstream).sum() + (out.entropy.sum() if settings.get("entropy") else 0.0)
        return torch.autograd.grad(total, live)

    settings = CASES[case]
    same = {k: v for k, v in settings.items() if k not in ("epsilon", "sampled")}
    for a, b in zip(run("chunked", **settings), run("reference", **same)):
        assert (a - b).norm() <= 5e-6 * b.norm()


def test_a_row_that_is_not_finite_stays_in_its_row():
    leaves, target, upstream = batch()
    with torch.no_grad():
        leaves[0][5, 0] = torch.nan
    (dx, dw, _), _ = gradients(leaves, target, upstream)
    assert dx[5].isnan().any()
    assert dx[torch.arange(N) != 5].isfinite().all()
    assert dw.isnan().any()
    upstream[5] = 0.0
    out = fk.linear_logprob(leaves[0], leaves[1], target, bias=leaves[2], temperature=0.7, impl="chunked")
    made = torch.autograd.grad(out.logp, leaves, upstream)
    assert all(g.isfinite().all() for g in made)


@pytest.mark.nightly
def test_a_compiled_step_of_any_length_takes_them_too():
    def loss(x, w, y):
        return fk.linear_logprob(x, w, y, impl="chunked").logp.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for n in (40, 300):
        (hidden, weight, _), target, _ = batch(n=n)
        torch._dynamo.mark_dynamic(hidden, 0)
        torch._dynamo.mark_dynamic(target, 0)
        made = [torch.autograd.grad(run(hidden, weight, target), (hidden, weight)) for run in (loss, compiled)]
        assert all(torch.equal(a, b) for a, b in zip(*made))


def test_nothing_is_kept_where_no_exact_backward_will_read_it(monkeypatch):
    leaves, target, _ = batch()
    shapes = []
    whole = operators.logits_to_keep
    monkeypatch.setattr(operators, "logits_to_keep", lambda *a: shapes.append(whole(*a).shape) or whole(*a))
    for settings in ({}, {"softcap": 5.0}, {"epsilon": 0.1}, {"sampled": fk.Sampled(0.1, (0,))}):
        with torch.set_grad_enabled(bool(settings)):
            fk.linear_logprob(*leaves[:2], target, impl="chunked", **settings)
    fk.linear_logprob(*(t.detach() for t in leaves[:2]), target, impl="chunked")
    assert shapes == [(0, 0)] * 5
