"""kept= on every way a row can go: few ids, very many, all of them; in the formats that samplers hand over."""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from flowrl_kernels import linear_logprob
from flowrl_kernels.chunked import kept_lists
from flowrl_kernels.chunked import linear_logprob_kept as gathered
from flowrl_kernels.core.types import Kept
from flowrl_kernels.testing import peaked_inputs

N, H, V = 40, 48, 3000


def ragged(n, v, seed=0, most=None):
    """Ids of each row: 1 to V of them, in any order, some twice, the target in some rows only."""
    make = torch.Generator().manual_seed(seed)
    most = v if most is None else most
    sizes = (most ** torch.linspace(0, 1, n)).round().long().clamp(1, v)[torch.randperm(n, generator=make)]
    sets = [torch.randperm(v, generator=make)[:size] for size in sizes]
    return [torch.cat([s, s[: len(s) // 3]]) if i % 2 else s for i, s in enumerate(sets)]


def rows_of(sets):
    return torch.cat(sets), torch.tensor([0, *(len(s) for s in sets)]).cumsum(0)


def masked(hidden, weight, target, sets, g, ge, **settings):
    """In float64, from the mask: logp, entropy and the gradients of their sum by hidden, weight and bias."""
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    b = settings.get("bias", torch.zeros(len(weight))).double().requires_grad_()
    mask = torch.full((len(target), len(weight)), -torch.inf, dtype=torch.float64)
    for row, (ids, y) in enumerate(zip(sets, target.tolist())):
        if ids is None:
            mask[row] = 0.0
        else:
            mask[row, ids], mask[row, y] = 0.0, 0.0
    z = (x @ w.T + b) * settings.get("logit_scale", 1.0)
    if cap := settings.get("softcap"):
        z = cap * torch.tanh(z / cap)
    logp = torch.log_softmax(z / settings.get("temperature", 1.0) + mask, -1)
    entropy = -(logp.exp() * logp.clamp_min(-1e4)).sum(-1)
    picked = logp.gather(1, target[:, None])[:, 0]
    return (
        picked.detach(),
        entropy.detach(),
        *torch.autograd.grad((picked, entropy), (x, w, b), (g.double(), ge.double())),
    )


def ours(hidden, weight, target, kept, g, ge, bias=None, **settings):
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    b = torch.zeros(len(weight), dtype=hidden.dtype) if bias is None else bias
    b = b.clone().requires_grad_()
    out = linear_logprob(x, w, target, bias=b, kept=kept, entropy=True, **settings)
    grads = torch.autograd.grad((out.logp, out.entropy), (x, w, b), (g, ge))
    return out.logp.detach(), out.entropy.detach(), *grads


def of_a_head_of_those_rows(hidden, weight, target, sets, g, ge, bias, **settings):
    """What the exact path in fp32 gives, row by row, for a head that has the row's ids and no others."""
    dtype, logp, entropy, dx = hidden.dtype, [], [], []
    hidden, weight, bias = hidden.float(), weight.float(), bias.float()
    dw, db = torch.zeros_like(weight), torch.zeros_like(bias)
    for i, ids in enumerate(sets):
        ids = torch.cat([ids, target[[i]]]).unique()
        place = (ids == target[i]).nonzero()[:, 0]
        one = ours(hidden[[i]], weight[ids], place, None, g[[i]], ge[[i]], bias=bias[ids], **settings)
        for kept, value in zip((logp, entropy, dx), one):
            kept.append(value)
        dw.index_add_(0, ids, one[3])
        db.index_add_(0, ids, one[4])
    return torch.cat(logp), torch.cat(entropy), torch.cat(dx).to(dtype), dw.to(dtype), db.to(dtype)


def upstream(n, seed=5):
    make = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=make), torch.randn(n, generator=make)


def errors(got, expected):
    largest = [float((a - b).abs().max()) for a, b in zip(got[:2], expected[:2])]
    return [*largest, *(float((a - b).norm() / b.norm()) for a, b in zip(got[2:], expected[2:]))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "softcap": 20.0, "logit_scale": 1.2}])
def test_any_number_of_ids_is_as_exact_as_the_exact_path(dtype, settings):
    hidden, weight, target = peaked_inputs(N, H, V, dtype=dtype)
    bias = torch.randn(V, generator=torch.Generator().manual_seed(2)).to(dtype)
    g, ge = upstream(N)
    sets, given = ragged(N, V), {**settings, "bias": bias}
    sizes = [len(s.unique()) for s in sets]
    assert min(sizes) == 1
    assert max(sizes) == V
    assert sum(size > kept_lists.wide_limit(V) for size in sizes) > 5
    error = errors(
        ours(hidden, weight, target, rows_of(sets), g, ge, **given),
        masked(hidden, weight, target, sets, g, ge, **given),
    )
    allowed = errors(
        ours(hidden, weight, target, None, g, ge, **given),
        masked(hidden, weight, target, [None] * N, g, ge, **given),
    )
    assert all(0 < mine <= 1.2 * exact for mine, exact in zip(error, allowed)), (error, allowed)


def test_a_row_keeps_its_bits_in_any_batch_and_order_of_ids_and_a_run_the_next_ones():
    hidden, weight, target = peaked_inputs(N, H, V)
    sets, (g, ge) = ragged(N, V), upstream(N)
    first = ours(hidden, weight, target, rows_of(sets), g, ge)
    again = ours(hidden, weight, target, rows_of([s.flip(0) for s in sets]), g, ge)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))[:23]
    moved = ours(hidden[order], weight, target[order], rows_of([sets[i] for i in order]), g[order], ge[order])
    assert all(torch.equal(a, b[order]) for a, b in zip(moved[:3], first[:3]))
    alone = [ours(hidden[[i]], weight, target[[i]], rows_of([sets[i]]), g[[i]], ge[[i]]) for i in range(N)]
    assert torch.equal(torch.cat([a[0] for a in alone]), first[0])


