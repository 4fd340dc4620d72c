"""Several ids a row: log-probs over the whole vocabulary and gradients of all, against a plain float64 log-softmax."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.testing import assert_grad_close, peaked_inputs

IMPLS = ["reference", "chunked", pytest.param("triton", marks=pytest.mark.gpu)]
KERNELS = IMPLS[1:]


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def several(n, h, v, k, dtype=torch.float32, peak=30.0, impl="chunked"):
    """hidden, weight, ids [N, K]: the likeliest ids in a shuffled order, some twice, lists of unequal length."""
    hidden, weight, _ = peaked_inputs(n, h, v, dtype=dtype, peak=peak)
    likely = (hidden.double() @ weight.double().T).topk(min(k, v)).indices
    ids = torch.cat([likely, torch.randint(v, (n, k - likely.shape[1]), generator=torch.Generator().manual_seed(5))], 1)
    ids = ids.gather(1, normal(n, k, seed=2).argsort(1))
    if k > 1:
        ids[::3, -1] = ids[::3, 0]
        ids[torch.arange(k) >= torch.arange(1, n + 1)[:, None]] = -100  # row i has i + 1 ids at most
    ids[n // 2] = -100
    return [t.to("cuda" if impl == "triton" else "cpu") for t in (hidden, weight, ids)]


def exact_of(make, leaves, ids, g, ge, temperature=1.0, softcap=None):
    """log-probs, entropy and gradients of the leaves by float64 autograd of log_softmax; `make` gives the logits."""
    leaves = [t.detach().double().requires_grad_() for t in leaves if t is not None]
    z = make(*leaves)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / (temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    every = torch.log_softmax(z, 1)
    logp = torch.where(ids == -100, 0.0, every.gather(1, ids.clamp_min(0)))
    entropy = torch.where((ids == -100).all(1), 0.0, -(every.exp() * every).sum(1))
    return logp, entropy, torch.autograd.grad((logp, entropy), leaves, (g.double(), ge.double()))


def exact(hidden, weight, ids, g, ge, bias=None, scale=1.0, **settings):
    def make(x, w, b=0.0):
        return scale * (x @ w.T + b)

    return exact_of(make, (hidden, weight, bias), ids, g, ge, **settings)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [2, 7, 64])
def test_log_probs_entropy_and_gradients_are_those_of_a_float64_log_softmax(impl, k):
    n, h, v = 41, 24, 1037
    hidden, weight, ids = several(n, h, v, k, impl=impl)
    bias, temperature = normal(v).to(ids.device), (normal(n, seed=2).abs() + 0.5).to(ids.device)
    g, ge = normal(n, k, seed=3).to(ids.device), normal(n, seed=4).to(ids.device)
    g[5] = torch.tensor([1.0, -1.0] + [0.0] * (k - 2))  # a row whose gradients sum to 0 still has some
    for softcap, want_entropy in ((None, False), (None, True), (15.0, True)):
        settings = {"bias": bias, "temperature": temperature, "softcap": softcap}
        logp, entropy, wanted = exact(hidden, weight, ids, g, ge * want_entropy, scale=0.7, **settings)
        x, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
        settings["bias"] = b
        out = linear_logprob(x, w, ids, logit_scale=0.7, entropy=want_entropy, impl=impl, **settings)
        assert (out.logp - logp).abs().max() < 2e-5
        assert out.logp.shape == (n, k)
        outs, grads = ((out.logp, out.entropy), (g, ge)) if want_entropy else ((out.logp,), (g,))
        if want_entropy:
            assert (out.entropy - entropy).abs().max() < 2e-5
        for got, want in zip(torch.autograd.grad(outs, (x, w, b), grads), wanted):
            assert_grad_close(got, want, rel=2e-5)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_id_has_the_bits_it_has_alone(impl, dtype):
    hidden, weight, ids = several(37, 40, 2300, 5, dtype, impl=impl)
    out = linear_logprob(hidden, weight, ids, entropy=True, impl=impl)
    for k in range(5):
        alone = linear_logprob(hidden, weight, ids[:, k], entropy=True, impl=impl)
        assert torch.equal(out.logp[:, k], alone.logp)
        some = ids[:, k] >= 0
        assert torch.equal(out.entropy[some], alone.entropy[some])
    logits = (hidden.float() @ weight.float().T).to(dtype)
    out = logprob(logits, ids, impl=impl).logp
    assert torch.equal(out, torch.stack([logprob(logits, ids[:, k], impl=impl).logp for k in range(5)], 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_one_id_a_row_in_a_list_is_one_id_a_row(impl):
    hidden, weight, ids = several(20, 16, 300, 1, impl=impl)
    g = normal(20).to(ids.device)
    results = []
    for target, grad in ((ids[:, 0], g), (ids, g[:, None])):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob(x, w, target, epsilon=0.0 if impl == "reference" else 0.01, impl=impl)
        assert out.logp.shape == target.shape
        results.append((out.logp.view(-1), *torch.autograd.grad(out.logp, (x, w), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_take_several_ids_too(impl, dtype):
    hidden, weight, ids = several(33, 16, 9001, 7, impl=impl)
    logits = (hidden @ weight.T).to(dtype)
    g, ge = normal(33, 7).to(ids.device), normal(33, seed=4).to(ids.device)
    for softcap in (None, 20.0):
        logp, entropy, (wanted,) = exact_of(lambda z: z, (logits,), ids, g, ge, temperature=0.7, softcap=softcap)
        for inplace in (False, True):
            z = logits.clone().requires_grad_()
            out = logprob(z, ids, temperature=0.7, softcap=softcap, entropy=True, inplace_backward=inplace, impl=impl)
            assert (out.logp - logp).abs().max() < 2e-5
            assert (out.entropy - entropy).abs().max() < 2e-5
            (got,) = torch.autograd.grad((out.logp, out.entropy), z, (g, ge))
            assert_grad_close(got, wanted, rel=2e-5 if dtype == torch.float32 else 2.5e-3)


@pytest.mark.parametrize("impl", KERNELS)
def test_the_weight_gradient_goes_into_main_grad(impl):
    hidden, weight, ids = several(33, 16, 700, 3, impl=impl)
    g = normal(33, 3).to(ids.device)
    _, _, (_, dw) = exact(hidden, weight, ids, g, torch.zeros(33, device=ids.device))
    main = torch.ones_like(weight)
    w, report = weight.clone().requires_grad_(), torch.full((3,), -1.0, device=ids.device)
    linear_logprob(hidden, w, ids, main_grad=main, report=report, impl=impl).logp.backward(g)
    assert w.grad is None
    assert_grad_close(main - 1.0, dw, rel=2e-5)
    assert report.tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("impl", KERNELS)
def test_ignored_ids_and_rows_may_stand_on_anything_and_wrong_ids_are_nan(impl):
    hidden, weight, ids = several(20, 16, 300, 4, impl=impl)
    dirty = hidden.clone()
    dirty[10] = float("nan")  # all of its ids are ignored
    g = torch.full((20, 4), 3.0, device=ids.device)
    results = []
    for states in (hidden, dirty):
        x, w = states.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob(x, w, ids, entropy=True, impl=impl)
        results.append((out.logp, out.entropy, *torch.autograd.grad((out.logp * g).sum(), (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert (results[0][0][ids == -100] == 0).all()
    from flowrl_kernels.ops.linear_logprob import linear_logprob as op

    wrong = ids.clone()
    wrong[19, 2] = 300
    one = torch.ones(1, device=ids.device)
    logp = op(hidden, weight, wrong, None, one, 1.0, None, -100, False, 0.0, None, None, impl)[0]
    assert logp[19, 2].isnan()
    assert logp.isnan().sum() == 1


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("k", [0, 3])
def test_statistics_are_the_argmax_whether_an_id_is_it_and_the_mean_logit(impl, k):
    hidden, weight, ids = several(41, 24, 2300, max(k, 1), impl=impl)
    hidden[7] = 0.0  # every logit equal: the lowest id is the argmax
    ids[7, 0] = 0
    hidden[8], weight[2299] = weight[1100] * 3, weight[1100]  # two equal ones, tiles apart
    ids = ids if k else ids[:, 0]
    g = normal(*ids.shape).to(ids.device)
    for softcap in (None, 5.0):
        z = hidden.double() @ weight.double().T
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7
        live = (ids >= 0).view(len(ids), -1).any(1)
        best = z.argmax(1)
        assert best[7] == 0
        x = hidden.clone().requires_grad_()
        settings = {"softcap": softcap, "temperature": 0.7, "impl": impl}
        out = linear_logprob(x, weight, ids, statistics=True, **settings)
        plain = linear_logprob(x, weight, ids, **settings)
        assert torch.equal(out.logp, plain.logp)
        assert torch.equal(*(torch.autograd.grad(o.logp, x, g)[0] for o in (out, plain)))
        assert torch.equal(out.argmax, torch.where(live, best, -1))
        assert torch.equal(out.is_top1, ids == (best[:, None] if k else best))
        assert out.is_top1.any()
        mean = torch.where(live, z.mean(1), 0.0)
        assert (out.mean_logits - mean).abs().max() < 1e-5
        assert not out.mean_logits.requires_grad
    logits = (hidden[:1] @ weight.T)[0]
    assert torch.equal(linear_logprob(hidden[0], weight, ids[0], statistics=True, impl=impl).argmax, logits.argmax())


def test_shapes_and_what_several_ids_do_not_go_with_are_refused_by_name():
    hidden, weight, ids = several(6, 16, 300, 3)
    out = linear_logprob(hidden.view(2, 3, 16), weight, ids.view(2, 3, 3), entropy=True)
    assert out.logp.shape == (2, 3, 3)
    assert out.entropy.shape == (2, 3)
    assert linear_logprob(hidden[0], weight, ids[0]).logp.shape == (3,)
    for wrong in (ids[:, :0], ids[None], ids.T):
        with pytest.raises(ValueError, match=r"target: wanted shape \(6,\), or \(6, 'K'\)"):
            linear_logprob(hidden, weight, wrong)
    with pytest.raises(ValueError, match=r"target: .*300"):
        linear_logprob(hidden, weight, ids.masked_fill(ids < 0, 300))
    kept = (torch.zeros(6, dtype=torch.int64), torch.arange(7))
    with pytest.raises(ValueError, match="statistics: wanted False beside kept"):
        linear_logprob(hidden, weight, ids[:, 0], statistics=True, kept=kept)
    for name, value in (("epsilon", 0.1), ("kept", kept)):
        with pytest.raises(ValueError, match=f"target: wanted one id a row beside {name}; got 3 ids"):
            linear_logprob(hidden, weight, ids, **{name: value})


def test_the_gradient_of_float64_passes_gradcheck():
    hidden, weight, ids = several(5, 4, 9, 3)
    given = [t.double().requires_grad_() for t in (hidden * 0.2, weight)]

    def call(x, w):
        out = linear_logprob(x, w, ids, entropy=True, impl="chunked")
        return out.logp, out.entropy

    assert torch.autograd.gradcheck(call, given)


def worker(rank, world):
    hidden, weight, ids = several(31, 16, 203, 5)
    g, ge = normal(31, 5, seed=3), normal(31, seed=4)
    logp, entropy, (dx, dw) = exact(hidden, weight, ids, g, ge, temperature=0.8, softcap=25.0)
    own = slice(0, 120) if rank == 0 else slice(120, 203)
    x, w = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
    out = linear_logprob(x, w, ids, temperature=0.8, softcap=25.0, entropy=True, vocab_parallel=dist.group.WORLD)
    assert (out.logp - logp).abs().max() < 2e-5
    assert (out.entropy - entropy).abs().max() < 2e-5
    got = torch.autograd.grad((out.logp, out.entropy), (x, w), (g, ge))
    assert_grad_close(got[0], dx, rel=2e-5)
    assert_grad_close(got[1], dw[own], rel=2e-5)


@pytest.mark.distributed
def test_a_head_split_over_ranks_gives_each_id_s_log_prob():
    on_ranks(worker, 2)


def test_the_distillation_example_is_the_kl_over_the_listed_ids_and_the_rest_and_learns():
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "topk_distillation.py"))
    student, teacher = (torch.log_softmax(2 * normal(6, 50, seed=s).double(), 1) for s in (1, 2))
    ids = teacher.topk(5).indices
    ids[2, 3:] = -100
    outcomes = []
    for every in (student, teacher):
        p = every.exp().gather(1, ids.clamp_min(0)) * (ids >= 0)
        outcomes.append(torch.cat([p, 1.0 - p.sum(1, keepdim=True)], 1))
    p, q = outcomes
    wanted = torch.xlogy(q, q).sum(1) - torch.xlogy(q, p).sum(1)
    got = example["topk_distillation_loss"](*(t.gather(1, ids.clamp_min(0)) for t in (student, teacher)), ids)
    assert (got - wanted).abs().max() < 1e-12
    assert (wanted > 0.05).all()
    first, *_, last = example["main"](steps=60)
    assert last < 0.5 * first
