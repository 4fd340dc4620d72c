"""kept=: log-probs renormalised over the tokens a sampler kept."""

import pytest
import torch

from flowrl_kernels import linear_logprob
from flowrl_kernels.testing import assert_grad_close, peaked_inputs


def kept_sets(target, v, seed=0):
    make = torch.Generator().manual_seed(seed)
    sets = []
    for i, y in enumerate(target.tolist()):
        others = torch.randperm(v, generator=make)[: 1 + i % 7]
        keep_target = i % 3 != 0  # some lists leave the target out: it counts as kept all the same
        sets.append(torch.cat([others[others != y], torch.tensor([y] * keep_target, dtype=torch.int64)]))
    offsets = torch.tensor([0, *(len(s) for s in sets)]).cumsum(0)
    return sets, (torch.cat(sets), offsets)


def masked(hidden, weight, target, sets, **settings):
    bias = torch.full((len(target), weight.shape[0]), -torch.inf, dtype=torch.float64)
    for row, (ids, y) in enumerate(zip(sets, target.tolist())):
        bias[row, ids], bias[row, y] = 0.0, 0.0
    z = hidden @ weight.T * settings.get("logit_scale", 1.0)
    if cap := settings.get("softcap"):
        z = cap * torch.tanh(z / cap)
    logp = torch.log_softmax(z / settings.get("temperature", 1.0) + bias, -1)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(-1)
    return logp.gather(1, target[:, None])[:, 0], entropy


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "softcap": 20.0, "logit_scale": 1.2}])
def test_it_equals_a_softmax_masked_to_the_kept_set(settings):
    hidden, weight, target = peaked_inputs(23, 12, 90)
    sets, kept = kept_sets(target, 90)
    x64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp, entropy = masked(x64, w64, target, sets, **settings)
    g, ge = torch.randn(23), torch.randn(23)
    expected = torch.autograd.grad((logp, entropy), (x64, w64), (g.double(), ge.double()))
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    out = linear_logprob(x, w, target, kept=kept, entropy=True, **settings)
    assert (out.logp - logp).abs().max() < 2e-5
    assert (out.entropy - entropy).abs().max() < 2e-5
    got = torch.autograd.grad((out.logp, out.entropy), (x, w), (g, ge))
    assert_grad_close(got[0], expected[0], rel=1e-4)
    assert_grad_close(got[1], expected[1], rel=1e-4)


def test_keeping_everything_changes_nothing_and_ignored_rows_stay_zero():
    hidden, weight, target = peaked_inputs(6, 8, 40)
    target[2] = -100
    everything = (torch.arange(40).repeat(6), torch.arange(0, 241, 40))
    out = linear_logprob(hidden, weight, target, kept=everything)
    torch.testing.assert_close(out.logp, linear_logprob(hidden, weight, target).logp, atol=1e-5, rtol=0)
    assert out.logp[2] == 0


def test_bad_lists_are_refused():
    hidden, weight, target = peaked_inputs(3, 4, 10)
    for kept, message in [
        (torch.arange(3), "kept: wanted a pair"),
        ((torch.arange(3), torch.tensor([0, 1, 2])), "kept offsets"),
        ((torch.arange(3), torch.tensor([0, 2, 1, 3])), "kept offsets: wanted rising"),
        ((torch.tensor([0, 1, 10]), torch.tensor([0, 1, 2, 3])), r"kept ids: wanted ids in \[0, 10\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear_logprob(hidden, weight, target, kept=kept)


def test_an_id_that_is_listed_twice_counts_once_in_any_order_and_an_empty_list_keeps_the_target():
    hidden, weight, target = peaked_inputs(3, 8, 40)
    target[0] = 5
    once = (torch.tensor([5, 7, 9, 1, 2]), torch.tensor([0, 3, 5, 5]))
    twice = (torch.tensor([9, 5, 7, 5, 9, 9, 2, 1, 2]), torch.tensor([0, 6, 9, 9]))
    results = []
    for kept in (once, twice):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprob(x, w, target, kept=kept, entropy=True)
        results.append((out.logp, out.entropy, *torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (x, w))))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    z = hidden[0].double() @ weight[[5, 7, 9]].double().T
    assert abs(float(results[1][0][0].detach() - torch.log_softmax(z, -1)[0])) < 2e-5
    assert results[1][0][2] == 0  # the target alone: certain


def test_ids_outside_make_their_row_nan_where_looking_would_cost_a_sync():
    from flowrl_kernels.core.types import EXACT, Head, Kept
    from flowrl_kernels.ops.kept import Settings, apply

    hidden, weight, target = peaked_inputs(4, 8, 40)
    target[3] = 40
    ids, offsets = torch.tensor([1, 2, 99, 3, -7, 4]), torch.tensor([0, 2, 4, 5, 6])
    settings = Settings(Kept(ids, offsets, None, 2), 1.0, None, -100, False, EXACT, None, None, "chunked")
    logp, _ = apply(hidden, target, Head(weight, None, torch.ones(1)), settings)
    assert logp.isnan().tolist() == [False, True, True, True]