def test_repeated_ids_and_what_is_not_listed_count_for_nothing():
    hidden, weight, target = peaked_inputs(N, H, V)
    sets, (g, ge) = ragged(N, V, most=60), upstream(N)
    once = ours(hidden, weight, target, rows_of([s.unique() for s in sets]), g, ge)
    listed = torch.zeros(V, dtype=torch.bool)
    listed[torch.cat([*sets, target])] = True
    poisoned = torch.where(listed[:, None], weight, torch.nan)
    got = ours(hidden, poisoned, target, rows_of(sets), g, ge)
    assert all(torch.equal(a, b) for a, b in zip(got, once))
    assert not listed.all()
    assert got[3][~listed].count_nonzero() == 0


def test_the_three_ways_add_up_in_one_batch_and_whole_rows_have_the_bits_of_the_exact_path():
    hidden, weight, target = peaked_inputs(N, H, V, dtype=torch.bfloat16)
    g, ge = upstream(N)
    sets = [None if i % 4 == 0 else s for i, s in enumerate(ragged(N, V))]
    whole = torch.tensor([s is None for s in sets])
    got = ours(hidden, weight, target, [None if s is None else s.tolist() for s in sets], g, ge)
    expected = masked(hidden, weight, target, sets, g, ge)
    assert max(errors(got, expected)) < 2.5e-3
    exact = ours(hidden, weight, target, None, g, ge)
    for mine, theirs in zip(got[:3], exact[:3]):
        assert torch.equal(mine[whole], theirs[whole])
        assert not torch.equal(mine, theirs)


@pytest.mark.parametrize("most", [60, V])
def test_main_grad_takes_the_weights_gradient_and_leaves_other_rows_alone(most):
    hidden, weight, target = peaked_inputs(N, H, V, dtype=torch.bfloat16)
    sets = ragged(N, V, most=most)
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(linear_logprob(x, w, target, kept=rows_of(sets)).logp.sum(), w)
    main = torch.ones(V, H)
    version = main._version
    linear_logprob(x, w, target, kept=rows_of(sets), main_grad=main).logp.sum().backward()
    assert w.grad is None
    assert main._version > version
    assert float((main - 1 - expected).norm() / expected.norm()) < 2.5e-3
    assert (main[expected.float().abs().sum(1) == 0] == 1).all()


