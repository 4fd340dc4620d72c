"""Rows that do not count may hold anything: it reaches no result and no gradient, and costs nothing."""

import pytest
import torch

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.testing import peaked_inputs

JUNK = [float("nan"), float("inf"), -float("inf"), 1e38]
DOORS = ["reference", "chunked", "chunked as on a GPU", "bounded", "bounded as on a GPU", "kept"]


@pytest.fixture
def door(request, monkeypatch):
    """Settings of one way in. "As on a GPU": every row is computed, for the host cannot know how many count."""
    from flowrl_kernels.chunked import tiles

    name = request.param
    if name.endswith("GPU"):
        monkeypatch.setattr(tiles, "host_knows", lambda tensor: False)
    settings = {"impl": "reference" if name == "reference" else "chunked"}
    if name.startswith("bounded"):
        settings["epsilon"] = 0.01
    return settings, name == "kept"


def case():
    hidden, weight, target = peaked_inputs(50, 16, 2100, peak=12.0)
    make = torch.Generator().manual_seed(4)
    ignored = torch.rand(50, generator=make) < 0.4
    bias = torch.randn(2100, generator=make)
    temperature = 0.5 + torch.rand(50, generator=make)
    return (
        hidden,
        weight,
        target.masked_fill(ignored, -100),
        bias,
        temperature,
        torch.randn(50, generator=make),
        ignored,
    )


def results(hidden, weight, target, bias, temperature, grad, settings, keep, entropy):
    x, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
    kept = None
    if keep:
        kept = (torch.arange(0, 50 * 7) * 13 % 2100, torch.arange(0, 351, 7))
    out = linear_logprob(x, w, target, bias=b, temperature=temperature, entropy=entropy, kept=kept, **settings)
    outputs = (out.logp, out.entropy) if entropy else (out.logp,)
    return *outputs, *torch.autograd.grad(outputs, (x, w, b), (grad, grad) if entropy else (grad,))


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_junk_in_ignored_rows_reaches_nothing(door, entropy):
    settings, keep = door
    hidden, weight, target, bias, temperature, grad, ignored = case()
    clean = results(hidden, weight, target, bias, temperature, grad, settings, keep, entropy)
    for junk in JUNK:
        dirty, degrees, upstream = hidden.clone(), temperature.clone(), grad.clone()
        dirty[ignored], degrees[ignored], upstream[ignored] = junk, junk, junk
        got = results(dirty, weight, target, bias, degrees, upstream, settings, keep, entropy)
        for a, b in zip(got, clean):
            assert torch.equal(a, b), junk
            assert a.isfinite().all()
    assert float(clean[-2].abs().sum()) > 0


@pytest.mark.parametrize("door", [d for d in DOORS if d != "reference"], indirect=True)
def test_a_row_without_an_upstream_gradient_puts_its_junk_into_no_gradient(door):
    settings, keep = door
    hidden, weight, target, bias, temperature, grad, ignored = case()
    still = (~ignored).nonzero()[3]
    grad[still] = 0.0
    clean = results(hidden, weight, target, bias, temperature, grad, settings, keep, False)
    hidden[still] = float("nan")
    got = results(hidden, weight, target, bias, temperature, grad, settings, keep, False)
    assert got[0][still].isnan().all()
    for a, b in zip(got[1:], clean[1:]):
        assert torch.equal(a, b)


@pytest.mark.parametrize("door", DOORS, indirect=True)
def test_a_row_that_counts_and_is_not_finite_is_nan_in_result_and_gradient(door):
    settings, keep = door
    hidden, weight, target, bias, temperature, grad, ignored = case()
    bad = int((~ignored).nonzero()[3])
    hidden[bad, 2] = float("nan")
    logp, dx, dw, _ = results(hidden, weight, target, bias, temperature, grad, settings, keep, False)
    assert logp.isnan().nonzero().flatten().tolist() == [bad]
    assert dx[bad].isnan().any()
    assert dx[torch.arange(50) != bad].isfinite().all()
    assert dw.isnan().any()


@pytest.mark.parametrize("impl", ["reference", "chunked", "chunked as on a GPU"])
def test_logits_of_ignored_rows_may_hold_anything(impl, monkeypatch):
    from flowrl_kernels.chunked import tiles

    if impl.endswith("GPU"):
        monkeypatch.setattr(tiles, "host_knows", lambda tensor: False)
    impl = impl.split()[0]
    hidden, weight, target, _, temperature, grad, ignored = case()
    logits = hidden @ weight.T

    def run(z, degrees):
        z = z.clone().requires_grad_()
        out = logprob(z, target, temperature=degrees, entropy=True, impl=impl)
        return out.logp, out.entropy, torch.autograd.grad((out.logp, out.entropy), z, (grad, grad))[0]

    clean = run(logits, temperature)
    for junk in JUNK:
        dirty, degrees = logits.clone(), temperature.clone()
        dirty[ignored], degrees[ignored] = junk, junk
        for a, b in zip(run(dirty, degrees), clean):
            assert torch.equal(a, b)
    assert (clean[2][ignored] == 0).all()
    quiet = grad.masked_fill(torch.arange(50) == int((~ignored).nonzero()[0]), 0.0)
    z = logits.masked_fill((quiet == 0)[:, None], float("nan")).requires_grad_()
    if impl == "chunked":
        assert torch.autograd.grad(logprob(z, target, impl=impl).logp, z, quiet)[0].isfinite().all()


def test_ignored_rows_are_not_computed(monkeypatch):
    rows = []
    whole = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: rows.append(a.shape[0]) or whole(a, b, **more))
    hidden, weight, target = peaked_inputs(640, 16, 300)
    target[64:] = -100
    w = weight.requires_grad_()
    out = linear_logprob(hidden, w, target, impl="chunked").logp
    assert rows == [64]
    out.sum().backward()
    assert rows[1:] == [64, 300]  # the logits again, then dweight
    assert out.isfinite().all()