def test_epsilon_bounds_whole_rows_and_leaves_kept_sets_exact_as_the_report_says():
    hidden, weight, target = peaked_inputs(N, H, V)
    sets = ragged(N, V, most=60)
    reports = []
    for kept in (rows_of(sets), [None if i % 2 else s.tolist() for i, s in enumerate(sets)]):
        report, gradients = torch.zeros(3), []
        for settings in ({}, {"epsilon": 0.05, "report": report}):
            x = hidden.clone().requires_grad_()
            linear_logprob(x, weight, target, kept=kept, **settings).logp.sum().backward()
            gradients.append(x.grad)
        reports.append((report.tolist(), torch.equal(*gradients)))
        assert torch.equal(gradients[0][::2], gradients[1][::2])
    assert reports[0] == ([0.0, 1.0, 1.0], True)
    (bound, share, fell_back), same = reports[1]
    assert 0 < bound <= 0.05
    assert 0 < share < 1
    assert (fell_back, same) == (0, False)


def test_it_never_holds_the_gathered_rows_of_the_batch(monkeypatch):
    hidden, weight, target = peaked_inputs(N, H, V)
    sets, (g, ge) = ragged(N, V, most=60), upstream(N)
    whole = ours(hidden, weight, target, rows_of(sets), g, ge)
    largest, real = [], gathered.tiles.add_rows
    monkeypatch.setattr(gathered, "GATHERED", 7 * H)
    monkeypatch.setattr(gathered.tiles, "add_rows", lambda a, b, c: (largest.append(c.shape), real(a, b, c))[1])
    tiled = ours(hidden, weight, target, rows_of(sets), g, ge)
    assert {shape[0] for shape in largest if len(shape) == 2} >= {7}
    assert max(shape[0] for shape in largest if len(shape) == 2) == 7
    assert all(torch.equal(a, b) for a, b in zip(whole, tiled))


class Flat(NamedTuple):  # a mask may be a tuple too
    token_ids: list
    offsets: list


ROWS = [[5, 7, 9], [3], [1, 2, 8, 30]]
IDS = [5, 7, 9, 3, 1, 2, 8, 30]


@pytest.mark.parametrize(
    "kept",
    [
        SimpleNamespace(token_ids=IDS, offsets=[0, 3, 4, 8]),
        SimpleNamespace(token_ids=torch.tensor(IDS).int().numpy(), offsets=torch.tensor([0, 3, 4, 8]).numpy()),
        Flat(IDS, [0, 3, 4, 8]),
        SimpleNamespace(token_ids=ROWS),
        [Flat(ROWS[0], [0, 3]), SimpleNamespace(token_ids=ROWS[1] + ROWS[2], offsets=[0, 1, 5])],
        SimpleNamespace(ids=torch.tensor(IDS).int().numpy(), counts=torch.tensor([3, 1, 4]).int().numpy()),
        SimpleNamespace(token_ids=torch.tensor(IDS).numpy(), lengths=torch.tensor([3, 1, 4]).int().numpy()),
        ROWS,
        [[ROWS[0]], [ROWS[1], ROWS[2]]],
        [torch.tensor(row).int().numpy() for row in ROWS],
        [Flat(ROWS[0], [0, 3]), ROWS[1], ROWS[2]],
        SimpleNamespace(ids=torch.tensor(IDS), offsets=torch.tensor([0, 3, 4, 8])),
    ],
    ids=[
        "vllm",
        "vllm arrays",
        "tuple",
        "nested",
        "masks",
        "counts",
        "lengths",
        "rows",
        "batch",
        "arrays",
        "mixed",
        "a trainer's",
    ],
)
def test_masks_are_taken_as_samplers_give_them(kept):
    hidden, weight, target = peaked_inputs(3, 8, 40)
    expected = linear_logprob(hidden, weight, target, kept=(torch.tensor(IDS), torch.tensor([0, 3, 4, 8])))
    assert torch.equal(linear_logprob(hidden, weight, target, kept=kept).logp, expected.logp)
    reference = linear_logprob(hidden, weight, target, kept=kept, impl="reference").logp
    torch.testing.assert_close(reference, expected.logp, atol=1e-5, rtol=0)


def test_no_recorded_ids_mean_no_replay_where_a_format_says_so():
    hidden, weight, target = peaked_inputs(3, 8, 40)
    exact = linear_logprob(hidden, weight, target).logp
    none = torch.zeros(0, dtype=torch.int32)
    for kept in (SimpleNamespace(ids=none, counts=torch.zeros(3).int()), [None] * 3):
        assert torch.equal(linear_logprob(hidden, weight, target, kept=kept).logp, exact)
    for kept in (SimpleNamespace(token_ids=[], offsets=[0] * 4), [[], [], []]):
        assert (linear_logprob(hidden, weight, target, kept=kept).logp == 0).all()
    one = linear_logprob(hidden, weight, target, kept=SimpleNamespace(ids=[4, 6], counts=[0, 2, 0])).logp
    assert (one == exact).tolist() == [True, False, True]


def test_rows_are_counted_over_all_leading_dimensions_and_one_id_may_have_a_dimension_of_its_own():
    hidden, weight, target = peaked_inputs(6, 8, 40)
    kept = rows_of(ragged(6, 40))
    flat = linear_logprob(hidden, weight, target, kept=kept, entropy=True)
    out = linear_logprob(hidden.view(2, 3, 8), weight, target.view(2, 3, 1), kept=kept, entropy=True)
    assert torch.equal(out.logp, flat.logp.view(2, 3, 1))
    assert torch.equal(out.entropy, flat.entropy.view(2, 3))


@pytest.mark.parametrize(
    ("kept", "error", "message"),
    [
        (7, ValueError, "kept: wanted a pair .*got a int"),
        ("ids", ValueError, "kept: wanted a pair"),
        (
            SimpleNamespace(token_ids=[1, 2], offsets=[0, 1, 2]),
            ValueError,
            "kept offsets: wanted .* N = 3 rows.*2 rows",
        ),
        (SimpleNamespace(token_ids=[1, 2, 3], offsets=[0, 1, 2, 2]), ValueError, "kept offsets: wanted rising .* to 3"),
        (SimpleNamespace(token_ids=[1, 2, 40], offsets=[0, 1, 2, 3]), ValueError, r"kept ids: wanted ids in \[0, 40\)"),
        (SimpleNamespace(token_ids=[1.0, 2, 3], offsets=[0, 1, 2, 3]), TypeError, "kept token_ids: wanted an integer"),
        (SimpleNamespace(token_ids=["a"], offsets=[0, 1, 1, 1]), TypeError, "kept token_ids: wanted integers"),
        (SimpleNamespace(ids=[1, 2], counts=[1, 2, 0]), ValueError, "kept counts: wanted numbers .* add up to 2"),
        (SimpleNamespace(ids=[1], counts=[2, -1, 0]), ValueError, "kept counts: wanted numbers of at least 0"),
        ([[1], [True], [2, "x"]], TypeError, "kept ids: wanted integers"),
        ([[1], 5, [2]], ValueError, "kept: wanted a pair"),
        ([[1], [2]], ValueError, "kept offsets: wanted .* N = 3 rows"),
    ],
)
def test_nonsense_is_refused_by_name(kept, error, message):
    hidden, weight, target = peaked_inputs(3, 8, 40)
    with pytest.raises(error, match=message):
        linear_logprob(hidden, weight, target, kept=kept)


def test_a_targets_log_prob_is_nan_where_a_device_holds_a_wrong_id_even_in_a_wide_row():
    ids = torch.cat([torch.arange(1500), torch.tensor([4, V]), torch.tensor([3])])
    assert kept_lists.stray(Kept(ids, torch.tensor([0, 1500, 1502, 1503]), None, 1500), V).tolist() == [0, 1, 0]


def sharded(rank, world):
    import torch.distributed as dist

    hidden, weight, target = peaked_inputs(N, H, V)
    target[4] = -100
    g, ge = upstream(N)
    sets = [None if i % 7 == 3 else s.tolist() for i, s in enumerate(ragged(N, V))]
    sets[0] = [1, 2]  # all in one shard, with its target
    target[0] = 3
    settings = {"temperature": 0.8, "softcap": 25.0}
    expected = ours(hidden, weight, target, sets, g, ge, **settings)
    cuts = [0, 700, V] if world == 2 else [0, 700, 1500, 1510, V]
    own = slice(cuts[rank], cuts[rank + 1])
    got = ours(hidden, weight[own], target, sets, g, ge, vocab_parallel=dist.group.WORLD, **settings)
    assert max(errors(got[:3], expected[:3])) < 5e-6
    assert max(errors((*got[:2], *got[3:]), (*expected[:2], expected[3][own], expected[4][own]))) < 5e-6


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.nightly)])
def test_a_split_head_over_kept_sets_equals_the_whole_one(world):
    from ranks import on_ranks

    on_ranks(sharded, world)
